"""Steps whose rollouts teach nothing are told of, and counted."""

import warnings
from collections import Counter

import pytest

from megatron_rmt.job.idle_steps import note_idle_step
from megatron_rmt.step import idle_reason

pytestmark = pytest.mark.faults


@pytest.mark.usefixtures("single_process_megatron")
def test_an_idle_step_is_told_of_at_first_and_counted_from_then_on():
    counts: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for iteration in range(150):
            note_idle_step(counts, None if iteration % 10 else "a", iteration)
            note_idle_step(counts, "b", iteration)
    assert counts == {"a": 15, "b": 150}
    said = [str(one.message).split(", which")[0] for one in told]
    assert said == [
        "RMT, iteration 1: a; 1 such step(s) since the start",
        "RMT, iteration 1: b; 1 such step(s) since the start",
        "RMT, iteration 10: b; 10 such step(s) since the start",
        "RMT, iteration 91: a; 10 such step(s) since the start",
        "RMT, iteration 100: b; 100 such step(s) since the start",
    ]


@pytest.mark.filterwarnings("error")
def test_one_rank_tells_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    counts: Counter[str] = Counter()
    note_idle_step(counts, "a", 0)
    assert counts == {"a": 1}


def test_why_a_step_is_idle():
    assert "the loss mask is 0" in idle_reason(0, 0, 0, warm_up=False)
    assert "no position could be chosen" in idle_reason(0, 100, 0, warm_up=False)
    assert "no position could be chosen" in idle_reason(0, 100, 0, warm_up=True)
    assert "the rewards of no group differ" in idle_reason(3, 100, 0, warm_up=False)
    assert idle_reason(3, 100, 0, warm_up=True) is None
    assert idle_reason(3, 0, 1, warm_up=False) is None
