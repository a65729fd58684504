"""The moving average of the weights, against a written out one."""

import pytest
import torch
from torch import Tensor

from megatron_rmt.update.baseline import Baseline
from tests.tiny_model import build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")


def _scale(model: torch.nn.Module, factor: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)


def _in_use(baseline: Baseline) -> list[Tensor]:
    with baseline.in_place_of_the_weights():
        return [weight.data.clone() for weight in baseline.model.parameters()]


def test_each_steps_average_counts_its_weights_from_the_second_step_on():
    model = build_model(torch.float64)
    first = [weight.detach().clone() for weight in model.parameters()]
    baseline = Baseline(model, 0.75)
    # The weights are 1, 2 and -2 times the first: 0.75^2, 0.75 * 0.25 and 0.25 of them in the end.
    for factor, share in ((1.0, 1.0), (2.0, 1.25), (-1.0, 0.4375)):
        _scale(model, factor)
        last = [weight.detach().clone() for weight in model.parameters()]
        for found, weight in zip(_in_use(baseline), first, strict=True):
            torch.testing.assert_close(found, share * weight, rtol=1e-12, atol=1e-15)
        assert all(map(torch.equal, model.parameters(), last))
        baseline.take_in()


def test_a_step_that_is_not_taken_leaves_no_trace():
    model = build_model(torch.float64)
    baseline = Baseline(model, 0.75)
    baseline.take_in()
    _scale(model, 2.0)
    before = [average.clone() for average in baseline._averages]
    once = _in_use(baseline)
    assert all(map(torch.equal, _in_use(baseline), once))
    assert all(map(torch.equal, baseline._averages, before))
    baseline.take_in()
    assert all(map(torch.equal, baseline._averages, once))


def test_half_precision_weights_have_an_average_in_fp32():
    model = build_model(torch.bfloat16)
    before = next(model.parameters()).detach().float()
    baseline = Baseline(model, 0.999)
    baseline.take_in()
    _scale(model, 2.0)
    baseline.take_in()
    # In bf16 a step of 0.1 % would be lost.
    assert baseline._averages[0].dtype == torch.float32
    torch.testing.assert_close(baseline._averages[0], before * 1.001, rtol=1e-6, atol=0)
    assert _in_use(baseline)[0].dtype == torch.bfloat16
