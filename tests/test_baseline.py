"""The moving average of the weights, against a written out one."""

import pytest
import torch

from megatron_rmt.update.baseline import Baseline
from tests.tiny_model import build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")


def test_the_average_takes_in_each_steps_weights_from_the_second_step_on():
    model = build_model(torch.float64)
    baseline = Baseline(model, 0.75)
    weights = [[own.detach().clone() for own in model.parameters()]]
    baseline.follow()
    for scale in (2.0, -1.0):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(scale)
        weights.append([own.detach().clone() for own in model.parameters()])
        baseline.follow()
    # 0.75^2 of the first, 0.75 * 0.25 of the second, 0.25 of the third.
    with baseline.in_place_of_the_weights():
        for found, *all_three in zip(model.parameters(), *weights, strict=True):
            expected = 0.5625 * all_three[0] + 0.1875 * all_three[1] + 0.25 * all_three[2]
            torch.testing.assert_close(found.data, expected, rtol=1e-12, atol=1e-15)
    for found, last in zip(model.parameters(), weights[-1], strict=True):
        assert torch.equal(found, last)


def test_half_precision_weights_have_an_average_in_fp32():
    model = build_model(torch.bfloat16)
    baseline = Baseline(model, 0.999)
    before = next(model.parameters()).detach().float()
    baseline.follow()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    baseline.follow()
    with baseline.in_place_of_the_weights(rounded=False):
        # In bf16 a step of 0.1 % would be lost.
        moved = next(model.parameters()).data
        assert moved.dtype == torch.float32
        torch.testing.assert_close(moved, before * 1.001, rtol=1e-6, atol=0)
    with baseline.in_place_of_the_weights():
        assert next(model.parameters()).dtype == torch.bfloat16
