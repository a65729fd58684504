"""From responses to advantages: what was read, whether it is true, how long the thought is."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rmt.algorithm.advantages import group_advantages
from megatron_rmt.algorithm.rewards import length_reward, total_reward
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.prompt.response import Response, read_response
from megatron_rmt.rollout.responses import Responses
from megatron_rmt.rollout.trunk import NO_LABEL, Trunk
from megatron_rmt.update.forward_step import Metric

# Tokens of the true continuation that a prediction is compared with.
CONTINUATION_TOKENS = 64


def continuation(
    training: MidTraining, trunk: Trunk, row: int, most: int = CONTINUATION_TOKENS
) -> list[int]:
    """At most ``most`` of the true next tokens from ``row`` on, to the end of the document."""
    limit = next(end for first, end in trunk.documents if first <= row < end)
    tokens = []
    for token in trunk.labels[row : min(limit, row + most)].tolist():
        if token == NO_LABEL or not training.bytes_of[token]:
            break
        tokens.append(token)
    return tokens


def read_responses(training: MidTraining, responses: Responses) -> list[list[Response]]:
    """What each response says, ``[positions][group]``."""
    return [
        [
            read_response(
                tokens[:length],
                training.template,
                training.bytes_of,
                training.stop,
                training.args.rmt_answer_tokens,
            )
            for tokens, length in zip(group, lengths, strict=True)
        ]
        for group, lengths in zip(
            responses.tokens.tolist(), responses.lengths.tolist(), strict=True
        )
    ]


def thought_lengths(read: Sequence[Sequence[Response]], group: int) -> Tensor:
    """``[positions, group]`` fp32, in tokens."""
    lengths = [[response.thought_length for response in own] for own in read]
    return torch.tensor(lengths, dtype=torch.float32).view(len(read), group)


def score(
    training: MidTraining, trunk: Trunk, rows: list[int], responses: Responses, step: Schedule
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """Rewards and advantages, each ``[positions, group]`` fp32, and what to report of them."""
    args = training.args
    positions, group = len(rows), step.group
    match = torch.zeros(positions, group)
    by_position = read_responses(training, responses)
    lengths = thought_lengths(by_position, group)
    read = [response for own in by_position for response in own]
    truncated = 0
    for index, row in enumerate(rows):
        truth = [training.bytes_of[token] for token in continuation(training, trunk, row)]
        boundaries = torch.tensor([len(text) for text in truth]).cumsum(0).tolist()
        for rollout, response in enumerate(by_position[index]):
            truncated += is_truncated(training, response, responses, index, rollout, step)
            if response.well_formed:
                match[index, rollout] = training.template.match(
                    response.prediction, b"".join(truth), boundaries
                )
    by_length = length_reward(lengths, step.budget, args.rmt_length_reward_maximum)
    weight = 0.0 if args.rmt_no_length_reward else args.rmt_length_reward_weight
    rewards = total_reward(match, by_length, weight)
    if step.warm_up:
        # The answers are given; what is drawn, the thoughts, learns to last until the budget.
        # Else models soon close every thought at once, as closing is all that they are shown.
        rewards = total_reward(torch.zeros_like(match), by_length, weight)
    advantages = group_advantages(rewards)

    count = float(positions * group)
    # In the warm-up the answers are given, so there is nothing to report of them.
    judged = 0.0 if step.warm_up else count
    # Nor of the thoughts, where they are taken from the text.
    thought = 0.0 if step.thought_from_text else count
    closed = torch.tensor([r.closed for r in read], dtype=torch.bool).view(positions, group)
    metrics = {
        "rmt match rate": (float(match.sum()) * (judged > 0), judged),
        "rmt well-formed rate": (sum(r.well_formed for r in read) * (judged > 0), judged),
        "rmt closed by itself": (float((closed & ~_forced(responses)).sum()), thought),
        "rmt thought length": (float(lengths.sum()) * (thought > 0), thought),
        "rmt length reward": (float(by_length.sum()) * (thought > 0), thought),
        "rmt reward": (float(rewards.sum()) * (judged > 0), judged),
        "rmt truncated": (float(truncated) * (judged > 0), judged),
        "rmt zero-variance groups": (
            float((advantages == 0).all(-1).sum()) * (judged > 0),
            0.0 if step.warm_up else float(positions),
        ),
        "rmt budget": (float(step.budget) * positions, float(positions)),
    }
    return rewards, advantages, metrics


def is_truncated(
    training: MidTraining,
    response: Response,
    responses: Responses,
    position: int,
    rollout: int,
    step: Schedule,
) -> bool:
    """Whether a bound ended the thought (given up or forced to close), or a boxed answer."""
    length = int(responses.lengths[position, rollout])
    drawn = responses.drawn[position, rollout, :length]
    if response.thought_length >= 2 * step.budget and not (response.closed and bool(drawn.all())):
        return True
    ended = length > 0 and int(responses.tokens[position, rollout, length - 1]) in training.stop
    return response.closed and not response.well_formed and not ended


def _forced(responses: Responses) -> Tensor:
    """``[positions, group]`` bool: some token of the response was written, not drawn."""
    columns = torch.arange(responses.tokens.shape[-1])
    real = columns < responses.lengths[..., None]
    return (real & ~responses.drawn).any(-1)


def checksum(keys: Sequence[tuple[int, int]], responses: Responses) -> Metric:
    """[sum, rollouts] of a 12-bit checksum of each rollout's position and tokens.

    Two layouts that train alike report the same average; sums stay exact in fp32 up to 4096
    rollouts.
    """
    total = count = 0
    for key, tokens, lengths in zip(keys, responses.tokens, responses.lengths, strict=True):
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            total += zlib.crc32(repr((key, row[:length].tolist())).encode()) & 0xFFF
            count += 1
    return float(total), float(count)
