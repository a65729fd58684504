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

from megatron_rmt.job.user_batch import BatchError, check_tokens, take_batches
from megatron_rmt.rollout.trunk import UserBatch
from tests.distributed import run_distributed
from tests.tiny_model import VOCAB, build_model

Batch = dict[str, Tensor]


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
        (_never, "called GPTModel.forward 0 times for 2 micro-batches; RMT needs"),
        (_twice, "called GPTModel.forward 4 times for 2 micro-batches; RMT needs"),
    ],
)
def test_a_forward_step_that_rmt_cannot_see_through_is_refused(forward_step, message):
    model = build_model()
    with pytest.raises(ValueError, match=rf"^RMT: forward_step_func {message}"):
        take_batches(forward_step, iter(_batches(2)), model, model, 2)
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("single_process_megatron")
def test_an_error_of_the_forward_step_leaves_the_model_as_it_was():
    def forward_step(iterator: Iterator[Batch], model: GPTModel) -> None:
        raise KeyError("tokens")

    model = build_model()
    with pytest.raises(KeyError, match="tokens"):
        take_batches(forward_step, iter(_batches(2)), model, model, 2)
    assert "forward" not in vars(model)


def _on_stage(batches: list[Batch]) -> list[UserBatch] | str:
    """As Megatron's own get_batch: each stage sees only what it needs."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    model.__class__ = _Stage
    first = parallel_state.is_pipeline_first_stage()
    hidden = ("labels", "loss_mask") if first else ("input_ids", "position_ids")
    forward_step = _step_with(dict.fromkeys(hidden))
    taken = take_batches(forward_step, iter(batches), model, model, len(batches))
    try:
        everything_hidden = _step_with(dict.fromkeys(("labels", "input_ids")))
        take_batches(everything_hidden, iter(batches), model, model, len(batches))
    except ValueError as error:
        return taken, str(error)
    return taken, "no error"


class _Stage(torch.nn.Module):
    """Only the signature counts: the forward pass is not run."""

    forward = GPTModel.forward


@pytest.mark.multiprocess
def test_every_pipeline_stage_gets_the_whole_batch_or_the_same_error():
    batches = _batches(2)
    results = run_distributed(2, _on_stage, batches)
    for taken, error in results:
        _assert_equal(taken, batches)
        assert "gives GPTModel.forward no input_ids; pass input_ids= on the first" in error


def _of_tokens(tokens: list[int], loss_mask: list[float], labels: list[int] | None = None):
    values = torch.tensor([tokens])
    labels = values.clone() if labels is None else torch.tensor([labels])
    return UserBatch(values, torch.arange(len(tokens))[None], labels, torch.tensor([loss_mask]))


def _check(*batches: UserBatch) -> str:
    """What is said of a batch of a vocabulary of 53 tokens, in 64 rows of the embedding."""
    try:
        check_tokens(batches, Namespace(padded_vocab_size=64), VOCAB)
    except BatchError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("token", [-100, -1, VOCAB, 63, 64, 70_000])
def test_a_token_outside_the_vocabulary_is_named(token: int):
    good = _of_tokens([1, 2, 3], [1, 1, 1])
    said = f"a sample holds token {token} but --tokenizer-model has 53 tokens; make the samples"
    assert _check(good, good) == ""
    assert _check(good, _of_tokens([1, token, 3], [1, 0, 1])).startswith(said)
    assert _check(_of_tokens([1, token, 3], [0, 1, 0])).startswith(said)


@pytest.mark.usefixtures("single_process_megatron")
def test_padding_may_be_any_row_of_the_embedding_and_labels_may_be_ignored():
    assert _check(_of_tokens([1, 2, 60, 63], [1, 1, 0, 0])) == ""
    assert _check(_of_tokens([1, 2, 60, 63], [1, 1, 1, 1], [2, 3, -100, -100])) == ""
    assert _check(_of_tokens([1, 2, 3, 4], [1, 1, 1, 1], [2, 3, -100, 99])) == ""
    assert "holds token 64" in _check(_of_tokens([1, 2, 60, 64], [1, 1, 0, 0]))


def _on_rank() -> str:
    parallel_state.initialize_model_parallel()
    rank = torch.distributed.get_rank()
    return _check(_of_tokens([1, 2, 60 if rank else 3], [1, 1, 1]))


@pytest.mark.multiprocess
def test_every_rank_stops_where_one_finds_a_foreign_token():
    first, second = run_distributed(2, _on_rank)
    assert first == second
    assert "holds token 60 but" in first
