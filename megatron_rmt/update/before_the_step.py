"""What must be true of a step's positions before it is taken: numbers are finite, and the ranks of
one model have chosen, drawn and rewarded alike, which they do by construction."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.agreement import Copy, NotFiniteError, RanksDifferError, digest, first_rank
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample


def chosen_alike(reasoned: Sequence[ReasonedSample]) -> list[Copy]:
    """The chosen positions and their budgets, for comparison over the ranks of one model."""
    return _of_model("chosen positions", reasoned, lambda own: [own.row, own.budget])


def drawn_alike(reasoned: Sequence[ReasonedSample]) -> list[Copy]:
    """The drawn tokens, likewise."""

    def tokens(position: ChosenPosition) -> list[object]:
        return [of for own in position.rollouts for of in (len(own), own.tokens.tobytes())]

    return _of_model("drawn tokens", reasoned, tokens)


def rewarded_alike(reasoned: Sequence[ReasonedSample]) -> list[Copy]:
    """The rewards, likewise."""
    return _of_model("rewards", reasoned, lambda position: position.rewards)


def _of_model(
    what: str,
    reasoned: Sequence[ReasonedSample],
    values: Callable[[ChosenPosition], Sequence[object]],
) -> list[Copy]:
    """Nothing where a model and its samples are one rank's."""
    groups = {
        "tensor and pipeline parallel": parallel_state.get_model_parallel_group(),
        "context parallel": parallel_state.get_context_parallel_group(),
    }
    shared = {how: group for how, group in groups.items() if dist.get_world_size(group) > 1}
    if not shared:
        return []
    found = digest(*(value for of in reasoned for own in of.positions for value in values(own)))
    return [Copy(f"{what}, over {how}", found, first_rank(of)) for how, of in shared.items()]


def entropy_problems(trunk: Sequence[Sample], entropies: Tensor) -> list[Exception]:
    """The entropies ``[rows]`` of labelled rows that are not finite."""
    labelled = [sample.labelled for sample in trunk]
    places = zip(trunk, labelled, entropies.split([*map(len, trunk)]), strict=True)
    broken = [
        (sample, row)
        for sample, counts, own in places
        for row in (counts & ~own.isfinite()).nonzero()[:, 0].tolist()
    ]
    if not broken:
        return []
    sample, row = broken[0]
    first = sample.place(row)
    return [NotFiniteError(f"{len(broken)} entropies are not finite, the first of {first}")]


def draw_problems(reasoned: Sequence[ReasonedSample]) -> list[Exception]:
    """Log-probs of drawn tokens that are not finite; +inf says that ranks do not draw alike."""
    return _problems(reasoned, _of_draws)


def reward_problems(reasoned: Sequence[ReasonedSample]) -> list[Exception]:
    """Rewards and advantages that are not finite."""
    return _problems(reasoned, _of_rewards)


def _problems(
    reasoned: Sequence[ReasonedSample],
    find: Callable[[Sample, ChosenPosition], Iterator[Exception]],
) -> list[Exception]:
    places = ((of.sample, position) for of in reasoned for position in of.positions)
    return [problem for place in places for problem in find(*place)]


def _of_draws(sample: Sample, position: ChosenPosition) -> Iterator[Exception]:
    for rollout in position.rollouts:
        log_probs = rollout.log_probs[rollout.drawn]
        if (log_probs == math.inf).any():
            ranks = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
            yield RanksDifferError(
                f"tensor-parallel ranks {', '.join(map(str, ranks))} draw different tokens at "
                f"{sample.place(position.row)}; no step was taken: pass all of them one --seed and "
                "--rmt-seed, and restart from the last checkpoint."
            )
        elif not np.isfinite(log_probs).all():
            place = sample.place(position.row)
            yield NotFiniteError(f"the log-prob of a token drawn at {place} is not finite")


def _of_rewards(sample: Sample, position: ChosenPosition) -> Iterator[Exception]:
    for name, values in (("reward", position.rewards), ("advantage", position.advantages)):
        if not all(map(math.isfinite, values)):
            place = sample.place(position.row)
            yield NotFiniteError(f"the {name} of a response at {place} is not finite")
