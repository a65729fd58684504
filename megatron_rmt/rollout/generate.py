"""Budgeted generation of thoughts with the training model itself.

The trunk is read once (the same pass yields the entropies), the stems are read together against its
keys and values, then the branches of all positions of this rank are decoded together, one token for
every live rollout per step. Every forward goes through Megatron's own modules, so tensor and
pipeline parallelism, experts and FP8 come along; what differs from training is the visibility
(``kv_cache``). A rollout that has ended leaves the batch.

Positions whose keys and values do not fit beside the others come later: on a CPU in waves, each
decoded to its end; on a GPU where rollouts have ended, so that each row has a step of its own. What
the next pass is, stems or tokens, follows from flags that all ranks of a model have anyway.

The budget bounds the work: beyond ``2 * budget`` tokens of thought nothing is rewarded (paper,
length reward), so generation stops there, or, as an option, the end of thought is forced and the
answer still read.

Layouts: tensor- and pipeline-parallel ranks of one model work in lockstep. With pipeline stages the
positions are split into as many batches as there are stages, so that each stage has one to work at.
With virtual ones a batch halts behind each chunk of a rank, which works at the others meanwhile.
Ranks that share experts take part in each other's passes until the last of them has finished.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rmt.model.gpt import Model, Policy, chunks_of, without_sequence_parallel
from megatron_rmt.model.head import reduce_over_ranks
from megatron_rmt.model.pipeline import (
    Sends,
    begin_from_last_stage,
    finish_sends,
    forward_by_chunks,
    forward_chunk,
    output_weight,
    pass_by_chunks,
)
from megatron_rmt.model.visibility import Visibility
from megatron_rmt.prompt.prompt import Prompt, ResponseBound
from megatron_rmt.rollout.captured_layers import captured_layers
from megatron_rmt.rollout.kv_cache import (
    DecodeVisibility,
    IdleVisibility,
    KeyValueStore,
    LimitsVisibility,
    SharedTrunk,
    StemVisibility,
    TailCache,
    shared_trunks,
)
from megatron_rmt.rollout.late_read import LateRead
from megatron_rmt.rollout.live_rollouts import LiveRollouts, RolloutPosition, padded_rows
from megatron_rmt.rollout.memory import (
    CacheSize,
    equal_parts,
    key_value_bytes,
    positions_at_once,
    rollout_waves,
)
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.row_limits import RowLimits
from megatron_rmt.rollout.sampling import DecodeHead, RolloutSettings
from megatron_rmt.rollout.state_cache import state_bytes
from megatron_rmt.rollout.step_graph import StepGraph, is_recordable, record

# Tensor-parallel ranks ask each other with each so many tokens whether one was told to stop.
STEPS_TO_ASK = 8


def tells_limits(device: torch.device) -> bool:
    """Whether passes on ``device`` read from vectors on it what each row sees.

    Then no operation of a step depends on anything that the host knows. A CPU's own kernels want
    slices instead.
    """
    return device.type != "cpu"


class StoppedError(Exception):
    """A rank has been told to stop; the step is left to the run that resumes."""


@torch.no_grad()
def generate(
    policy: Policy,
    prompt: Prompt,
    store: KeyValueStore,
    positions: Sequence[RolloutPosition],
    how: RolloutSettings,
    stop: Callable[[], bool] | None = None,
) -> list[list[Rollout]]:
    """Draw ``how.group`` responses for each position, whose trunk is in ``store`` already.

    positions: rollouts of one sample must stand together; all are begun, or none. stop: whether
    this rank has been told to stop, asked for with each token on the last pipeline stage.

    Each draw is a pure function of (seed, iteration, sample, column, rollout, token), so it does
    not depend on the layout, the batch, or which rollouts have ended.

    Collective over the ranks of one model and over those that share its experts. Waits for the
    device once a token.

    Raises:
        ValueError: not even one position fits into ``how.kv_bytes``.
        StoppedError: a rank of the last pipeline stage has been told to stop; raised on all ranks
            of its model.
    """
    model = policy.model
    experts = expert_sharing_group(model)
    if not positions and experts is None:
        return []
    # How long a response may get decides how much memory its keys and values take.
    bound = prompt.bound(
        how.budget if how.thinks else 0,
        warm_up=how.writes_truth,
        truth_tokens=max((len(position.truth) for position in positions), default=0),
    )
    begun = [len(text) for position in positions for text in position.begun]
    if begun:
        bound = ResponseBound(thought=max(begun), close=0, answer=prompt.answer_tokens)
    stem = [*prompt.stem(how.budget), *([] if how.thinks else prompt.close)]
    tail_tokens = len(stem) + bound.tokens
    in_flight = parallel_state.get_pipeline_model_parallel_world_size()
    size = CacheSize(
        token_bytes=key_value_bytes(model),
        trunk_tokens=store.trunk_tokens,
        rows=len(positions) * how.group,
        rows_per_position=how.group,
        tail_tokens=tail_tokens,
        in_flight=in_flight,
        states=state_bytes(model),
    )
    by_limits = tells_limits(policy.device)
    at_once = positions_at_once(size, how.kv_bytes)
    if by_limits:
        # Of one batch for each pipeline stage, in which positions take the places of others.
        parts = equal_parts(len(positions), in_flight)
    else:
        # Of batches that are decoded to their ends, as many at a time as there are stages.
        parts = rollout_waves(len(positions), at_once, experts)
    head = None
    if chunks_of(model)[-1].post_process:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        most_rows = padded_rows(at_once * how.group) if by_limits else 0
        weight = output_weight(model)
        head = DecodeHead(weight, policy.vocab_size, tp_group, how, most_rows)
    records = by_limits and how.graph and is_recordable(model.config, policy.device)
    told = torch.zeros(1, dtype=torch.float64, device=policy.device)
    decoder = _Decoder(policy, store, stem, head, experts, stop, told)
    done: list[list[Rollout]] = []
    stopped = False
    for first in range(0, len(parts), in_flight):
        batches = [
            _Batch(
                # Ranks that share experts may go on: they need this one, even if it has stopped.
                LiveRollouts(
                    [] if stopped else positions[own],
                    prompt,
                    how,
                    bound,
                    policy.device,
                    by_limits,
                    at_once,
                ),
                TailCache(tail_tokens),
                graphs=[StepGraph(record) for _ in chunks_of(model)] if records else [],
            )
            for own in parts[first : first + in_flight]
        ]
        with without_sequence_parallel(model), captured_layers(model):
            decoder.run(batches)
        stopped = stopped or any(batch.stopped for batch in batches)
        done += [group for batch in batches for group in batch.live.responses()]
    if stopped:
        raise StoppedError
    return done


def expert_sharing_group(model: Model) -> ProcessGroup | None:
    """The ranks whose passes this rank must take part in because they share experts; None if these
    are only the ranks of its own model."""
    if not model.config.num_moe_experts:
        return None
    experts = parallel_state.get_expert_tensor_and_model_parallel_group()
    own = parallel_state.get_tensor_model_parallel_world_size()
    return experts if experts.size() > own else None


@dataclass
class _Batch:
    """Rollouts that are decoded together.

    drawn: tokens and log-probs ``[2, rows]`` fp64 of the newest step, of the last stage, and, where
    ranks may be told to stop, a third row, above 0 if one was; arriving: their way to this stage.
    stopped: all rollouts have been cut short for that. trunks, after: which trunk rows each row
    sees and the rotary position after its stem; None when rows have left. Where the device is told
    limits: spans, the first row of the trunk that each rollout sees, the row after the last, and
    the position after its stem, int64 ``[3, rollouts + 1]``; graphs, of its steps, one for each
    chunk of this rank, and received, where rows come to that; late, how the host reads what
    ``_write`` says; flags: that, where it has been called already. passing: its pass, halted behind
    a chunk; None where no pass is under way.
    """

    live: LiveRollouts
    tails: TailCache
    drawn: Tensor | None = None
    arriving: dist.Work | None = None
    stopped: bool = False
    trunks: list[SharedTrunk] | None = None
    after: Tensor | None = None
    spans: Tensor | None = None
    graphs: Sequence[StepGraph] = ()
    received: dict[int, Tensor] = field(default_factory=dict)
    late: LateRead = field(default_factory=LateRead)
    flags: Tensor | None = None
    passing: Iterator[None] | None = None


@dataclass
class _Decoder:
    """The passes of batches of rollouts; head is None on all stages but the last, stop where no
    rank can be told to. told: fp64 ``[1]``, above 0 once a rank has been."""

    policy: Policy
    store: KeyValueStore
    stem: Sequence[int]
    head: DecodeHead | None
    experts: ProcessGroup | None
    stop: Callable[[], bool] | None
    told: Tensor

    def run(self, batches: Sequence[_Batch]) -> None:
        """Decode ``batches`` to their ends, in turn, so that each pipeline stage has work."""
        sends: Sends = deque()
        for batch in batches:
            self._read_stems(batch, sends)
        running = deque(batches)
        while running:
            batch = running.popleft()
            if batch.passing is not None:
                _pass_a_chunk(batch)
            elif not self._take_tokens(batch):
                continue
            elif batch.live.begun:
                self._read_stems(batch, sends)
            else:
                self._decode(batch, sends)
            running.append(batch)
        finish_sends(sends)

    def _read_stems(self, batch: _Batch, sends: Sends) -> None:
        """Start the tails of positions that begin with the stem and draw the first tokens."""
        live = batch.live
        positions = [live.positions[index] for index in live.begun]
        length = len(self.stem)
        if not positions:
            self._idle(batch, sends)
            return
        self._ask_whether_to_stop(live)
        device = live.rows.device
        tokens = torch.tensor(self.stem, dtype=torch.int64, device=device)
        starts = torch.tensor([position.next_position for position in positions], device=device)
        if live.pads:
            visibility = self._stems_by_limits(batch)
        else:
            visibility = StemVisibility(
                tokens=length * len(positions),
                store=self.store,
                tails=batch.tails,
                trunks=shared_trunks(positions, device),
                group=live.how.group,
                last_rows=[position.limit - 1 for position in positions],
            )
        position_ids = (starts[:, None] + torch.arange(length, device=device)).flatten()
        visibility.use_position_ids(position_ids, self.policy.longest_position)

        def draw(hidden: Tensor, _: Tensor) -> Tensor:
            scores = self.head.scores(hidden.view(len(positions), length, -1)[:, -1])
            return self._draw(live, scores.repeat_interleave(live.how.group, dim=0))

        self._pass(batch, tokens.repeat(len(positions)), visibility, draw, sends)

    def _decode(self, batch: _Batch, sends: Sends) -> None:
        """One more token for every row of the batch."""
        live = batch.live
        if not live.rows_here:
            self._idle(batch, sends)
            return
        self._ask_whether_to_stop(live)
        if live.pads:
            self._decode_by_limits(batch, sends)
            return
        if batch.trunks is None:
            own = [live.positions[row // live.how.group] for row in live.rows_here]
            device = live.rows.device
            batch.trunks = shared_trunks(own, device)
            batch.after = torch.tensor([p.next_position + len(self.stem) for p in own]).to(device)
        visibility = DecodeVisibility(
            tokens=len(live.rows_here),
            store=self.store,
            tails=batch.tails,
            trunks=batch.trunks,
            column=len(self.stem) + live.step - 1,
        )
        visibility.use_position_ids(batch.after + (live.step - 1), self.policy.longest_position)

        self._pass(batch, live.newest, visibility, self._drawing(live), sends)

    def _decode_by_limits(self, batch: _Batch, sends: Sends) -> None:
        live = batch.live

        def decode_and_write() -> Tensor:
            self._pass(batch, live.newest, *self._step_by_limits(batch), sends)
            return self._write(batch)

        if not batch.graphs:
            self._pass(batch, live.newest, *self._step_by_limits(batch), sends)
        elif parallel_state.get_pipeline_model_parallel_world_size() == 1:
            batch.flags = batch.graphs[0].run(len(live.rows), decode_and_write)
        else:
            batch.passing = self._recorded_by_chunks(batch, sends)
            _pass_a_chunk(batch)

    def _recorded_by_chunks(self, batch: _Batch, sends: Sends) -> Iterator[None]:
        """A step of which all but the messages between stages, and writing, is recorded.

        What a stage has sent has left when the batch's tokens come back, before it is overwritten.
        """
        model, live = self.policy.model, batch.live
        rows, chunks = len(live.rows), chunks_of(model)

        def run(index: int) -> Tensor:
            def step() -> Tensor:
                visibility, draw = self._step_by_limits(batch)
                return forward_chunk(model, chunks[index], live.newest, visibility, draw)

            return batch.graphs[index].run(rows, step)

        drawn = yield from pass_by_chunks(model, rows, run, sends, batch.received)
        self._tell(batch, drawn)

    def _stems_by_limits(self, batch: _Batch) -> LimitsVisibility:
        live, length = batch.live, len(self.stem)
        device, group = live.rows.device, live.how.group
        if batch.spans is None:
            spans = [(p.first, p.limit, p.next_position + length) for p in live.positions]
            spans = torch.tensor(spans).t().to(device)
            # Nobody's rollout sees nothing, and is somewhere all the same.
            batch.spans = F.pad(spans.repeat_interleave(group, dim=1), (0, 1), value=1)
        first, limit, _ = batch.spans[:, live.begun.start * group : live.begun.stop * group : group]
        first, limit = torch.stack([first, limit]).repeat_interleave(length, dim=1)
        column = torch.arange(length, device=device).repeat(len(live.begun))
        tails = live.slots[live.written_next].view(-1, group)
        written = tails.repeat_interleave(length, dim=0).t()
        return LimitsVisibility(
            tokens=len(column),
            store=self.store,
            tails=batch.tails,
            limits=RowLimits.of(first, limit, written[0], column + 1),
            written=written,
            columns=column,
            count=live.nobodys_slot + 1,
        )

    def _step_by_limits(
        self, batch: _Batch
    ) -> tuple[LimitsVisibility, Callable[[Tensor, Tensor], Tensor]]:
        """What the rows of the next step see, and how they draw; the same operations each time."""
        live = batch.live
        first, limit, after = batch.spans[:, live.rows]
        newest = live.steps_of_rows() - 1
        column = newest + len(self.stem)
        # Rows that have ended read nothing.
        sees = (first, limit * live.alive, live.slots, (column + 1) * live.alive)
        visibility = LimitsVisibility(
            tokens=len(live.rows),
            store=self.store,
            tails=batch.tails,
            limits=RowLimits.of(*sees),
            written=live.slots[None],
            columns=column,
            count=live.nobodys_slot + 1,
        )
        visibility.use_position_ids(after + newest, self.policy.longest_position)
        return visibility, self._drawing(live)

    def _drawing(self, live: LiveRollouts) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda hidden, _: self._draw(live, self.head.scores(hidden))

    def _draw(self, live: LiveRollouts, scores: Tensor) -> Tensor:
        token, log_prob = self.head.draw(scores, live.draws())
        # Both in one message; ids are whole numbers far below 2^53.
        message = [token.double(), log_prob.double()]
        if self.stop is not None:
            message.append(self.told.expand(len(token)))
        return torch.stack(message)

    def _ask_whether_to_stop(self, live: LiveRollouts) -> None:
        """Let ``told`` say whether a tensor-parallel rank of the last stage has been told to."""
        if self.stop is None or self.head is None:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            if self.stop():
                self.told.fill_(1.0)
        elif live.step % STEPS_TO_ASK == 0:
            self.told.fill_(float(self.stop()))
            reduce_over_ranks(self.told, dist.ReduceOp.MAX, group)

    def _pass(
        self,
        batch: _Batch,
        tokens: Tensor,
        visibility: Visibility,
        draw: Callable[[Tensor, Tensor], Tensor],
        sends: Sends,
    ) -> None:
        """Begin to forward ``tokens``; the last stage draws and starts to tell the others."""
        batch.passing = self._by_chunks(batch, tokens, visibility, draw, sends)
        _pass_a_chunk(batch)

    def _by_chunks(
        self,
        batch: _Batch,
        tokens: Tensor,
        visibility: Visibility,
        draw: Callable[[Tensor, Tensor], Tensor],
        sends: Sends,
    ) -> Iterator[None]:
        model = self.policy.model
        drawn = yield from forward_by_chunks(model, tokens, visibility, draw, sends)
        self._tell(batch, drawn)

    def _tell(self, batch: _Batch, drawn: Tensor | None) -> None:
        """Start to tell the other stages what the last one, where it is not None, has drawn."""
        if drawn is None:
            live = batch.live
            shape = (2 if self.stop is None else 3, len(live.rows[live.written_next]))
            drawn = torch.empty(shape, dtype=torch.float64, device=live.rows.device)
            batch.arriving = None
        else:
            batch.arriving = begin_from_last_stage(drawn)
        batch.drawn = drawn

    def _write(self, batch: _Batch) -> Tensor:
        """Write the newest tokens; returns what the host must know, on the device: whether a rank
        has been told to stop, whether any goes on that shares the experts, which rows go on."""
        live = batch.live
        if live.rows_here:
            if self.head is None:
                batch.arriving = begin_from_last_stage(batch.drawn)
            if batch.arriving is not None:
                batch.arriving.wait()
            live.write(batch.drawn[0].long(), batch.drawn[1].float())
        told = anywhere = live.alive[:0]
        if self.stop is not None and live.rows_here:
            told = batch.drawn[2, :1] > 0
            live.alive &= ~told
        if self.experts is not None:
            anywhere = live.alive.any()[None].int()
            if live.waiting:
                anywhere = 1 - told.any()[None].int()
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.experts)
        return torch.cat([told, anywhere.bool(), live.alive])

    def _take_tokens(self, batch: _Batch) -> bool:
        """Have the newest tokens written; whether the batch goes on, here or on a rank that shares
        the experts."""
        live = batch.live
        newest = self._write(batch) if batch.flags is None else batch.flags
        batch.flags = None
        live.step += bool(live.rows_here)
        # The one wait for the device of this token; where it is late, for the one before. Ranks
        # that share experts must all hear of the end with the same pass.
        # At the bound all have ended, and the newest says whether for having been stopped.
        late = live.pads and self.experts is None and live.step < live.bound.tokens
        flags = batch.late(newest) if late else newest.tolist()
        if flags is None:
            return True
        told = int(self.stop is not None and bool(live.rows_here))
        anywhere = int(self.experts is not None)
        alive = flags[told + anywhere :]
        batch.stopped = batch.stopped or any(flags[:told])
        if batch.stopped:
            live.waiting.clear()
        if live.rows_here:
            staying = live.settle(alive)
            if staying is not None:
                batch.trunks = None
                batch.late.forget()
                if not live.pads:
                    batch.tails.keep(staying)
        return bool(live.begun) or any(flags[told:])

    def _idle(self, batch: _Batch, sends: Sends) -> None:
        """Take part in a pass of the other ranks that share the experts."""
        if self.experts is None:
            return
        policy = self.policy
        none = torch.empty(0, dtype=torch.int64, device=policy.device)
        visibility = IdleVisibility(tokens=0)
        visibility.use_position_ids(none, policy.longest_position)
        batch.passing = forward_by_chunks(
            policy.model, none, visibility, lambda hidden, _: hidden, sends
        )
        _pass_a_chunk(batch)


def _pass_a_chunk(batch: _Batch) -> None:
    """Let the batch's pass go on to its next halt, or to its end."""
    if next(batch.passing, batch) is batch:
        batch.passing = None
