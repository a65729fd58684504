"""What is looked at before a step is taken: every number, and what ranks of one model share."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_rmt.update import before_the_step
from megatron_rmt.update.agreement import NotFiniteError, RanksDifferError
from megatron_rmt.update.before_the_step import (
    chosen_alike,
    draw_problems,
    drawn_alike,
    entropy_problems,
    reward_problems,
    rewarded_alike,
)
from megatron_rmt.update.tree import ChosenPosition
from tests.tiny_step import scored, tiny_trunk

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("single_process_megatron")]

BROKEN = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("value", BROKEN)
def test_entropies_of_rows_that_count_must_be_finite(value: float):
    samples = tiny_trunk().split()
    entropies = torch.ones(sum(map(len, samples)))
    assert entropy_problems(samples, entropies) == []
    counts = torch.cat([sample.labelled for sample in samples])
    entropies[~counts] = value
    assert entropy_problems(samples, entropies) == []
    # Of the second sample.
    row = int(samples[1].labelled.nonzero()[3])
    entropies[len(samples[0]) + row] = value
    (problem,) = entropy_problems(samples, entropies)
    place = samples[1].place(row)
    assert str(problem) == f"1 entropies are not finite, the first of {place}"
    entropies[:] = value
    assert str(entropy_problems(samples, entropies)[0]).startswith(f"{int(counts.sum())} entropies")


@pytest.mark.parametrize("value", BROKEN)
def test_log_probs_of_drawn_tokens_must_be_finite(value: float):
    reasoned = scored().reasoned
    assert draw_problems(reasoned) == []
    forced = reasoned[0].positions[1].rollouts[1]
    forced.log_probs[~forced.drawn] = value
    assert draw_problems(reasoned) == []
    forced.log_probs[0] = value
    (problem,) = draw_problems(reasoned)
    place = reasoned[0].sample.place(reasoned[0].positions[1].row)
    if value == np.inf:
        assert isinstance(problem, RanksDifferError)
        assert f"tensor-parallel ranks 0 draw different tokens at {place}; no" in str(problem)
    else:
        assert isinstance(problem, NotFiniteError)
        assert str(problem) == f"the log-prob of a token drawn at {place} is not finite"


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("what", ["reward", "advantage"])
def test_rewards_and_advantages_must_be_finite(what: str, value: float):
    reasoned = scored().reasoned
    assert reward_problems(reasoned) == []
    position = reasoned[0].positions[1]
    getattr(position, f"{what}s")[1] = value
    (problem,) = reward_problems(reasoned)
    place = reasoned[0].sample.place(position.row)
    assert str(problem) == f"the {what} of a response at {place} is not finite"


def _another_token(position: ChosenPosition) -> None:
    position.rollouts[1].tokens[0] += 1


def _another_length(position: ChosenPosition) -> None:
    """The same tokens, of which one more belongs to the first response."""
    first, second = position.rollouts
    joined = np.concatenate([first.tokens, second.tokens])
    cut = len(first) + 1
    object.__setattr__(first, "tokens", joined[:cut])
    object.__setattr__(second, "tokens", joined[cut:])


def _another_reward(position: ChosenPosition) -> None:
    position.rewards[0] += 1e-6


CHANGES = {
    "row": (chosen_alike, lambda position: setattr(position, "row", position.row + 1)),
    "budget": (chosen_alike, lambda position: setattr(position, "budget", position.budget + 1)),
    "token": (drawn_alike, _another_token),
    "length": (drawn_alike, _another_length),
    "reward": (rewarded_alike, _another_reward),
}


@pytest.mark.parametrize("case", CHANGES)
def test_ranks_of_one_model_compare_all_that_they_chose_drew_and_rewarded(
    case: str, monkeypatch: pytest.MonkeyPatch
):
    compared: Callable
    compared, change = CHANGES[case]
    assert compared(scored().reasoned) == [], "a model of one rank"
    monkeypatch.setattr(before_the_step.dist, "get_world_size", lambda *_: 2)
    copies, reasoned = compared(scored().reasoned), scored().reasoned
    assert [copy.value for copy in copies] == [same.value for same in compared(reasoned)]
    shared = [copy.what.split(", over ")[1] for copy in copies]
    assert shared == ["tensor and pipeline parallel", "context parallel"]
    change(reasoned[0].positions[1])
    for copy, other in zip(copies, compared(reasoned), strict=True):
        assert other.value != copy.value
