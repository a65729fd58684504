"""Samples of Megatron's evaluations: kept, cut into documents, measured, told."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rmt.job import eval_samples
from megatron_rmt.job.eval_samples import (
    KeepingIterator,
    batches_to_keep,
    evaluate_with_thoughts,
    report_evaluation,
    texts_of_batch,
)
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.rollout.trunk import UserBatch
from tests.tiny_step import BYTES, tiny_run

CLOSE, END = BYTES.index(b"</t>"), 0


def _run(separate: bool = True, **changes: Any) -> MidTraining:
    run = tiny_run(**changes)
    args = Namespace(reset_attention_mask=separate, seq_length=8, train_iters=10)
    policy = SimpleNamespace(vocab_size=len(BYTES))
    return dataclasses.replace(run, args=args, policy=policy)


def _batch(*texts: list[int], unweighed: tuple[int, ...] = ()) -> UserBatch:
    text = torch.tensor(texts)
    length = text.shape[1] - 1
    loss_mask = torch.ones(len(texts), length)
    loss_mask[:, list(unweighed)] = 0
    positions = torch.arange(length).repeat(len(texts), 1)
    return UserBatch(text[:, :-1], positions, text[:, 1:], loss_mask)


def test_the_first_batches_are_kept_as_they_were_read():
    read = [{"tokens": 1}, {"tokens": 2}, {"tokens": 3}]
    iterator = KeepingIterator(iter(read), 2)
    for batch in iterator:
        batch["tokens"] = None
    assert iterator.kept == [{"tokens": 1}, {"tokens": 2}]


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("samples", "eval_iters", "count"), [(5, 2, 3), (4, 2, 2), (99, 2, 4), (1, 2, 1), (9, None, 2)]
)
def test_no_more_is_kept_than_is_asked_for_or_read(
    samples: int, eval_iters: int | None, count: int
):
    args = Namespace(eval_micro_batch_size=2, eval_global_batch_size=4, eval_iters=1)
    assert batches_to_keep(args, samples, eval_iters) == count


def test_tokens_that_count_and_can_be_answered_are_drawn_from_each_document():
    # Letters are tokens 2 to 9; the document ends behind the fourth token.
    batch = _batch([2, 3, CLOSE, END, 4, 5, 6, 7, 8], unweighed=(6,))
    ((sample, first, tokens), (_, second, others)) = texts_of_batch(
        _run(eval_positions_per_document=99), batch, [3]
    )
    assert sample == 3
    assert (first.ids, second.ids) == ([2, 3, CLOSE, END], [4, 5, 6, 7])
    # Neither the end of a thought, nor the end of a document, nor what bears no loss.
    assert (tokens, others) == ([1], [1, 2])
    assert first.number != second.number
    whole = texts_of_batch(_run(separate=False, eval_positions_per_document=99), batch, [3])
    ((_, text, tokens),) = whole
    assert text.ids == [2, 3, CLOSE, END, 4, 5, 6, 7]
    assert tokens == [1, 4, 5, 6]


def test_the_draw_is_of_the_sample_and_of_nothing_beside_it():
    run = _run(separate=False, eval_positions_per_document=2)
    texts = [[2 + (row * column) % 8 for column in range(9)] for row in (1, 3, 5)]
    together = texts_of_batch(run, _batch(*texts), [4, 5, 6])
    alone = [
        found
        for row, text in enumerate(texts)
        for found in texts_of_batch(run, _batch(text), [4 + row])
    ]
    assert together == alone
    assert all(len(tokens) == 2 for _, _, tokens in together)
    other = dataclasses.replace(run, seed=6)
    assert texts_of_batch(other, _batch(*texts), [4, 5, 6]) != together


@pytest.mark.usefixtures("single_process_megatron")
def test_an_evaluation_reads_what_it_reads_and_is_measured_at_the_last_steps_budget(monkeypatch):
    run = _run(separate=False, eval_samples=1, initial_budget=100, budget_decay=0.5)
    vars(run.args).update(eval_micro_batch_size=1, eval_global_batch_size=2, eval_iters=2)
    seen: list[Any] = []

    def original(forward_step_func: Any, data_iterator: Any, model: Any) -> tuple[Any, ...]:
        seen.extend(data_iterator)
        return {"lm loss": 1}, None, False

    def take(step: Any, iterators: Any, chunks: Any, models: Any, count: int, **_: Any) -> Any:
        assert [list(own) for own in iterators] == [[1]]
        assert count == 1
        return [_batch([2, 3, 4])]

    def measure(run: Any, held_out: Any, budget: int) -> dict[str, Any]:
        return {"texts": [text.ids for text in held_out.texts], "budget": budget}

    monkeypatch.setattr(eval_samples, "take_batches", take)
    monkeypatch.setattr(eval_samples, "measure_held_out", measure)
    monkeypatch.setattr(eval_samples, "chunks_of", lambda model: [model])
    run = dataclasses.replace(run, policy=SimpleNamespace(vocab_size=len(BYTES), model=None))
    call = {"forward_step_func": None, "data_iterator": iter([1, 2, 3, 4]), "model": [None]}
    result, found = evaluate_with_thoughts(original, call, run, steps=6)
    assert result == ({"lm loss": 1}, None, False)
    assert seen == [1, 2, 3, 4]
    # 100 * 0.5 ** (5 / 10)
    assert found == {"texts": [[2, 3]], "budget": 70}


def test_what_was_measured_is_told_by_split_and_by_set(tmp_path: Path, capsys, monkeypatch):
    logged: list[Any] = []
    monkeypatch.setattr(eval_samples, "log_held_out", lambda *words: logged.append(words))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 4, "reward": 0.5}\n')
    args = Namespace(rmt_metrics_file=str(metrics), multiple_validation_sets=False)
    values = [{"held-out thought": 0.25, "held-out gain": None}]
    report_evaluation(args, values, "iteration 4", 4)
    report_evaluation(args, values, "iteration 4 on test set", 4)
    assert capsys.readouterr().out.splitlines() == [
        " RMT at iteration 4 | validation thought: 2.500000E-01 |",
        " RMT at iteration 4 on test set | test thought: 2.500000E-01 |",
    ]
    assert logged[0] == ({"validation thought": 0.25, "validation gain": None}, 4)
    first, *_, last = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert first == {"iteration": 4, "reward": 0.5}
    of_validation = {"validation thought": 0.25, "validation gain": None}
    assert last == first | of_validation | {"test thought": 0.25, "test gain": None}
    # Of another step nothing is known any more.
    args.multiple_validation_sets, args.validation_set_names = True, ["a", "b"]
    report_evaluation(args, values * 2, "iteration 5", 5)
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last.pop("iteration") == 5
    assert set(last) == {f"validation-{name} {of}" for name in "ab" for of in ("thought", "gain")}
    report_evaluation(args, [{}], "iteration 6", 6)
    assert json.loads(metrics.read_text().splitlines()[-1])["iteration"] == 5
