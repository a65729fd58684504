"""The head on several tensor-parallel ranks, and its collectives."""

import pytest
import torch
from torch import Tensor

from megatron_rmt.model.head import token_entropies, token_loss_sum, vocab_range
from tests.distributed import run_distributed
from tests.head_problem import (
    HIDDEN,
    LOSSES,
    PADDED,
    VOCAB,
    Problem,
    decode_scores,
    expected_results,
    linear,
    log_probs_and_entropies,
    make_problem,
    results_of_the_head,
    top_k_entropy,
)


def _on_rank(problem: Problem) -> dict[str, object]:
    group = torch.distributed.group.WORLD
    rows = PADDED // group.size()
    shard = slice(group.rank() * rows, (group.rank() + 1) * rows)
    hidden, weight = problem["hidden"], problem["weight"][shard]
    arguments = {"vocab_size": VOCAB, "tp_group": group, "chunk_size": 5}
    return {
        **{
            name: results_of_the_head(problem, 5, shard, group, loss)
            for name, loss in LOSSES.items()
        },
        "entropies": token_entropies(hidden, weight, **arguments),
        "top_k": {k: token_entropies(hidden, weight, top_k=k, **arguments) for k in (1, 16, 80)},
        "equal_scores": token_entropies(torch.ones_like(hidden), weight * 0 - 1, **arguments)[1],
        "logits": decode_scores(hidden, weight, VOCAB, group),
        "range": vocab_range(rows, VOCAB, group),
    }


# With four ranks of 32 rows the last one holds no true token at all (90 of 128).
@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "count"), [(2, 13), (4, 13), (2, 0)])
def test_tensor_parallel_ranks_equal_a_single_process(ranks, count):
    problem = make_problem(count)
    results = run_distributed(ranks, _on_rank, problem)
    scores = problem["hidden"] @ problem["weight"][:VOCAB].T
    logits = torch.cat([result["logits"] for result in results], -1)
    torch.testing.assert_close(logits, scores)
    starts = [rank * PADDED // ranks for rank in range(ranks)]
    lengths = {2: [64, 26], 4: [32, 32, 26, 0]}[ranks]
    assert [result["range"] for result in results] == list(zip(starts, lengths, strict=True))
    for name, loss in LOSSES.items():
        references = expected_results(problem, loss)
        for result in results:
            for value, reference in zip(result[name][:-1], references[:-1], strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)
        by_weight = torch.cat([result[name][-1] for result in results])
        torch.testing.assert_close(by_weight, references[-1], rtol=1e-11, atol=1e-12)
    for result in results:
        for entropies, ids in (result["entropies"], *result["top_k"].values()):
            assert entropies.shape == (count,)
            assert torch.equal(ids, scores.argmax(-1))
        entropies = log_probs_and_entropies(
            problem["hidden"], problem["weight"], problem["targets"]
        )[1]
        torch.testing.assert_close(result["entropies"][0], entropies)
        for k, (entropies, _) in result["top_k"].items():
            reference = top_k_entropy(problem["hidden"], problem["weight"], k)
            torch.testing.assert_close(entropies, reference)
        assert torch.equal(result["equal_scores"], torch.zeros(count, dtype=torch.int64))


def _count_collectives(problem: Problem) -> dict[str, list[tuple[str, list[int]]]]:
    """(kind, shape) of the collectives of each function, in order."""
    group = torch.distributed.group.WORLD
    seen: list[tuple[str, list[int]]] = []
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather_into_tensor

    def counted_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        seen.append((str(kwargs["op"]).rsplit(".", 1)[1], list(tensor.shape)))
        return reduce(tensor, *args, **kwargs)

    def counted_gather(result: Tensor, tensor: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(("GATHER", list(tensor.shape)))
        return gather(result, tensor, *args, **kwargs)

    torch.distributed.all_reduce = counted_reduce
    torch.distributed.all_gather_into_tensor = counted_gather
    problem = {**problem, "vocab_size": 2 * PADDED}
    hidden, weight = problem["hidden"].requires_grad_(), problem["weight"].requires_grad_()
    arguments = {"vocab_size": 2 * PADDED, "tp_group": group, "chunk_size": 5}
    counted = {}

    def take(name: str) -> None:
        counted[name] = seen.copy()
        seen.clear()

    loss = linear(problem)
    total, _ = token_loss_sum(hidden, weight, problem["targets"], loss, **arguments)
    take("loss, forward")
    total.backward()
    take("loss, backward")
    token_entropies(hidden, weight, **arguments)
    take("entropies")
    token_entropies(hidden, weight, top_k=4, **arguments)
    take("top k")
    decode_scores(hidden, weight, 2 * PADDED, group)
    take("logits")
    return counted


@pytest.mark.multiprocess
def test_the_collectives_are_those_that_the_docstrings_name():
    """13 rows in chunks of 5."""
    chunks = [call for rows in (5, 5, 3) for call in (("MAX", [rows]), ("SUM", [3, rows]))]
    expected = {
        "loss, forward": [*chunks, ("SUM", [13, HIDDEN])],
        "loss, backward": [],
        "entropies": [("MAX", [13]), ("MIN", [13]), ("MAX", [13]), ("SUM", [3, 13])],
        "top k": [("MAX", [13]), ("MIN", [13]), ("GATHER", [13, 4])],
        "logits": [],
    }
    assert run_distributed(2, _count_collectives, make_problem()) == [expected] * 2
