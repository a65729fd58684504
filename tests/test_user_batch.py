"""The user's micro-batches as seen through the user's own forward step."""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rmt.job import user_batch
from megatron_rmt.job.user_batch import BatchError, foreign_token_problem
from megatron_rmt.rollout.trunk import UserBatch
from tests.distributed import run_distributed
from tests.tiny_model import VOCAB, build_model

Batch = dict[str, Tensor]
END_OF_DOCUMENT = 0


def take_batches(
    forward_step: Callable[..., Any],
    data_iterator: Iterator[Batch] | None,
    chunk: torch.nn.Module,
    model: torch.nn.Module,
    count: int,
    *,
    separate_documents: bool = False,
    token_problem: Callable[[UserBatch], str | None] = lambda batch: None,
) -> list[UserBatch]:
    return user_batch.take_batches(
        forward_step,
        [data_iterator],
        [chunk],
        [model],
        count,
        end_of_document=END_OF_DOCUMENT,
        separate_documents=separate_documents,
        token_problem=token_problem,
    )


def _batches(count: int, size: int = 2, length: int = 6) -> list[Batch]:
    """As Megatron's data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, VOCAB, (count, size, length + 1), generator=generator)
    return [
        {
            "tokens": text[index, :, :-1],
            "labels": text[index, :, 1:],
            "loss_mask": (torch.rand(size, length, generator=generator) < 0.7).float(),
            "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).triu(1),
            "position_ids": torch.arange(length).repeat(size, 1),
        }
        for index in range(count)
    ]


def _forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """As in examples/pretrain_rmt.py."""
    batch = next(iterator)
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, functools.partial(_loss, batch["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = (losses * mask).sum()
    return loss, mask.sum().int(), {"lm loss": torch.stack([loss.detach(), mask.sum()])}


def _assert_equal(taken: list[UserBatch], batches: list[Batch]) -> None:
    assert len(taken) == len(batches)
    for own, batch in zip(taken, batches, strict=True):
        for name in ("tokens", "position_ids", "labels", "loss_mask"):
            assert torch.equal(getattr(own, name), batch[name])
            assert getattr(own, name).dtype == batch[name].dtype


@pytest.mark.usefixtures("single_process_megatron")
def test_the_batches_are_taken_and_the_model_is_itself_again():
    model, batches = build_model(), _batches(3)
    reference = _forward_step(iter(batches), model)[0]
    iterator = iter(batches)
    _assert_equal(take_batches(_forward_step, iterator, model, model, 2), batches[:2])
    assert "forward" not in vars(model)
    # The iterator goes on with the third batch, and the forward step computes again.
    assert torch.equal(next(iterator)["tokens"], batches[2]["tokens"])
    assert torch.equal(_forward_step(iter(batches), model)[0], reference)


class Wrapper(torch.nn.Module):
    """As Megatron's DDP and Float16Module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.usefixtures("single_process_megatron")
def test_the_model_may_be_wrapped():
    model, batches = build_model(), _batches(2)
    wrapped = Wrapper(Wrapper(model))
    _assert_equal(take_batches(_forward_step, iter(batches), wrapped, model, 2), batches)


@pytest.mark.usefixtures("single_process_megatron")
def test_one_row_of_positions_and_a_flat_loss_mask_are_understood():
    def forward_step(iterator: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return model(
            input_ids=batch["tokens"].int(),
            position_ids=batch["position_ids"][:1],
            attention_mask=None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"].flatten().bool(),
        ), None

    model, batches = build_model(), _batches(1)
    _assert_equal(take_batches(forward_step, iter(batches), model, model, 1), batches)


def _step_with(
    changes: dict[str, Any], leave_out: tuple[str, ...] = ()
) -> Callable[..., tuple[Tensor, Any]]:
    def forward_step(iterator: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Any]:
        batch = next(iterator)
        arguments = {
            "input_ids": batch["tokens"],
            "position_ids": batch["position_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["labels"],
            "loss_mask": batch["loss_mask"],
            **changes,
        }
        arguments = {key: value for key, value in arguments.items() if key not in leave_out}
        return model(**arguments), None

    return forward_step


def _never(iterator: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Any]:
    next(iterator)
    return torch.zeros(1), None


def _twice(iterator: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Any]:
    batch = next(iterator)
    _forward_step(iter([batch]), model)
    return _forward_step(iter([batch]), model)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("forward_step", "message"),
    [
        (
            _step_with({}, ("loss_mask",)),
            "gives GPTModel.forward no loss_mask; pass loss_mask= on the",
        ),
        (
            _step_with({"labels": None}),
            "gives GPTModel.forward no labels; pass labels= on the last",
        ),
        (
            _step_with({}, ("labels", "loss_mask")),
            "gives GPTModel.forward no labels and no loss_mask; pass labels=, ",
        ),
        (_step_with({"position_ids": None}), "gives GPTModel.forward no position_ids; pass "),
        (_step_with({"packed_seq_params": PackedSeqParams()}), "passes packed_seq_params; train"),
        (
            _step_with({"decoder_input": torch.zeros(6, 2, 32)}),
            "gives GPTModel.forward decoder_input, which would be lost, as RMT's rollouts and "
            "trees carry only input_ids, position_ids, labels, loss_mask, attention_mask; leave",
        ),
        (
            _step_with({"inference_params": object(), "padding_mask": torch.zeros(2, 6)}),
            "gives GPTModel.forward inference_params and padding_mask, which would be lost,",
        ),
        (_step_with({"inference_context": object()}), "gives GPTModel.forward inference_context, "),
        (_step_with({"extra_block_kwargs": {"x": 1}}), "gives GPTModel.forward extra_block_kwargs"),
        (_step_with({"runtime_gather_output": True}), "gives GPTModel.forward runtime_gather_outp"),
        (_step_with({"output_processor": print}), "gives GPTModel.forward output_processor, which"),
        (
            _step_with({"attention_mask": torch.ones(2, 6)}),
            r"gives GPTModel.forward an attention_mask of shape \[2, 6\]; pass one of shape "
            r"\[2, 1, 6, 6\], True where a token is hidden, or None.",
        ),
        (
            _step_with({"loss_mask": torch.full((2, 6), torch.nan)}),
            "gives GPTModel.forward a loss_mask that holds nan; pass finite weights, 0 or more.",
        ),
        (_step_with({"loss_mask": torch.tensor([1.0, -0.5] * 6)}), ".* loss_mask that holds -0.5;"),
        (_step_with({"loss_mask": torch.full((2, 6), torch.inf)}), ".* loss_mask that holds inf;"),
        (
            _step_with({"position_ids": torch.arange(-1, 5)[None]}),
            "gives GPTModel.forward position_ids from -1 on; count tokens from 0.",
        ),
        (_never, "called GPTModel.forward 0 times for 2 micro-batches; RMT needs"),
        (_twice, "called GPTModel.forward 4 times for 2 micro-batches; RMT needs"),
    ],
)
def test_a_forward_step_that_rmt_cannot_see_through_is_refused(forward_step, message):
    model = build_model()
    with pytest.raises(BatchError, match=rf"^forward_step_func {message}") as error:
        take_batches(forward_step, iter(_batches(2)), model, model, 2)
    assert "\n" not in str(error.value)
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("single_process_megatron")
def test_an_argument_that_says_nothing_is_none():
    says_nothing = {"extra_block_kwargs": {}, "runtime_gather_output": False, "decoder_input": None}
    model, batches = build_model(), _batches(1)
    step = _step_with(says_nothing)
    _assert_equal(take_batches(step, iter(batches), model, model, 1), batches)


@pytest.mark.usefixtures("single_process_megatron")
def test_an_argument_of_the_jobs_own_model_is_refused_by_its_name():
    class OwnModel(GPTModel):
        def forward(self, *args: Any, images: Tensor | None = None, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    model, batches = build_model(), _batches(1)
    model.__class__ = OwnModel
    _assert_equal(take_batches(_forward_step, iter(batches), model, model, 1), batches)
    with pytest.raises(BatchError, match=r"gives GPTModel.forward images, which would be"):
        take_batches(_step_with({"images": torch.ones(1)}), iter(batches), model, model, 1)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("embedding", "separate", "given", "taken"),
    [
        ("rope", False, [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]),
        ("rope", True, [0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]),
        ("rope", True, [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
        ("rope", False, [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]),
        ("rope", False, [0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]),
        ("learned_absolute", False, [0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]),
    ],
)
def test_a_rotary_embedding_counts_rows_whatever_the_job_says(embedding, separate, given, taken):
    model, (batch,) = build_model(position_embedding=embedding), _batches(1)
    batch["tokens"][:, 2] = END_OF_DOCUMENT
    batch["position_ids"] = torch.tensor([given, [0, 1, 2, 3, 4, 5]])
    own = take_batches(
        _step_with({"attention_mask": None}),
        iter([batch]),
        model,
        model,
        1,
        separate_documents=separate,
    )
    assert own[0].position_ids.tolist() == [taken, [0, 1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist()[0] == given


CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)


def _apart(*starts: int) -> Tensor:
    """Causal, documents that start at these columns apart."""
    begins = torch.zeros(6, dtype=torch.int64)
    begins[list(starts)] = 1
    document = begins.cumsum(0)
    return CAUSAL | (document[:, None] != document)


def _prefix() -> Tensor:
    mask = CAUSAL.clone()
    mask[:, :2] = False
    return mask


def _with_masks(masks: list[Tensor], ends: list[list[int]], loss: list[int]) -> list[Batch]:
    """A micro-batch of two samples with documents that end at ``ends``; the loss is on the first
    ``loss`` tokens."""
    (batch,) = _batches(1)
    for sample, columns in enumerate(ends):
        batch["tokens"][sample, columns] = END_OF_DOCUMENT
    batch["loss_mask"] = (torch.arange(6) < torch.tensor(loss)[:, None]).float()
    batch["attention_mask"] = torch.stack(masks)[:, None]
    return [batch]


MASKS = {
    "causal, one for all samples": ([CAUSAL], [[2], []], [6, 6], False, None),
    "causal, one for each": ([CAUSAL, CAUSAL], [[2], []], [6, 6], False, None),
    "documents apart": ([_apart(0, 3), _apart(0)], [[2], []], [6, 6], True, None),
    "the last token ends a document": ([_apart(0), _apart(0)], [[5], []], [6, 6], True, None),
    "what padding sees": ([CAUSAL, _apart(0, 4)], [[], []], [6, 4], False, None),
    "padding is all hidden": (
        [CAUSAL, CAUSAL | (torch.arange(6) >= 4)],
        [[], []],
        [6, 4],
        False,
        None,
    ),
    "no loss at all": ([_prefix()], [[], []], [0, 0], False, None),
    "documents apart, unasked": ([_apart(0, 3), CAUSAL], [[2], []], [6, 6], False, (0, 3)),
    "documents together, asked apart": ([CAUSAL], [[], [2]], [6, 6], True, (1, 3)),
    "apart where none ends": ([CAUSAL, _apart(0, 4)], [[], []], [6, 6], True, (1, 4)),
    "the last row alone": ([CAUSAL, _apart(0, 4)], [[], []], [6, 5], False, (1, 4)),
    "prefix": ([_prefix()], [[], []], [6, 6], False, (0, 0)),
    "a token that sees padding": (
        [CAUSAL, CAUSAL & (torch.arange(6) < 5)],
        [[], []],
        [6, 3],
        False,
        (1, 0),
    ),
    "True where it is seen": ([~CAUSAL], [[], []], [6, 6], False, (0, 0)),
}


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("case", MASKS)
def test_an_attention_mask_is_what_trees_do_or_refused(case: str):
    masks, ends, loss, separate, wrong = MASKS[case]
    model, batches = build_model(), _with_masks(masks, ends, loss)
    arguments = _forward_step, iter(batches), model, model, 1
    if wrong is None:
        _assert_equal(take_batches(*arguments, separate_documents=separate), batches)
        return
    kind = "within each document" if separate else "over the whole sample"
    sentence = (
        r"^forward_step_func gives GPTModel.forward an attention_mask that is not causal "
        rf"{kind} \(sample {wrong[0]} of a micro-batch, row {wrong[1]}\), as RMT's rollouts"
    )
    with pytest.raises(BatchError, match=sentence):
        take_batches(*arguments, separate_documents=separate)


@pytest.mark.usefixtures("single_process_megatron")
def test_an_error_of_the_forward_step_leaves_the_model_as_it_was():
    def forward_step(iterator: Iterator[Batch], model: GPTModel) -> None:
        raise KeyError("tokens")

    model = build_model()
    with pytest.raises(KeyError, match="tokens"):
        take_batches(forward_step, iter(_batches(2)), model, model, 2)
    assert "forward" not in vars(model)


def _on_stage(batches: list[Batch]) -> list[Any]:
    """As Megatron's own get_batch: each stage sees only what it needs."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    model = _stage_chunk()
    first = parallel_state.is_pipeline_first_stage()
    hidden = ("labels", "loss_mask") if first else ("input_ids", "position_ids")
    own = dict.fromkeys(hidden)
    outcomes = []
    for changes in (
        own,
        dict.fromkeys(("labels", "input_ids")),
        # What one stage alone sees.
        own if first else own | {"attention_mask": torch.zeros(1, 1, 6, 6)},
        own | {"decoder_input": torch.zeros(1)} if first else own,
    ):
        try:
            taken = take_batches(_step_with(changes), iter(batches), model, model, len(batches))
        except BatchError as error:
            taken = str(error)
        outcomes.append(taken)
    return outcomes


class _Stage(torch.nn.Module):
    """Only the signature counts: the forward pass is not run."""

    forward = GPTModel.forward


@pytest.mark.multiprocess
def test_every_pipeline_stage_gets_the_whole_batch_or_the_same_error():
    batches = _batches(2)
    for taken, *errors in run_distributed(2, _on_stage, batches):
        _assert_equal(taken, batches)
        sentences = (
            "gives GPTModel.forward no input_ids; pass input_ids= on the first",
            "an attention_mask that is not causal over the whole sample (sample 0",
            "gives GPTModel.forward decoder_input, which would be lost",
        )
        for error, sentence in zip(errors, sentences, strict=True):
            assert sentence in error


def _stage_chunk() -> torch.nn.Module:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    model.__class__ = _Stage
    return model


def _on_stage_with_chunks(batches: list[Batch]) -> list[Any]:
    """Two chunks on each stage: as in Megatron, one iterator for each, and only the very first and
    the very last chunk read theirs. Then the last chunk is given too few, then a stray argument."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    rank = torch.distributed.get_rank()
    chunks = [_stage_chunk(), _stage_chunk()]
    reads = chunks[rank]
    outcomes = []
    for batches_of_last, stray in ((batches, {}), (batches[:1], {}), (batches, {"x": 1})):

        def forward_step(iterator: Iterator[Batch] | None, model: torch.nn.Module) -> Any:
            if model is not reads:
                return model(None, None, None), None
            batch = next(iterator, None)
            if batch is None:
                return None
            if rank == 0:
                return model(batch["tokens"], batch["position_ids"], None), None
            labels = {name: batch[name] for name in ("labels", "loss_mask")}
            extra = {"extra_block_kwargs": stray}  # noqa: B023
            return model(None, None, None, **labels, **extra), None

        own = [iter(batches), None] if rank == 0 else [None, iter(batches_of_last)]
        try:
            taken = user_batch.take_batches(
                forward_step,
                own,
                chunks,
                chunks,
                len(batches),
                end_of_document=END_OF_DOCUMENT,
                separate_documents=False,
                token_problem=lambda batch: None,
            )
        except BatchError as error:
            taken = str(error)
        outcomes.append(taken)
        assert not any("forward" in vars(chunk) for chunk in chunks)
    return outcomes


@pytest.mark.multiprocess
def test_with_virtual_stages_each_chunk_is_given_its_part_of_the_batch():
    batches = _batches(2)
    for taken, too_few, stray in run_distributed(2, _on_stage_with_chunks, batches):
        _assert_equal(taken, batches)
        assert "called GPTModel.forward 1 times for 2 micro-batches" in too_few
        assert "gives GPTModel.forward extra_block_kwargs, which would be lost" in stray


def _on_data_parallel_rank(batches: list[Batch]) -> str:
    """One rank's job alone gives what cannot be carried."""
    parallel_state.initialize_model_parallel()
    model = _stage_chunk()
    odd = {"padding_mask": torch.zeros(2, 6)} if torch.distributed.get_rank() == 1 else {}
    try:
        take_batches(_step_with(odd), iter(batches), model, model, len(batches))
    except BatchError as error:
        return str(error)
    return "no error"


@pytest.mark.faults
@pytest.mark.multiprocess
def test_what_one_data_parallel_rank_is_given_ends_all():
    for error in run_distributed(2, _on_data_parallel_rank, _batches(2)):
        assert "gives GPTModel.forward padding_mask, which would be lost" in error


def _of_tokens(tokens: list[int], loss_mask: list[float], labels: list[int] | None = None):
    values = torch.tensor([tokens])
    labels = values.clone() if labels is None else torch.tensor([labels])
    return UserBatch(values, torch.arange(len(tokens))[None], labels, torch.tensor([loss_mask]))


def _problem(batch: UserBatch) -> str | None:
    """What is said of a batch of a vocabulary of 53 tokens, in 64 rows of the embedding."""
    return foreign_token_problem(batch, Namespace(padded_vocab_size=64), VOCAB)


@pytest.mark.faults
@pytest.mark.parametrize("token", [-100, -1, VOCAB, 63, 64, 70_000])
def test_a_token_outside_the_vocabulary_is_named(token: int):
    said = f"a sample holds token {token} but --tokenizer-model has 53 tokens; make the samples"
    assert _problem(_of_tokens([1, 2, 3], [1, 1, 1])) is None
    assert _problem(_of_tokens([1, token, 3], [1, 0, 1])).startswith(said)
    assert _problem(_of_tokens([1, token, 3], [0, 1, 0])).startswith(said)


def test_padding_may_be_any_row_of_the_embedding_and_labels_may_be_ignored():
    assert _problem(_of_tokens([1, 2, 60, 63], [1, 1, 0, 0])) is None
    assert _problem(_of_tokens([1, 2, 60, 63], [1, 1, 1, 1], [2, 3, -100, -100])) is None
    assert _problem(_of_tokens([1, 2, 3, 4], [1, 1, 1, 1], [2, 3, -100, 99])) is None
    assert "holds token 64" in _problem(_of_tokens([1, 2, 60, 64], [1, 1, 0, 0]))


def _on_rank(batches: list[Batch], stages: int) -> tuple[str, int]:
    """What is said where the last rank, or the last stage, is given a foreign token; and how many
    all-reduces it takes to find that nothing is wrong."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    model = _stage_chunk()
    last = torch.distributed.get_rank() == 1
    reduced = torch.distributed.all_reduce
    calls = []
    torch.distributed.all_reduce = lambda *args, **named: calls.append(reduced(*args, **named))
    take_batches(_step_with({}), iter(batches), model, model, 2, token_problem=_problem)
    torch.distributed.all_reduce = reduced
    foreign = [dict(batch, tokens=batch["tokens"].clone()) for batch in batches]
    if last or stages > 1:
        foreign[1]["tokens"][1, 0] = 60
    foreign[1]["loss_mask"][1, -1] = 1.0
    try:
        take_batches(_step_with({}), iter(foreign), model, model, 2, token_problem=_problem)
    except BatchError as error:
        return str(error), len(calls)
    return "no error", len(calls)


@pytest.mark.faults
@pytest.mark.multiprocess
@pytest.mark.parametrize("stages", [1, 2])
def test_every_rank_stops_where_one_finds_a_foreign_token(stages: int):
    (first, calls), (second, _) = run_distributed(2, _on_rank, _batches(2), stages)
    assert first == second
    assert "holds token 60 but" in first
    assert calls == stages
