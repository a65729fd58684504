"""The hybrid loss against loops over tokens in float64."""

import math

import pytest
import torch

from megatron_rmt.algorithm.losses import Predictions, TokenLosses, response_weights, token_losses

LENGTHS = [3, 0, 1, 5]


def _tokens(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Rollout of each token, whether it was drawn, and its log-prob; the last is all forced."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    drawn = torch.tensor([True, False, True, True, False, False, False, False, False])
    log_probs = -torch.rand(9, generator=generator, dtype=torch.float64)
    return rollouts, drawn, log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_share_a_value_out_over_the_selected_tokens(dtype):
    rollouts, drawn, _ = _tokens()
    values = torch.tensor([0.7, -1.0, 2.0, 3.0], dtype=dtype)
    weights = response_weights(values, rollouts, drawn, positions=8)
    expected = []
    for token, rollout in enumerate(rollouts.tolist()):
        count = sum(int(drawn[t]) for t in range(9) if rollouts[t] == rollout)
        expected.append(float(values[rollout]) / count / 8 if drawn[token] else 0.0)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=dtype))
    # Each response that holds a drawn token has its whole value, whatever its length.
    sums = torch.zeros(4, dtype=dtype).index_add_(0, rollouts, weights) * 8
    torch.testing.assert_close(sums, torch.tensor([0.7, 0.0, 2.0, 0.0], dtype=dtype))


def test_weights_of_half_precision_values_are_fp32():
    rollouts, drawn, _ = _tokens()
    weights = response_weights(torch.ones(4, dtype=torch.bfloat16), rollouts, drawn, positions=3)
    assert weights.dtype == torch.float32
    assert float(weights[0]) == pytest.approx(1 / 6)


def test_no_positions_and_no_tokens_give_no_weights():
    nothing = torch.empty(0, dtype=torch.int64)
    weights = response_weights(torch.empty(0), nothing, nothing.bool(), positions=0)
    assert weights.shape == (0,)


def _predictions(trunk: int = 0, responses: int = 0, **weights: torch.Tensor) -> Predictions:
    """``ntp`` is of the trunk, the rest of the responses; 0 where not given."""
    given = dict.fromkeys(Predictions._fields, None) | weights
    for name, values in given.items():
        if name == "ntp":
            own = torch.zeros(trunk) if values is None else values
            given[name] = torch.cat([own, own.new_zeros(responses)])
        else:
            own = torch.zeros(responses) if values is None else values
            given[name] = torch.cat([own.new_zeros(trunk), own])
    return Predictions(**given)


def _sums(losses: TokenLosses) -> list[float]:
    return [float(part.sum()) for part in losses]


def test_loss_and_gradient_equal_the_papers_formula():
    rollouts, drawn, response_log_probs = _tokens()
    generator = torch.Generator().manual_seed(1)
    trunk_log_probs = -torch.rand(6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1.0, 1, 0, 1, 0.5, 1], dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5, -1.0, 0.25], dtype=torch.float64)
    log_probs = torch.cat([trunk_log_probs, response_log_probs]).requires_grad_()
    predictions = _predictions(
        trunk=6,
        responses=9,
        ntp=mask / mask.sum(),
        policy=response_weights(advantages, rollouts, drawn, positions=4),
    )
    losses = token_losses(log_probs, predictions)

    policy = torch.zeros((), dtype=torch.float64)
    for rollout in range(4):
        own = [t for t in range(9) if rollouts[t] == rollout and drawn[t]]
        for token in own:
            log_p = log_probs[6 + token]
            policy = policy - torch.exp(log_p - log_p.detach()) * advantages[rollout] / len(own) / 4
    ntp = -(mask * log_probs[:6]).sum() / mask.sum()
    reference = policy + 0.1 * ntp
    total = losses.hybrid(0.1).sum()
    torch.testing.assert_close(total, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.ntp.sum(), ntp, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.policy.sum(), policy, rtol=1e-12, atol=0)
    assert losses.supervised.detach().sum() == 0
    (gradient,) = torch.autograd.grad(total, log_probs)
    (expected,) = torch.autograd.grad(reference, log_probs)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_on_policy_the_value_is_minus_the_advantages_and_the_gradient_reinforces():
    """The ratio is 1 whatever the log-probs; the gradient by each log-prob is minus its weight."""
    log_probs = torch.tensor([-0.1, -30.0, -2.0], requires_grad=True)
    predictions = _predictions(responses=3, policy=torch.tensor([0.5, -0.25, 0.0]))
    total = token_losses(log_probs, predictions).hybrid(0.1).sum()
    assert total.detach() == -0.25
    (gradient,) = torch.autograd.grad(total, log_probs)
    assert gradient.tolist() == [-0.5, 0.25, 0.0]


def test_the_warm_up_is_plain_cross_entropy_of_what_was_written():
    log_probs = torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    written = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    losses = token_losses(log_probs, _predictions(responses=3, supervised=written))
    total = losses.hybrid(0.1).sum()
    assert total.detach() == 1.5
    assert _sums(losses) == [0, 0, 1.5]
    (gradient,) = torch.autograd.grad(total, log_probs)
    assert gradient.tolist() == [0.0, -0.5, -0.5]


def test_a_coefficient_of_zero_leaves_the_next_token_loss_out():
    log_probs = torch.full((4,), math.log(0.5), requires_grad=True)
    losses = token_losses(log_probs, _predictions(trunk=4, ntp=torch.full((4,), 0.25)))
    assert float(losses.hybrid(0.0).sum()) == 0
    assert _sums(losses) == [pytest.approx(math.log(2)), 0, 0]


def test_the_loss_of_some_predictions_is_theirs_in_the_loss_of_all():
    """The head takes a chunk of them at a time."""
    generator = torch.Generator().manual_seed(2)
    predictions = Predictions(*torch.randn(4, 9, generator=generator))
    log_probs = -torch.rand(9, generator=generator)
    whole = token_losses(log_probs, predictions).hybrid(0.1)
    rows = slice(2, 7)
    part = token_losses(log_probs[rows], predictions.at(rows)).hybrid(0.1)
    assert torch.equal(part, whole[rows])
