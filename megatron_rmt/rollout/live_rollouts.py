"""Which rollouts of a batch still run, what they have written, and what they must write next."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rmt.algorithm.rng import uniforms
from megatron_rmt.prompt.prompt import Prompt, ResponseBound
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.sampling import RolloutSettings

# Dropping rows moves others into their places, so it waits until this share of rows has ended.
ENDED_SHARE_TO_COMPACT = 1 / 32
# On a GPU a batch has 8, 16, 32, ... rows: few shapes, each of which may be recorded as a graph.
LEAST_ROWS = 8


# The state of each row.
_OF_ROWS = ("alive", "newest", "_state", "_thinking", "_from_close", "_force_next")


def padded_rows(rows: int) -> int:
    """Rows of a batch on a GPU in which ``rows`` go on."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length()) if rows else 0


@dataclass(frozen=True)
class RolloutPosition:
    """One chosen position: where its context lies in the stored trunk, and the key of its draws.

    sample, column: global sample index and index in the sample (key of the random draws). first,
    limit: rows of the stored trunk that it sees. next_position: rotary position of its stem. truth:
    the token ids of the true answer, written only in the format warm-up. begun: what each response
    of the group begins with, in token ids, written instead of drawn; empty: the policy draws all.
    """

    sample: int
    column: int
    first: int
    limit: int
    next_position: int
    truth: tuple[int, ...] = ()
    begun: tuple[tuple[int, ...], ...] = ()


class LiveRollouts:
    """``how.group`` responses at each of ``positions`` while they are generated, a token at a time.

    bound: of their lengths; the end of thought is written at the bound of the thought where there
    is room for it.
    All rollouts of the batch are equally long. Those that have ended stay until enough of them can
    leave together. ``rows`` int64 indices of the batch's rollouts, ``alive`` ``[rows]`` bool, the
    response goes on, ``newest`` ``[rows]`` int64 tokens and the other state of the batch lie on
    ``device``; nothing here waits for the device but ``settle``.

    pads: rows are ``padded_rows``; the rows beyond ``rows_here`` are of a rollout that has ended,
    the last one, which is nobody's. Then all state keeps its place in memory until the number of
    padded rows changes, and no operation depends on how far the batch has come.
    """

    def __init__(
        self,
        positions: Sequence[RolloutPosition],
        prompt: Prompt,
        how: RolloutSettings,
        bound: ResponseBound,
        device: torch.device,
        pads: bool = False,
    ) -> None:
        self.pads = pads
        self.positions, self.how, self.bound = positions, how, bound
        self.grammar, self.answer_tokens = prompt.grammar(device), prompt.answer_tokens
        self.step = 0
        group = how.group
        self.count = count = len(positions) * group
        # Of the rollouts and, behind them, of nobody's.
        slots, rows = (count + 1, padded_rows(count)) if pads else (count, count)

        def of_rollouts(values: Sequence[int]) -> Tensor:
            values = torch.tensor(values, dtype=torch.int64).repeat_interleave(group)
            return F.pad(values, (0, slots - count)).to(device)

        # One column more than is ever used, as the host may be a step late to see the end.
        self._uniforms = uniforms(
            how.seed,
            how.iteration,
            of_rollouts([position.sample for position in positions])[:, None],
            of_rollouts([position.column for position in positions])[:, None],
            F.pad(torch.arange(group).repeat(len(positions)), (0, slots - count)).to(device)[
                :, None
            ],
            torch.arange(bound.tokens + 1, device=device),
        )
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        # What is written by force: the end of thought, in the warm-up also the answer, or what a
        # response begins with.
        self._close_tokens = len(prompt.close)
        forced_of = [
            text
            for own in positions
            for text in own.begun or [(*prompt.close, *own.truth * how.writes_truth)] * group
        ]
        lengths = torch.tensor(list(map(len, forced_of)), dtype=torch.int64)
        self._forced_length = F.pad(lengths, (0, slots - count)).to(device)
        forced = torch.zeros(count, max([1, *map(len, forced_of)]), dtype=torch.int64)
        for row, tokens in enumerate(forced_of):
            forced[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        self._forced = F.pad(forced, (0, 0, 0, slots - count)).to(device)

        shape = (slots, bound.tokens + 1)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(shape, dtype=torch.bool, device=device)
        self._log_probs = torch.zeros(shape, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=device)

        self.rows = torch.arange(rows, device=device).clamp(max=count)
        self.rows_here = list(range(count))
        self.newest = torch.zeros(rows, dtype=torch.int64, device=device)
        self.alive = self.rows < count
        start = self.grammar.start if how.thinks else self.grammar.after_thought
        self._state = torch.full((rows,), start, dtype=torch.int64, device=device)
        self._thinking = self.grammar.thinking[self._state]
        # Tokens from the end of thought on: its last one, if it is not in the prompt, and answers.
        self._from_close = (~self._thinking).long()
        # Index of the next token to write by force, -1 while the policy draws.
        begun = torch.tensor([0 if own.begun else -1 for own in positions])
        begun = F.pad(begun.repeat_interleave(group), (0, rows - count), value=-1)
        self._force_next = begun.to(device)

    def draws(self) -> Tensor:
        """The uniform numbers ``[rows]`` of this step."""
        return self._uniforms[self.rows, self._step]

    def steps_of_rows(self) -> Tensor:
        """How many tokens each row has written, int64 ``[rows]``."""
        return self._step.expand(len(self.rows))

    def write(self, token: Tensor, log_prob: Tensor) -> None:
        """Append what the policy drew, ``[rows]`` each, or what is written by force instead."""
        rows, step, grammar, bound = self.rows, self._step, self.grammar, self.bound
        writes_truth, alive, force_next = self.how.writes_truth, self.alive, self._force_next
        # Ranks that do not draw alike may sum up to any id; the log-prob then says so.
        token = token.clamp(0, grammar.next_state.shape[1] - 1)
        # Which thoughts end here, though the policy did not close them: at the bound, and in the
        # warm-up where a response would end without an answer.
        was_thinking = self._thinking
        ends_here = step >= bound.thought
        if writes_truth:
            ends_here = ends_here | grammar.done[grammar.next_state[self._state, token].long()]
        ends_here = was_thinking & (force_next < 0) & ends_here
        if bound.close:
            force_next = torch.where(ends_here, 0, force_next)
        else:
            alive = alive & ~(ends_here & (step >= bound.thought))
        # What is written by force takes the place of what was drawn.
        forced_length = self._forced_length[rows]
        forcing = (force_next >= 0) & (force_next < forced_length)
        column = force_next.clamp(0, self._forced.shape[1] - 1)
        token = torch.where(forcing, self._forced[rows, column], token)

        # One column of every row, zero where the row has ended.
        drawn = alive & ~forcing
        self._tokens[rows, step] = torch.where(alive, token, 0)
        self._drawn[rows, step] = drawn
        self._log_probs[rows, step] = torch.where(drawn, log_prob, 0.0)
        self._lengths[rows] += alive

        # Where each row stands after this token, and whether it goes on.
        state = grammar.next_state[self._state, token].long()
        thinking = grammar.thinking[state]
        from_close = self._from_close + ~thinking
        force_next = torch.where(forcing, force_next + 1, force_next)
        if writes_truth:
            closed_itself = was_thinking & ~thinking & (force_next < 0)
            force_next = torch.where(closed_itself, self._close_tokens, force_next)
            alive = alive & (force_next < forced_length)
        else:
            complete = grammar.done[state] | (from_close > self.answer_tokens)
            alive = alive & ~complete
        self._step += 1
        alive = alive & (self._step < bound.tokens)
        after = alive, token, state, thinking, from_close, force_next
        for name, value in zip(_OF_ROWS, after, strict=True):
            if self.pads:
                getattr(self, name).copy_(value)
            else:
                setattr(self, name, value)

    def settle(self, alive: Sequence[bool]) -> list[int] | None:
        """Drop ended rows if that is worth the moves, or if none is left.

        alive: ``self.alive``, read from the device. Returns, if any row leaves, the rows that stay,
        each at the place that it takes.
        """
        left = [row for row, goes_on in enumerate(alive) if goes_on]
        if self.pads:
            if padded_rows(len(left)) == len(self.rows):
                return None
        elif left and len(left) > (1 - ENDED_SHARE_TO_COMPACT) * len(self.rows_here):
            return None
        samples = [self.positions[row // self.how.group].sample for row in self.rows_here]
        left = places(left, samples)
        self.rows_here = [self.rows_here[row] for row in left]
        padding = padded_rows(len(left)) - len(left) if self.pads else 0
        staying = torch.tensor([*left, *left[:1] * padding], dtype=torch.int64)
        staying = staying.to(self.rows.device, non_blocking=True)
        for name in ("rows", *_OF_ROWS):
            setattr(self, name, getattr(self, name)[staying])
        if padding:
            self.rows[len(left) :] = self.count
            self.alive[len(left) :] = False
        return left

    def responses(self) -> list[list[Rollout]]:
        """All responses on the host, ``[positions][group]``."""
        lengths = self._lengths[: self.count].tolist()
        used = max(lengths, default=0)
        tokens, drawn, log_probs = (
            values[:, :used].cpu().numpy()
            for values in (self._tokens, self._drawn, self._log_probs)
        )
        rollouts = [
            Rollout(tokens[row, :length], drawn[row, :length], log_probs[row, :length])
            for row, length in enumerate(lengths)
        ]
        group = self.how.group
        return [rollouts[first : first + group] for first in range(0, len(rollouts), group)]


def places(rows: Sequence[int], samples: Sequence[int]) -> list[int]:
    """``rows`` (ascending) in an order in which most of them keep their place.

    Rows of one sample stay together: ``samples`` names that of each row of the batch.
    """
    order: list[int] = []
    for _, own in itertools.groupby(rows, key=lambda row: samples[row]):
        own = [*own]
        free = range(len(order), len(order) + len(own))
        movers = (row for row in own if row not in free)
        stays = set(own).intersection(free)
        order += [place if place in stays else next(movers) for place in free]
    return order
