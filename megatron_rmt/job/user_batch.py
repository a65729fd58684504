"""See the user's micro-batches without knowing their format.

The user's own forward step turns its data iterator into a call of ``GPTModel.forward``. For one
step of RMT each micro-batch is taken from exactly that call: the forward step runs, but the model's
``forward`` only records its arguments. The user's ``get_batch``, dataset and masks stay in use.
"""

import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.job.data_files import foreign_token_of_a_batch
from megatron_rmt.rollout.trunk import UserBatch


class BatchError(ValueError):
    """A batch cannot be trained on; one sentence with the remedy."""


def take_batches(
    forward_step: Callable[..., Any],
    data_iterator: Iterator[Any] | None,
    model_chunk: torch.nn.Module,
    gpt_model: torch.nn.Module,
    count: int,
) -> list[UserBatch]:
    """Take the next ``count`` micro-batches of this data-parallel rank from ``data_iterator``.

    Collective over the tensor- and pipeline-parallel ranks; every stage gets the whole batch.
    ``gpt_model`` is the ``GPTModel`` inside ``model_chunk``.

    Raises:
        ValueError: the forward step does not call the model, or gives it no labels or loss mask.
    """
    recorded: list[dict[str, Any]] = []
    parameters = inspect.signature(type(gpt_model).forward)

    def record(*args: Any, **kwargs: Any) -> Tensor:
        recorded.append(parameters.bind(gpt_model, *args, **kwargs).arguments)
        return torch.zeros(1, device=next(gpt_model.parameters()).device)

    gpt_model.forward = record
    try:
        for _ in range(count):
            forward_step(data_iterator, model_chunk)
    finally:
        del gpt_model.forward
    if len(recorded) != count:
        raise ValueError(
            f"RMT: forward_step_func called GPTModel.forward {len(recorded)} times for {count} "
            "micro-batches; RMT needs a forward step that calls the model once for each."
        )
    return [_complete(arguments) for arguments in recorded]


def _complete(arguments: dict[str, Any]) -> UserBatch:
    if arguments.get("packed_seq_params") is not None:
        raise ValueError(
            "RMT: forward_step_func passes packed_seq_params; train with unpacked samples "
            "(--reset-attention-mask and --reset-position-ids keep documents apart)."
        )
    fields: dict[str, Tensor] = {}
    for names, stage_holds, source, stage in (
        (("input_ids", "position_ids"), parallel_state.is_pipeline_first_stage(), 0, "first"),
        (("labels", "loss_mask"), parallel_state.is_pipeline_last_stage(), -1, "last"),
    ):
        own = {name: arguments.get(name) for name in names if stage_holds}
        own = {name: value.cpu() for name, value in own.items() if torch.is_tensor(value)}
        shared = _from_stage(own, source)
        missing = [name for name in names if name not in shared]
        if missing:
            raise ValueError(
                f"RMT: forward_step_func gives GPTModel.forward no {' and no '.join(missing)}; "
                f"pass {', '.join(f'{name}=' for name in missing)} on the {stage} pipeline stage."
            )
        fields |= shared
    return UserBatch(
        tokens=fields["input_ids"].long(),
        position_ids=fields["position_ids"].long().expand_as(fields["input_ids"]),
        labels=fields["labels"].long(),
        loss_mask=fields["loss_mask"].float().view_as(fields["labels"]),
    )


def _from_stage(value: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
    """``value`` of pipeline stage ``stage`` on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    group = parallel_state.get_pipeline_model_parallel_group()
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[stage], group=group)
    return box[0]


def check_tokens(batches: Sequence[UserBatch], args: Namespace, vocab_size: int) -> None:
    """Every token up to the last one that counts must be of the vocabulary, as it may be read as
    text; padding behind it may be any row of the embedding.

    Collective over all ranks: one all-reduce of two integers.

    Raises:
        BatchError: on all ranks, if a batch of one of them holds another token.
    """
    rows = max(vocab_size, args.padded_vocab_size or 0)
    lowest, highest = 0, -1
    for batch in batches:
        text = ((batch.loss_mask > 0) & (batch.labels >= 0)).flip(1).cummax(1).values.flip(1)
        limit = torch.where(text, vocab_size, rows)
        foreign = batch.tokens[(batch.tokens < 0) | (batch.tokens >= limit)]
        if len(foreign):
            lowest, highest = min(lowest, int(foreign.min())), max(highest, int(foreign.max()))
    worst = torch.tensor([highest, -lowest], device=torch.cuda.current_device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    highest, lowest = int(worst[0]), -int(worst[1])
    if highest >= 0 or lowest < 0:
        token = highest if highest >= 0 else lowest
        raise BatchError(foreign_token_of_a_batch(args, token, vocab_size))
