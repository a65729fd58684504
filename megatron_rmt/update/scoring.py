"""From responses to advantages: what they are worth, and how each compares with its group."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rmt.algorithm.advantages import group_advantages
from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.algorithm.rewards import (
    Evidence,
    Reward,
    length_reward,
    total_reward,
)
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.agreement import NotFiniteError
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample

# Tokens of the true continuation that a prediction is compared with.
CONTINUATION_TOKENS = 64


def continuation(
    prompt: Prompt, sample: Sample, row: int, most: int = CONTINUATION_TOKENS
) -> list[int]:
    """At most ``most`` of the true next tokens from ``row`` on, to the end of the text."""
    tokens = sample.true_tokens(row, most)
    return [*itertools.takewhile(lambda own: prompt.bytes_of[own], tokens)]


def text_before(sample: Sample, row: int) -> list[int]:
    """The tokens of the document up to ``row`` and with it, without the prompt's preamble."""
    own = slice(sample.document_of(row)[0], row + 1)
    return sample.tokens[own][sample.columns[own] >= 0].tolist()


def bytes_before(prompt: Prompt, sample: Sample, row: int) -> bytes:
    """The text of ``text_before``; special tokens are no text."""
    return b"".join(prompt.bytes_of[token] for token in text_before(sample, row))


def gather_evidence(
    prompt: Prompt,
    reasoned: Sequence[ReasonedSample],
    schedule: Schedule,
    log_probs_of_truth: Callable[[], tuple[Tensor, Tensor]],
) -> Evidence:
    """What a reward sees of the positions of a micro-batch."""
    places = [(of.sample, position) for of in reasoned for position in of.positions]

    def in_bytes(tokens: Sequence[int]) -> list[bytes]:
        return [prompt.bytes_of[token] for token in tokens]

    def trunk(index: int) -> bytes:
        sample, position = places[index]
        return bytes_before(prompt, sample, position.row)

    lengths = [[own.thought_length for own in position.responses] for _, position in places]
    return Evidence(
        trunk=trunk,
        truth=[in_bytes(continuation(prompt, sample, position.row)) for sample, position in places],
        responses=[position.responses for _, position in places],
        thought_lengths=torch.tensor(lengths, dtype=torch.float32).view(-1, schedule.group),
        budget=torch.tensor([[float(position.budget)] for _, position in places]).view(-1, 1),
        boxed=prompt.template.answer == "boxed",
        log_probs_of_truth=log_probs_of_truth,
        target_tokens=prompt.target_tokens,
    )


def score(
    positions: Sequence[ChosenPosition],
    evidence: Evidence,
    reward: Reward,
    settings: Settings,
    *,
    warm_up: bool,
) -> None:
    """Give ``positions`` their rewards and advantages.

    Raises:
        DoorError: the reward is no tensor ``[positions, group]``.
        NotFiniteError: it is not finite; names the position.
    """
    by_length = length_reward(
        evidence.thought_lengths, evidence.budget, settings.length_reward_maximum
    )
    # In the warm-up answers are given; what is drawn, the thoughts, learns to last until the
    # budget. Else models soon close every thought at once, as closing is all that they are shown.
    earned = torch.zeros_like(by_length) if warm_up else reward(evidence)
    shape = list(earned.shape) if isinstance(earned, Tensor) else type(earned).__name__
    wanted = f"return a finite float tensor [positions, group], here {list(by_length.shape)}."
    if shape != list(by_length.shape):
        raise DoorError(f"--rmt-reward {settings.reward} returned {shape}; {wanted}")
    broken = (~earned.isfinite()).nonzero()
    if len(broken):
        position, response = broken[0].tolist()
        value = float(earned[position, response])
        raise NotFiniteError(f"--rmt-reward {settings.reward} returned {value}; {wanted}", position)
    weight = 0.0 if settings.no_length_reward else settings.length_reward_weight
    rewards = total_reward(earned, by_length, weight)
    advantages = group_advantages(rewards, standardise=not settings.no_advantage_std)
    differ = group_advantages(earned.to(rewards.dtype)).ne(0).any(1)
    for position, own, compared, differs in zip(
        positions, rewards.tolist(), advantages.tolist(), differ.tolist(), strict=True
    ):
        position.rewards, position.advantages, position.differs = own, compared, differs
