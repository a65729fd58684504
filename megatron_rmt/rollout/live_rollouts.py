"""Which rollouts of a batch still run, what they have written, and what they must write next."""

import itertools
import math
from collections import deque
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
# While stems are read no rollout goes on, so positions wait until this share of those that can be
# decoded at a time fits.
SHARE_TO_BEGIN = 1 / 8


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
    Rollouts that have ended stay until enough of them can leave together. ``rows`` int64 indices of
    the batch's rollouts, ``slots`` int64 the place of each in what is held for those that live,
    ``alive`` ``[rows]`` bool, the response goes on, ``newest`` ``[rows]`` int64 tokens and the
    other state of the batch lie on ``device``; nothing here waits for the device but ``settle``.

    pads: rows are ``padded_rows``; the rows beyond ``rows_here`` are of a rollout that has ended,
    the last one, which is nobody's, in the last slot. Then all state keeps its place in memory
    until the number of padded rows changes, and no operation depends on how far the batch has come.

    at_once: with ``pads``, positions that can be decoded at a time; the others are ``waiting`` and
    begin, in their order, in the slots of rollouts that have ended. Else all begin together and are
    equally long. ``begun``: those whose stems come next; their rows are ``written_next``, else all.
    """

    def __init__(
        self,
        positions: Sequence[RolloutPosition],
        prompt: Prompt,
        how: RolloutSettings,
        bound: ResponseBound,
        device: torch.device,
        pads: bool = False,
        at_once: int | None = None,
    ) -> None:
        self.pads = pads
        self.positions, self.how, self.bound = positions, how, bound
        self.grammar, self.answer_tokens = prompt.grammar(device), prompt.answer_tokens
        # Tokens that the rollouts which began last have written.
        self.step = 0
        self.count = count = len(positions) * how.group
        self.waiting = deque(range(len(positions)))
        self.at_once = min(len(positions), at_once or len(positions))
        # Of the rollouts and, behind them, of nobody's.
        rollouts, self.nobodys_slot = count + pads, self.at_once * how.group

        # What is written by force: the end of thought, in the warm-up also the answer, or what a
        # response begins with.
        self._close_tokens = len(prompt.close)
        forced_of = [
            text
            for own in positions
            for text in own.begun or [(*prompt.close, *own.truth * how.writes_truth)] * how.group
        ]
        lengths = torch.tensor(list(map(len, forced_of)), dtype=torch.int64)
        self._forced_length = F.pad(lengths, (0, rollouts - count)).to(device)
        forced = torch.zeros(count, max([1, *map(len, forced_of)]), dtype=torch.int64)
        for row, tokens in enumerate(forced_of):
            forced[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        self._forced = F.pad(forced, (0, 0, 0, rollouts - count)).to(device)

        # One column more than is ever used, as the host may be a step late to see the end.
        columns = bound.tokens + 1
        numbers = self.nobodys_slot + pads, columns
        self._uniforms = torch.zeros(numbers, dtype=torch.float64, device=device)
        shape = rollouts, columns
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(shape, dtype=torch.bool, device=device)
        self._log_probs = torch.zeros(shape, device=device)
        self._lengths = torch.zeros(rollouts, dtype=torch.int64, device=device)

        # Of a row that begins, and of nobody's.
        begun = 0 if any(own.begun for own in positions) else -1
        start = self.grammar.start if how.thinks else self.grammar.after_thought
        state = torch.full((2,), start, dtype=torch.int64, device=device)
        thinking = self.grammar.thinking[state]
        self._at_first = {
            "alive": torch.tensor([True, False], device=device),
            "newest": torch.zeros_like(state),
            "_state": state,
            "_thinking": thinking,
            # Tokens from the end of thought on: its last one, if not in the prompt, and answers.
            "_from_close": (~thinking).long(),
            # Index of the next token to write by force, -1 while the policy draws.
            "_force_next": torch.full_like(state, begun),
        }
        self.rows_here: list[int] = []
        self._slots_here: list[int] = []
        self.rows = self.slots = state[:0]
        for name, values in self._at_first.items():
            setattr(self, name, values[:0])
        self.begun, self.written_next = range(0), slice(None)
        self._arrange([], self.at_once)

    def draws(self) -> Tensor:
        """The uniform numbers of the next token of the rows that are ``written_next``."""
        at = self.written_next
        return self._uniforms[self.slots[at], self._lengths[self.rows[at]]]

    def steps_of_rows(self) -> Tensor:
        """How many tokens each row has written, int64 ``[rows]``."""
        return self._lengths[self.rows]

    def write(self, token: Tensor, log_prob: Tensor) -> None:
        """Append what the policy drew, or what is written by force instead, to the rows that are
        ``written_next``, ``[rows]`` each."""
        grammar, bound, writes_truth = self.grammar, self.bound, self.how.writes_truth
        at = self.written_next
        rows, alive, newest, state = self.rows[at], self.alive[at], self.newest[at], self._state[at]
        thinking, from_close = self._thinking[at], self._from_close[at]
        force_next, step = self._force_next[at], self._lengths[rows]
        # Ranks that do not draw alike may sum up to any id; the log-prob then says so.
        token = token.clamp(0, grammar.next_state.shape[1] - 1)
        # Which thoughts end here, though the policy did not close them: at the bound, and in the
        # warm-up where a response would end without an answer.
        at_bound = step >= bound.thought
        ends_here = at_bound
        if writes_truth:
            ends_here = ends_here | grammar.done[grammar.next_state[state, token].long()]
        ends_here = thinking & (force_next < 0) & ends_here
        if bound.close:
            force_next.masked_fill_(ends_here, 0)
        else:
            alive &= ~(ends_here & at_bound)
        # What is written by force takes the place of what was drawn.
        forced_length = self._forced_length[rows]
        forcing = (force_next >= 0) & (force_next < forced_length)
        column = force_next.clamp(0, self._forced.shape[1] - 1)
        torch.where(forcing, self._forced[rows, column], token, out=newest)

        # One column of every row, zero where the row has ended.
        drawn = alive & ~forcing
        self._tokens[rows, step] = torch.where(alive, newest, 0)
        self._drawn[rows, step] = drawn
        self._log_probs[rows, step] = torch.where(drawn, log_prob, 0.0)
        self._lengths[rows] = step + alive

        # Where each row stands after this token, and whether it goes on.
        state.copy_(grammar.next_state[state, newest])
        thinks_on = grammar.thinking[state]
        from_close += ~thinks_on
        force_next += forcing
        if writes_truth:
            closed_itself = thinking & ~thinks_on & (force_next < 0)
            force_next.masked_fill_(closed_itself, self._close_tokens)
            alive &= force_next < forced_length
        else:
            alive &= ~(grammar.done[state] | (from_close > self.answer_tokens))
        thinking.copy_(thinks_on)
        alive &= step + 1 < bound.tokens
        self.begun, self.written_next = range(0), slice(None)

    def settle(self, alive: Sequence[bool]) -> list[int] | None:
        """Drop ended rows if that is worth the moves, or if none is left, and let positions that
        wait begin if enough of them fit.

        alive: ``self.alive``, read from the device. Returns, if any row leaves or begins, the rows
        that stay, each at the place that it takes.
        """
        left = [row for row, goes_on in enumerate(alive) if goes_on]
        fit = min(self.at_once - math.ceil(len(left) / self.how.group), len(self.waiting))
        begin = fit if fit >= min(self.at_once * SHARE_TO_BEGIN, len(self.waiting)) else 0
        if self.pads:
            # Rows that will be filled again are kept, and with them what was recorded.
            if not begin and (self.waiting or padded_rows(len(left)) == len(self.rows)):
                return None
        else:
            if left and len(left) > (1 - ENDED_SHARE_TO_COMPACT) * len(self.rows_here):
                return None
            samples = [self.positions[row // self.how.group].sample for row in self.rows_here]
            left = places(left, samples)
        self._arrange(left, begin)
        return left

    def _arrange(self, left: Sequence[int], begin: int) -> None:
        """Let the rows ``left``, in this order, and behind them those of the next ``begin``
        positions be all. As positions begin in their order, those of a sample stay together."""
        group = self.how.group
        slots = [self._slots_here[row] for row in left]
        free = sorted(set(range(self.nobodys_slot)).difference(slots))
        begun = [self.waiting.popleft() for _ in range(begin)]
        new = [position * group + rollout for position in begun for rollout in range(group)]
        self.rows_here = [*(self.rows_here[row] for row in left), *new]
        self._slots_here = [*slots, *free[: len(new)]]
        padding = padded_rows(len(self.rows_here)) - len(self.rows_here) if self.pads else 0
        held = len(self.rows)
        table = [
            [*left, *[held] * len(new), *[held + 1] * padding],
            [*self.rows_here, *[self.count] * padding],
            [*self._slots_here, *[self.nobodys_slot] * padding],
        ]
        device = self.rows.device
        source, rows, slots = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
        for name, values in self._at_first.items():
            self._put(name, torch.cat([getattr(self, name), values])[source])
        self._put("rows", rows)
        self._put("slots", slots)
        if new:
            self.step = 0
            self.begun = range(begun[0], begun[-1] + 1)
            self.written_next = slice(len(left), len(left) + len(new))
            self._uniforms[self.slots[self.written_next]] = self._numbers(self.begun)

    def _put(self, name: str, values: Tensor) -> None:
        held = getattr(self, name)
        if len(held) == len(values):
            held.copy_(values)
        else:
            setattr(self, name, values)

    def _numbers(self, positions: range) -> Tensor:
        """The uniform numbers of all tokens of the rollouts of ``positions``."""
        (_, columns), device = self._uniforms.shape, self._uniforms.device
        own = [self.positions[index] for index in positions]
        keys = [
            (position.sample, position.column, rollout)
            for position in own
            for rollout in range(self.how.group)
        ]
        samples, of_samples, rollouts = torch.tensor(keys).t()[..., None].to(device)
        return uniforms(
            self.how.seed,
            self.how.iteration,
            samples,
            of_samples,
            rollouts,
            torch.arange(columns, device=device),
        )

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
