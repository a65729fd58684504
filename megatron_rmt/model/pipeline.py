"""A forward pass without gradient through all pipeline stages, outside Megatron's schedules.

With virtual pipeline stages a pass goes through the first chunks of all ranks, from the last rank
back to the first one, through the second chunks, and so on.
"""

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.model.gpt import Chunk, Model, all_rows, chunks_of
from megatron_rmt.model.visibility import Visibility

# FP8 products want rows in whole blocks: 32 for the MX recipe, 16 for the others.
FP8_ROWS, MXFP8_ROWS = 16, 32

# Hidden states on their way to the next stage; each is kept until it has arrived.
#
# They go by plain send and receive, for which NCCL makes a communicator of each two neighbours. On
# the pipeline's own, as Megatron sends in batches, they would wait in one queue with the broadcasts
# of ``begin_from_last_stage``: the last stage broadcasts a batch's tokens before it receives the
# next batch, the others only after they have sent that one, so that each waits for the other.
# What goes from the last stage back to the first has communicators of the pipeline's group: of two
# stages, each would wait in one queue for the other to receive before it receives itself.
Sends = deque[tuple[dist.Work, Tensor]]


def row_multiple(config: Any) -> int:
    """What the number of rows of a pass must be a multiple of.

    Rows are padded before they reach the model, so that nothing has to be wrapped around its linear
    layers for FP8, neither during rollouts nor after.
    """
    multiple = 1
    if config.fp8:
        multiple = MXFP8_ROWS if config.fp8_recipe == "mxfp8" else FP8_ROWS
    return multiple * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def forward_through_stages(
    model: Model,
    tokens: Tensor,
    visibility: Visibility,
    read: Callable[[Tensor, Tensor], Any],
    sends: Sends | None = None,
) -> Any:
    """One forward of packed ``tokens`` ``[rows]`` through all pipeline stages, without gradient.

    Returns ``read(hidden [rows, hidden], output weight [vocab/tp, hidden])`` on the last stage,
    None on the others. sends: if given, this stage does not wait until the next one has received.
    Collective over the tensor- and pipeline-parallel ranks of this model, and over the ranks that
    share its experts.
    """
    passing = forward_by_chunks(model, tokens, visibility, read, sends)
    while True:
        try:
            next(passing)
        except StopIteration as end:
            return end.value


def forward_by_chunks(
    model: Model,
    tokens: Tensor,
    visibility: Visibility,
    read: Callable[[Tensor, Tensor], Any],
    sends: Sends | None = None,
) -> Generator[None, None, Any]:
    """The same with a halt after each chunk of this rank but its last, in which it can work at
    another pass; all ranks must come to their chunks in one order."""
    config = model.config
    rows = -(-max(tokens.shape[0], 1) // row_multiple(config)) * row_multiple(config)
    padding = rows - tokens.shape[0]
    if padding:
        tokens = torch.cat([tokens, tokens.new_zeros(padding)])
        visibility.position_ids = torch.cat(
            [visibility.position_ids, visibility.position_ids.new_zeros(padding)]
        )
    chunks = chunks_of(model)

    def run(index: int) -> Any:
        return forward_chunk(model, chunks[index], tokens, visibility, read)

    return (yield from pass_by_chunks(model, rows, run, sends))


def forward_chunk(
    model: Model,
    chunk: Chunk,
    tokens: Tensor,
    visibility: Visibility,
    read: Callable[[Tensor, Tensor], Any],
) -> Any:
    """What ``chunk`` makes of ``tokens``, or of what it was given by the stage before: hidden
    states, or what ``read`` returns."""

    def read_hidden(*, hidden_states: Tensor, **_: Any) -> Any:
        hidden = full_hidden(hidden_states, model.config)[: visibility.tokens]
        return read(hidden, output_weight(model))

    return chunk(
        input_ids=tokens[None],
        position_ids=visibility.position_ids[None],
        attention_mask=None,
        packed_seq_params=visibility,
        output_processor=read_hidden,
    )


def pass_by_chunks(
    model: Model,
    rows: int,
    run: Callable[[int], Any],
    sends: Sends | None = None,
    kept: dict[int, Tensor] | None = None,
) -> Generator[None, None, Any]:
    """A pass of ``rows`` padded rows, of which ``run`` takes those that have come to this rank
    through its chunk of that number; halts and returns as ``forward_by_chunks``. kept: where rows
    arrive, by the chunk's number, so that they arrive there the next time as well."""
    config = model.config
    if config.sequence_parallel:
        rows //= config.tensor_model_parallel_size
    for index, chunk in enumerate(chunks_of(model)):
        if index:
            yield
        if not chunk.pre_process:
            received = None if kept is None else kept.get(index)
            if received is None or len(received) != rows:
                received = torch.empty(
                    (rows, 1, config.hidden_size),
                    dtype=config.pipeline_dtype or config.params_dtype,
                    device=next(chunk.parameters()).device,
                )
            if kept is not None:
                kept[index] = received
            wraps = parallel_state.is_pipeline_first_stage()
            source = parallel_state.get_pipeline_model_parallel_prev_rank()
            dist.recv(received, src=source, group=_group_of_messages(wraps))
            chunk.set_input_tensor([received])
        output = run(index)
        if chunk.post_process:
            return output
        _send(output.contiguous(), sends)
    return None


def _send(output: Tensor, sends: Sends | None) -> None:
    """Send hidden states to the next stage, from the last one to the first."""
    wraps = parallel_state.is_pipeline_last_stage()
    target = parallel_state.get_pipeline_model_parallel_next_rank()
    work = dist.isend(output, dst=target, group=_group_of_messages(wraps))
    if sends is None:
        work.wait()
    else:
        sends.append((work, output))
        finish_sends(sends, at_most=parallel_state.get_pipeline_model_parallel_world_size())


def _group_of_messages(wraps: bool) -> dist.ProcessGroup | None:
    """See ``Sends``."""
    return parallel_state.get_pipeline_model_parallel_group() if wraps else None


def finish_sends(sends: Sends, at_most: int = 0) -> None:
    """Wait until no more than ``at_most`` are on their way."""
    while len(sends) > at_most:
        sends.popleft()[0].wait()


def full_hidden(hidden: Tensor, config: Any) -> Tensor:
    """What the head reads, ``[rows, hidden]`` of all rows, from the decoder's output
    ``[rows (/tp under sequence parallel), 1, hidden]``. The head sums its gradient over the
    ranks."""
    hidden = all_rows(hidden, config)
    # MuP multiplies the scores, which are linear in the hidden states.
    multiplier = config.mup_output_mult if config.use_mup else 1.0
    return hidden[:, 0] if multiplier == 1.0 else hidden[:, 0] * multiplier


def output_weight(model: Model) -> Tensor:
    """The output layer's weight ``[vocab/tp, hidden]``, on the last stage."""
    last = chunks_of(model)[-1]
    if last.share_embeddings_and_output_weights:
        return last.shared_embedding_or_output_weight()
    return last.output_layer.weight


def from_last_stage(value: Tensor) -> Tensor:
    """``value`` of the last pipeline stage on every stage (in place)."""
    work = begin_from_last_stage(value)
    if work is not None:
        work.wait()
    return value


def begin_from_last_stage(value: Tensor) -> dist.Work | None:
    """The same, finished when the returned work (None with one stage) has been waited for."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return None
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    return dist.broadcast(value, src=source, group=group, async_op=True)
