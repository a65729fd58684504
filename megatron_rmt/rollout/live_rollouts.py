"""Which rollouts of a batch still run, what they have written, and what they must write next."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rmt.algorithm.rng import uniforms
from megatron_rmt.prompt.prompt import Prompt, ResponseBound
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.sampling import RolloutSettings

# Dropping rows moves others into their places, so it waits until this share of rows has ended.
ENDED_SHARE_TO_COMPACT = 1 / 32


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
    """

    def __init__(
        self,
        positions: Sequence[RolloutPosition],
        prompt: Prompt,
        how: RolloutSettings,
        bound: ResponseBound,
        device: torch.device,
    ) -> None:
        self.positions, self.how, self.bound = positions, how, bound
        self.grammar, self.answer_tokens = prompt.grammar(device), prompt.answer_tokens
        self.step = 0
        group = how.group
        count = len(positions) * group

        def of_rollouts(values: Sequence[int]) -> Tensor:
            values = torch.tensor(values, dtype=torch.int64).to(device)
            return values.repeat_interleave(group)

        self._sample = of_rollouts([position.sample for position in positions])
        self._column = of_rollouts([position.column for position in positions])
        self._rollout = torch.arange(group, device=device).repeat(len(positions))
        # What is written by force: the end of thought, in the warm-up also the answer, or what a
        # response begins with.
        self._close_tokens = len(prompt.close)
        forced_of = [
            text
            for own in positions
            for text in own.begun or [(*prompt.close, *own.truth * how.writes_truth)] * group
        ]
        self._forced_length = torch.tensor(list(map(len, forced_of)), dtype=torch.int64).to(device)
        forced = torch.zeros(count, max([1, *map(len, forced_of)]), dtype=torch.int64)
        for row, tokens in enumerate(forced_of):
            forced[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        self._forced = forced.to(device)

        shape = (count, bound.tokens)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(shape, dtype=torch.bool, device=device)
        self._log_probs = torch.zeros(shape, device=device)
        self._lengths = torch.zeros(count, dtype=torch.int64, device=device)

        self.rows = torch.arange(count, device=device)
        self.rows_here = list(range(count))
        self.newest = torch.zeros(count, dtype=torch.int64, device=device)
        self.alive = torch.ones(count, dtype=torch.bool, device=device)
        start = self.grammar.start if how.thinks else self.grammar.after_thought
        self._state = torch.full((count,), start, dtype=torch.int64, device=device)
        self._thinking = self.grammar.thinking[self._state]
        # Tokens from the end of thought on: its last one, if it is not in the prompt, and answers.
        self._from_close = (~self._thinking).long()
        # Index of the next token to write by force, -1 while the policy draws.
        self._force_next = of_rollouts([0 if own.begun else -1 for own in positions])

    def draws(self) -> Tensor:
        """The uniform numbers ``[rows]`` of this step."""
        keys = (of[self.rows] for of in (self._sample, self._column, self._rollout))
        return uniforms(self.how.seed, self.how.iteration, *keys, self.step)

    def write(self, token: Tensor, log_prob: Tensor) -> None:
        """Append what the policy drew, ``[rows]`` each, or what is written by force instead."""
        rows, grammar, bound = self.rows, self.grammar, self.bound
        writes_truth = self.how.writes_truth
        # Ranks that do not draw alike may sum up to any id; the log-prob then says so.
        token = token.clamp(0, grammar.next_state.shape[1] - 1)
        # Which thoughts end here, though the policy did not close them.
        was_thinking = self._thinking
        drawing = self._force_next < 0
        open_at_bound = was_thinking & drawing
        if self.step < bound.thought:
            # Here only a response of the warm-up that would end without an answer gets its thought
            # closed.
            ends = grammar.done[grammar.next_state[self._state, token].long()]
            open_at_bound = open_at_bound & ends & writes_truth
        if bound.close:
            self._force_next = torch.where(open_at_bound, 0, self._force_next)
        elif self.step >= bound.thought:
            self.alive = self.alive & ~open_at_bound
        # What is written by force takes the place of what was drawn.
        forced_length = self._forced_length[rows]
        forcing = (self._force_next >= 0) & (self._force_next < forced_length)
        column = self._force_next.clamp(0, self._forced.shape[1] - 1)
        token = torch.where(forcing, self._forced[rows, column], token)

        # One column of every row, zero where the row has ended.
        drawn = self.alive & ~forcing
        self._tokens[rows, self.step] = torch.where(self.alive, token, 0)
        self._drawn[rows, self.step] = drawn
        self._log_probs[rows, self.step] = torch.where(drawn, log_prob, 0.0)
        self._lengths[rows] += self.alive

        # Where each row stands after this token, and whether it goes on.
        self._state = grammar.next_state[self._state, token].long()
        self._thinking = grammar.thinking[self._state]
        self._from_close = self._from_close + ~self._thinking
        self._force_next = torch.where(forcing, self._force_next + 1, self._force_next)
        if writes_truth:
            closed_itself = was_thinking & ~self._thinking & (self._force_next < 0)
            self._force_next = torch.where(closed_itself, self._close_tokens, self._force_next)
            self.alive = self.alive & (self._force_next < forced_length)
        else:
            complete = grammar.done[self._state] | (self._from_close > self.answer_tokens)
            self.alive = self.alive & ~complete
        self.step += 1
        if self.step == bound.tokens:
            self.alive = torch.zeros_like(self.alive)
        self.newest = token

    def settle(self, alive: Sequence[bool]) -> list[int] | None:
        """Drop ended rows if that is worth the moves, or if none is left.

        alive: ``self.alive``, read from the device. Returns, if any row leaves, the rows that stay,
        each at the place that it takes.
        """
        left = [row for row, goes_on in enumerate(alive) if goes_on]
        if left and len(left) > (1 - ENDED_SHARE_TO_COMPACT) * len(self.rows_here):
            return None
        samples = [self.positions[row // self.how.group].sample for row in self.rows_here]
        left = places(left, samples)
        self.rows_here = [self.rows_here[row] for row in left]
        staying = torch.tensor(left, dtype=torch.int64).to(self.rows.device, non_blocking=True)
        self.rows, self.alive = self.rows[staying], self.alive[staying]
        self._state, self._thinking = self._state[staying], self._thinking[staying]
        self._from_close = self._from_close[staying]
        self._force_next, self.newest = self._force_next[staying], self.newest[staying]
        return left

    def responses(self) -> list[list[Rollout]]:
        """All responses on the host, ``[positions][group]``."""
        lengths = self._lengths.tolist()
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
