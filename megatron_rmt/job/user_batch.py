"""See the user's micro-batches without knowing their format.

The user's own forward step turns its data iterator into a call of ``GPTModel.forward``. For one
step of RMT each micro-batch is taken from exactly that call: the forward step runs, but the model's
``forward`` only records its arguments. The user's ``get_batch`` and dataset stay in use. Trees
carry tokens, positions, labels and the loss mask; an attention mask has to be the one that they
have anyway, and any other argument would be lost, so it is refused.
"""

import inspect
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.job.data_files import foreign_token_of_a_batch
from megatron_rmt.job.sample_parts import join_parts
from megatron_rmt.model.context_parallel import context_parallel_group
from megatron_rmt.rollout.trunk import UserBatch, document_starts

FIRST_STAGE = ("input_ids", "position_ids")
LAST_STAGE = ("labels", "loss_mask")

Arguments = dict[str, Any]


class BatchError(ValueError):
    """What the user's forward step gives the model cannot be trained on; one sentence with the
    remedy, the same on every rank."""


def take_batches(
    forward_step: Callable[..., Any],
    data_iterators: Sequence[Iterator[Any] | None],
    chunks: Sequence[torch.nn.Module],
    models: Sequence[torch.nn.Module],
    count: int,
    *,
    end_of_document: int,
    separate_documents: bool,
    token_problem: Callable[[UserBatch], str | None],
) -> list[UserBatch]:
    """Take the next ``count`` micro-batches of this data-parallel rank from its data iterators.

    Collective over all ranks: one all-reduce of an integer, and with pipeline stages another one
    and two broadcasts a micro-batch, after which every stage has the whole batch; context-parallel
    ranks, which may be given a part of each sample, gather it once a micro-batch. data_iterators,
    chunks, models: of each model chunk of this rank its iterator, the chunk, and the ``GPTModel``
    inside. end_of_document, separate_documents: as ``build_trunk`` takes them; an attention mask is
    compared with them. token_problem: what is wrong with the tokens of a batch, in a sentence
    (``foreign_token_problem``).

    Raises:
        BatchError: on all ranks, if on one of them the forward step does not call the model,
            gives it no labels or loss mask, another attention mask, foreign tokens, what a tree
            cannot carry, or parts of samples that are not Megatron's.
    """
    recorded = [
        _recorded(forward_step, *of_chunk, count)
        for of_chunk in zip(data_iterators, chunks, models, strict=True)
    ]
    problems = [_count_problem(len(own), count) for own in recorded]
    for chunk, calls in enumerate(recorded):
        held = _held_here(chunk, len(chunks))
        for own in calls:
            problems += [_stray_problem(own), _missing_problem(own, held)]
    exchanges = parallel_state.get_pipeline_model_parallel_world_size() > 1
    if exchanges or context_parallel_group() is not None:
        # Before the stages, and those that share a sample, exchange their parts.
        raise_together(problems)
    batches: list[UserBatch] = []
    if not any(problems):
        calls_of_batches = [*zip(*recorded, strict=True)]
        joined = [join_parts(_complete(calls)) for calls in calls_of_batches]
        batches = [of.batch for of in joined]
        problems += [of.problem for of in joined]
        if getattr(models[0], "position_embedding_type", None) == "rope":
            batches = [_rotated(batch, end_of_document, separate_documents) for batch in batches]
        for calls, batch, of in zip(calls_of_batches, batches, joined, strict=True):
            masks = [arguments.get("attention_mask") for arguments in calls]
            problems.append(_number_problem(batch))
            problems += [
                _mask_problem(mask, batch, of.columns, end_of_document, separate_documents)
                for mask in masks
            ]
            problems.append(token_problem(batch))
    raise_together(problems)
    return batches


def _recorded(
    forward_step: Callable[..., Any],
    data_iterator: Iterator[Any] | None,
    chunk: torch.nn.Module,
    model: torch.nn.Module,
    count: int,
) -> list[Arguments]:
    """What ``forward_step`` gives ``model``, the ``GPTModel`` inside ``chunk``, ``count`` times."""
    recorded: list[Arguments] = []
    signature = inspect.signature(type(model).forward)

    def record(*args: Any, **kwargs: Any) -> Tensor:
        recorded.append(_by_name(signature.bind(model, *args, **kwargs)))
        return torch.zeros(1, device=torch.cuda.current_device())

    own = vars(model).get("forward")
    model.forward = record
    try:
        for _ in range(count):
            forward_step(data_iterator, chunk)
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    return recorded


def _by_name(call: inspect.BoundArguments) -> Arguments:
    """The arguments of a call of ``forward``, without the model; those that a job's own class hands
    on as ``*args`` and ``**kwargs`` as ``GPTModel.forward`` names them."""
    names = list(inspect.signature(GPTModel.forward).parameters)
    arguments: Arguments = {}
    for index, parameter in enumerate(call.signature.parameters.values()):
        value = call.arguments.get(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= value or {}
        elif parameter.kind is parameter.VAR_POSITIONAL:
            arguments |= zip(names[index:], value or (), strict=False)
        elif index > 0:
            arguments[parameter.name] = value
    return arguments


def _count_problem(calls: int, count: int) -> str | None:
    if calls == count:
        return None
    return (
        f"forward_step_func called GPTModel.forward {calls} times for {count} micro-batches; RMT "
        "needs a forward step that calls the model once for each."
    )


def _stray_problem(arguments: Arguments) -> str | None:
    """What a tree cannot carry."""
    if arguments.get("packed_seq_params") is not None:
        return (
            "forward_step_func passes packed_seq_params; train with unpacked samples "
            "(--reset-attention-mask and --reset-position-ids keep documents apart)."
        )
    carried = (*FIRST_STAGE, *LAST_STAGE, "attention_mask")
    stray = [name for name in arguments if name not in carried and _is_given(arguments[name])]
    if not stray:
        return None
    return (
        f"forward_step_func gives GPTModel.forward {' and '.join(stray)}, which would be lost, as "
        f"RMT's rollouts and trees carry only {', '.join(carried)}; leave it out, or train "
        "without --rmt."
    )


def _is_given(value: Any) -> bool:
    """Whether this is more than a way to say nothing: None, False, or an empty dict."""
    return value is not None and not (isinstance(value, bool | dict) and not value)


def _held_here(chunk: int, chunks: int) -> list[tuple[tuple[str, ...], str]]:
    """What this stage must be given for its ``chunk`` of ``chunks``, and the name of the stage."""
    held = []
    if chunk == 0 and parallel_state.is_pipeline_first_stage():
        held.append((FIRST_STAGE, "first"))
    if chunk == chunks - 1 and parallel_state.is_pipeline_last_stage():
        held.append((LAST_STAGE, "last"))
    return held


def _missing_problem(
    arguments: Arguments, held: Sequence[tuple[tuple[str, ...], str]]
) -> str | None:
    for names, stage in held:
        missing = [name for name in names if not torch.is_tensor(arguments.get(name))]
        if missing:
            return (
                f"forward_step_func gives GPTModel.forward no {' and no '.join(missing)}; pass "
                f"{', '.join(f'{name}=' for name in missing)} on the {stage} pipeline stage."
            )
    return None


def _complete(calls: Sequence[Arguments]) -> UserBatch:
    """The micro-batch, of which each stage, and each of its chunks, may have been given a part."""
    fields: dict[str, Tensor] = {}
    own = {
        name: arguments[name].cpu()
        for chunk, arguments in enumerate(calls)
        for names, _ in _held_here(chunk, len(calls))
        for name in names
    }
    for names, source in ((FIRST_STAGE, 0), (LAST_STAGE, -1)):
        fields |= _from_stage({name: own[name] for name in names if name in own}, source)
    return UserBatch(
        tokens=fields["input_ids"].long(),
        position_ids=fields["position_ids"].long().expand_as(fields["input_ids"]),
        labels=fields["labels"].long(),
        loss_mask=fields["loss_mask"].float().view_as(fields["labels"]),
    )


def _rotated(batch: UserBatch, end_of_document: int, separate_documents: bool) -> UserBatch:
    """``batch`` with the positions that Megatron's rotary embedding has: it counts the rows of a
    sequence, whatever ``position_ids`` say. Only distances within a document matter, so that ids
    which count there are kept."""
    position_ids = batch.position_ids.clone()
    for tokens, own in zip(batch.tokens, position_ids, strict=True):
        counts = own.diff() == 1
        if separate_documents:
            counts[[start - 1 for start in document_starts(tokens, end_of_document)[1:]]] = True
        if not counts.all():
            own.copy_(torch.arange(len(own)))
    return replace(batch, position_ids=position_ids)


def _number_problem(batch: UserBatch) -> str | None:
    """Weights that no loss can be weighed by, and positions before the first."""
    weights = batch.loss_mask
    wrong = weights[~((weights >= 0) & weights.isfinite())]
    if len(wrong):
        return (
            f"forward_step_func gives GPTModel.forward a loss_mask that holds {float(wrong[0])}; "
            "pass finite weights, 0 or more."
        )
    lowest = int(batch.position_ids.min())
    if lowest < 0:
        return (
            f"forward_step_func gives GPTModel.forward position_ids from {lowest} on; count "
            "tokens from 0."
        )
    return None


def _mask_problem(
    mask: Any, batch: UserBatch, columns: Tensor, end_of_document: int, separate_documents: bool
) -> str | None:
    """How a user's attention mask differs from what trees do: causal, documents apart if asked.

    mask: True where a token is hidden, ``[1 or micro-batch, 1, columns, sequence]``, or None.
    columns: of the samples, those that this rank is given. Rows behind the last one with a loss,
    padding, influence nothing and are not compared.
    """
    if mask is None:
        return None
    size, length = batch.tokens.shape
    shapes = [(count, 1, len(columns), length) for count in (1, size)]
    if not torch.is_tensor(mask) or tuple(mask.shape) not in shapes:
        form = f"of shape {list(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
        return (
            f"forward_step_func gives GPTModel.forward an attention_mask {form}; pass one of shape "
            f"{list(shapes[-1])}, True where a token is hidden, or None."
        )
    for sample, (tokens, loss_mask) in enumerate(zip(batch.tokens, batch.loss_mask, strict=True)):
        trained = loss_mask.nonzero()
        rows = int(trained[-1]) + 1 if len(trained) else 0
        begins = torch.zeros(length, dtype=torch.int64)
        begins[document_starts(tokens, end_of_document) if separate_documents else [0]] = 1
        document = begins.cumsum(0).to(mask.device)
        places = (columns < rows).nonzero()[:, 0].to(mask.device)
        own, seen = columns.to(mask.device)[places], torch.arange(rows, device=mask.device)
        hidden = (document[own][:, None] != document[:rows]) | (seen > own[:, None])
        given = mask[min(sample, len(mask) - 1), 0, places].bool()
        differs = (given[:, :rows] != hidden).any(1) | (~given[:, rows:]).any(1)
        if differs.any():
            row = int(own[differs.nonzero()[0]])
            kind = "within each document" if separate_documents else "over the whole sample"
            return (
                "forward_step_func gives GPTModel.forward an attention_mask that is not causal "
                f"{kind} (sample {sample} of a micro-batch, row {row}), as RMT's rollouts and "
                "trees are; pass None, with --reset-attention-mask if documents, which end with "
                "the tokenizer's end-of-document token, shall not see each other."
            )
    return None


def raise_together(problems: Iterable[str | None]) -> None:
    """Raise the first problem that any rank has, on all ranks. Collective over all of them."""
    own = next((problem for problem in problems if problem is not None), None)
    if dist.get_world_size() == 1:
        if own is not None:
            raise BatchError(own)
        return
    found = torch.tensor(int(own is not None), device=torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if int(found) == 0:
        return
    of_ranks: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    raise BatchError(next(filter(None, of_ranks)))


def _from_stage(value: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
    """``value`` of pipeline stage ``stage`` on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    group = parallel_state.get_pipeline_model_parallel_group()
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[stage], group=group)
    return box[0]


def foreign_token_problem(batch: UserBatch, args: Namespace, vocab_size: int) -> str | None:
    """One sentence if a token up to the last one that counts is none of the vocabulary, as it may
    be read as text; padding behind it may be any row of the embedding."""
    rows = max(vocab_size, args.padded_vocab_size or 0)
    text = ((batch.loss_mask > 0) & (batch.labels >= 0)).flip(1).cummax(1).values.flip(1)
    limit = torch.where(text, vocab_size, rows)
    foreign = batch.tokens[(batch.tokens < 0) | (batch.tokens >= limit)]
    if not len(foreign):
        return None
    highest = int(foreign.max())
    token = highest if highest >= 0 else int(foreign.min())
    return foreign_token_of_a_batch(args, token, vocab_size)
