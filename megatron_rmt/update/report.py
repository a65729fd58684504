"""What a step reports of its micro-batches: metrics, each ``[sum, count]``.

Megatron adds both over micro-batches and data-parallel ranks and divides, so every micro-batch has
the same keys; 0 of 0 stays out of the logs.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.algorithm.rewards import Evidence, Metric, length_reward, match
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.prefill import EntropyHistogram
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, Tree, chosen_rows

TIERS = ("easy", "medium", "hard")


def batch_metrics(
    settings: Settings, found: EntropyHistogram, thresholds: Sequence[float]
) -> dict[str, Metric]:
    """Of the entropies of the whole global batch, and the tiers' lower ends that came of them."""
    metrics = {f"rmt entropy p{p}": (of, 1.0) for p, of in found.percentiles().items()}
    if settings.threshold_quantiles is not None:
        lower_ends = zip(TIERS, thresholds, strict=True)
        metrics |= {f"rmt threshold {name}": (end, 1.0) for name, end in lower_ends}
    return metrics


def trunk_metrics(
    reasoned: Sequence[ReasonedSample],
    entropies: Tensor,
    predictions: Tensor,
    tier: Tensor,
    schedule: Schedule,
    ceiling: float | None,
) -> dict[str, Metric]:
    """Of what the trunk's pass found, all ``[rows]``, and of the tiers that were chosen. ceiling:
    ``--rmt-entropy-ceiling``."""
    labelled = torch.cat([of.sample.labelled for of in reasoned])
    labels = torch.cat([of.sample.labels for of in reasoned])
    rows = chosen_rows(reasoned)
    count, chosen = float(labelled.sum()), tier[rows]
    right = (predictions == labels) & labelled
    metrics = {
        "rmt entropy": (float(entropies[labelled].sum()), count),
        "rmt next-token accuracy": (float(right.sum()), count),
        "rmt entropy of chosen": (float(entropies[rows].sum()), float(len(rows))),
    }
    if ceiling is not None:
        above = float((entropies[labelled] > ceiling).sum())
        metrics["rmt above entropy ceiling"] = (above, count)
    for number, name in enumerate(TIERS):
        metrics[f"rmt chosen {name}"] = (float((chosen == number).sum()), float(len(rows)))
        # Without a curriculum no share is asked for.
        probabilities = schedule.probabilities
        asked = (0.0, 0.0) if probabilities is None else (probabilities[number], 1.0)
        metrics[f"rmt asked {name}"] = asked
    return metrics


def answer_metrics(reasoned: Sequence[ReasonedSample], prompt: Prompt) -> dict[str, Metric]:
    """The share of the text's next tokens that are never asked for, as no box holds them."""
    if prompt.template.answer != "boxed":
        return {}
    labels = torch.cat([of.sample.labels[of.sample.labelled] for of in reasoned])
    text = prompt.has_bytes[labels]
    left_out = text & ~prompt.answerable[labels]
    return {"rmt unanswerable": (float(left_out.sum()), float(text.sum()))}


def source_metrics(reasoned: Sequence[ReasonedSample], settings: Settings) -> dict[str, Metric]:
    """The share of the samples that train on next tokens alone, where there may be some."""
    if settings.skip_sources is None:
        return {}
    plain = sum(of.sample.plain for of in reasoned)
    return {"rmt skipped samples": (float(plain), float(len(reasoned)))}


def response_metrics(
    positions: Sequence[ChosenPosition],
    evidence: Evidence,
    settings: Settings,
    schedule: Schedule,
    prompt: Prompt,
) -> dict[str, Metric]:
    """Of responses that have been scored."""
    places = [
        (rollout, response, position.budget)
        for position in positions
        for rollout, response in zip(position.rollouts, position.responses, strict=True)
    ]
    by_length = length_reward(
        evidence.thought_lengths, evidence.budget, settings.length_reward_maximum
    )
    rewards = torch.tensor([position.rewards for position in positions])
    # In the warm-up the answers are given, so there is nothing to report of them, nor of the
    # thoughts where they are taken from the text.
    judged = 0.0 if schedule.warm_up else float(len(places))
    answered = judged if prompt.answer_tokens else 0.0
    thought = 0.0 if schedule.thought_from_text else float(len(places))
    flat = sum(not any(position.advantages) for position in positions)
    sums = {
        "rmt match rate": (match(evidence).sum(), answered),
        "rmt well-formed rate": (sum(own.well_formed for _, own, _ in places), judged),
        "rmt closed by itself": (
            sum(own.closed and bool(rollout.drawn.all()) for rollout, own, _ in places),
            thought,
        ),
        "rmt thought length": (evidence.thought_lengths.sum(), thought),
        "rmt length reward": (by_length.sum(), thought),
        "rmt reward": (rewards.sum(), judged),
        "rmt truncated": (
            sum(is_truncated(*place, prompt.stop) for place in places),
            judged,
        ),
        "rmt zero-variance groups": (flat, 0.0 if schedule.warm_up else float(len(positions))),
        "rmt budget": (sum(own.budget for own in positions), float(len(positions))),
    }
    metrics = {name: (float(of) if count else 0.0, count) for name, (of, count) in sums.items()}
    taken = metrics.keys() & evidence.reports.keys()
    if taken:
        raise DoorError(
            f"--rmt-reward {settings.reward} reports {', '.join(sorted(taken))}, which RMT logs by "
            "itself; choose another name."
        )
    return metrics | evidence.reports


def is_truncated(rollout: Rollout, response: Response, budget: int, stop: Sequence[int]) -> bool:
    """Whether a bound ended the thought (given up or forced to close), or a boxed answer."""
    closed_by_itself = response.closed and bool(rollout.drawn.all())
    if response.thought_length >= 2 * budget and not closed_by_itself:
        return True
    ended = len(rollout) > 0 and int(rollout.tokens[-1]) in stop
    return response.closed and not response.well_formed and not ended


def checksum(reasoned: Sequence[ReasonedSample]) -> Metric:
    """[sum, rollouts] of a 12-bit checksum of each rollout's position and tokens.

    Two layouts that train alike report the same average; sums stay exact in fp32 up to 4096
    rollouts.
    """
    total = count = 0
    for of in reasoned:
        for position in of.positions:
            key = (of.sample.index, int(of.sample.columns[position.row]))
            for rollout in position.rollouts:
                total += zlib.crc32(repr((key, rollout.tokens.tolist())).encode()) & 0xFFF
                count += 1
    return float(total), float(count)


def size_metrics(
    reasoned: Sequence[ReasonedSample],
    tree: Tree,
    part: Tree,
    max_tokens: int | None,
    slots: float,
) -> dict[str, Metric]:
    """Tokens of the whole global batch, the share of the rows that are padding, and the tokens of
    ``tree`` above ``max_tokens``. part: what this rank holds of it, padded. slots: micro-batches of
    the global batch, of which context-parallel ranks report the same."""
    rows, tokens = float(part.tokens.shape[0]), float(tree.visibility.tokens)
    counts = {
        "trunk": sum(len(of.sample) for of in reasoned),
        "stem": sum(len(own.stem) for of in reasoned for own in of.positions),
        "branch": sum(max(0, len(own) - 1) for of in reasoned for own in of.rollouts),
    }
    excess = 0.0 if max_tokens is None else max(0.0, tokens - max_tokens)
    return {
        **{f"rmt {name} tokens": (float(count), 1 / slots) for name, count in counts.items()},
        # A micro-batch that packing left empty has one row of no sample.
        "rmt padding": (rows - (part.visibility.tokens if reasoned else 0), rows),
        "rmt tokens above limit": (excess, 1.0),
    }
