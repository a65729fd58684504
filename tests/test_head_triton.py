"""The Triton kernels against float64, under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.distributed import REPOSITORY

pytest.importorskip("triton")

# Triton decides at import whether it interprets.
PROGRAM = r"""
import torch
import megatron_rmt.model.head_triton as kernels
from megatron_rmt.model import head, head_sweeps

kernels._STATISTICS_BLOCK, kernels._GRADIENT_BLOCK = 32, 16
generator = torch.Generator().manual_seed(3)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


def check(name, value, expected, bound=2e-6):
    error = float((value.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error < bound, (name, error)


# Below, at and above the blocks' sizes; rows are a part of longer ones, whose ends must stay.
for rows, columns, padded in [(1, 1, 1), (3, 5, 8), (4, 16, 16), (2, 31, 40), (5, 32, 32),
                              (7, 33, 48), (3, 100, 128), (2, 257, 257)]:
    held_scores = 8 * normal(rows, padded)
    held_scores[0] += 60
    before = held_scores.clone()
    scores = held_scores[:, :columns]
    z = scores.double()
    targets = torch.randint(-3, columns + 3, (rows,), generator=generator)
    targeted = head_sweeps.target_columns(targets, 0, columns)
    a, b = normal(rows), normal(rows)
    held = (targets >= 0) & (targets < columns)
    own_score = torch.where(held, z.gather(1, targeted[0][:, None])[:, 0], 0)
    for given in (targeted, None):
        result = kernels.statistics(scores, given)
        m = z.amax(-1)
        e = (z - m[:, None]).exp()
        check("maximum", result[0], m)
        check("normaliser", result[1], e.sum(-1))
        assert (result[2] - (e * (z - m[:, None])).sum(-1)).abs().max() < 1e-5 * columns
        check("target", result[3], own_score if given else 0 * own_score)
    assert torch.equal(held_scores, before)

    log_p = z.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    one_hot = torch.zeros_like(z)
    one_hot[held, targets[held]] = 1
    for entropy_part in (None, (b, entropies.float())):
        expected = a[:, None] * (one_hot - log_p.exp())
        if entropy_part:
            expected -= b[:, None] * log_p.exp() * (log_p + entropies[:, None])
        own = held_scores.clone()
        result = kernels.score_gradient_(
            own[:, :columns], z.logsumexp(-1).float(), a, entropy_part, targeted)
        assert result.data_ptr() == own.data_ptr()
        # The log-normaliser of the first row is about 70, fp32 rounds it by 4e-6.
        assert (own[:, :columns] - expected).abs().max() < 5e-5
        assert torch.equal(own[:, columns:], before[:, columns:])

# The whole head on the kernels, as it runs on a GPU.
used = []
head_sweeps._kernels = lambda scores: used.append(scores.shape) or kernels
hidden = normal(11, 24).requires_grad_()
weight = (normal(128, 24)).requires_grad_()
targets = torch.randint(90, (11,), generator=generator)
a, b = normal(11), normal(11)
log_p = (hidden.double() @ weight.double()[:90].T).log_softmax(-1)
log_probs = log_p.gather(1, targets[:, None])[:, 0]
entropies = -(log_p.exp() * log_p).sum(-1)
settings = {"vocab_size": 90, "tp_group": None, "chunk_size": 4}
for b in (0 * b, b):
    loss = (a * log_probs).sum() + (b * entropies).sum()
    expected = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    own_log_probs, own_entropies = head.token_statistics(hidden, weight, targets, **settings)
    own = (a * own_log_probs).sum() + (b * own_entropies).sum()
    of_entropies = b if b.any() else None
    total, one_pass_log_probs, one_pass_entropies = head.weighted_log_prob_sum(
        hidden, weight, targets, a, of_entropies, **settings)
    check("log-probs", own_log_probs, log_probs.detach())
    check("one-pass log-probs", one_pass_log_probs, log_probs.detach())
    assert (own_entropies - entropies).abs().max() < 1e-5
    assert b.any() == (one_pass_entropies is not None)
    for name, value in (("recompute", own), ("one pass", total)):
        for gradient, reference in zip(
            torch.autograd.grad(value, [hidden, weight]), expected, strict=True
        ):
            check(name, gradient, reference.double(), 1e-5)
found, ids = head.token_entropies(hidden, weight, **settings)
assert (found - entropies).abs().max() < 1e-5
assert torch.equal(ids, log_p.argmax(-1))
assert len(used) > 20

# A control: the comparison notices a kernel that is off by a thousandth.
plain = kernels.statistics
kernels.statistics = lambda scores, targets: 1.001 * plain(scores, targets)
try:
    own, _ = head.token_statistics(hidden, weight, targets, **settings)
    check("control", own, log_probs.detach())
except AssertionError:
    print("kernels agree")
"""


def test_kernels_equal_float64_at_odd_sizes_and_in_the_head():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "kernels agree"
