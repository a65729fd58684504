"""The Triton kernels against float64, under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.distributed import REPOSITORY

pytest.importorskip("triton")

# Triton decides at import whether it interprets.
PROGRAM = r"""
import inspect

import torch
import megatron_rmt.model.head_triton as kernels
from megatron_rmt.model import head, head_plain

for name in ("statistics_", "gradient_"):
    own, plain = (inspect.signature(getattr(module, name)) for module in (kernels, head_plain))
    assert own == plain

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
    a = normal(rows)
    held = (targets >= 0) & (targets < columns)
    targeted = targets.clamp(0, columns - 1), held
    own_score = torch.where(held, z.gather(1, targeted[0][:, None])[:, 0], 0)
    for given in (targeted, None):
        result = kernels.statistics_(scores, given)
        m = z.amax(-1)
        e = (z - m[:, None]).exp()
        check("maximum", result[0], m)
        check("normaliser", result[1], e.sum(-1))
        assert (result[2] - (e * (z - m[:, None])).sum(-1)).abs().max() < 1e-5 * columns
        check("target", result[3], own_score if given else 0 * own_score)
    assert torch.equal(held_scores, before)

    one_hot = torch.zeros_like(z)
    one_hot[held, targets[held]] = 1
    expected = a[:, None] * (one_hot - z.softmax(-1))
    own, rounded = held_scores.clone(), torch.empty(rows, columns, dtype=torch.bfloat16)
    constants = z.amax(-1).float(), z.logsumexp(-1).float(), a, targeted
    kernels.gradient_(own[:, :columns], *constants, rounded)
    assert torch.equal(own, held_scores)
    assert (rounded.double() - expected).abs().max() < 2**-8 * expected.abs().max()
    own = held_scores.clone()
    # What lies behind the columns is read and has no say.
    own[:, columns:] = float("nan")
    assert kernels.statistics_(own[:, :columns], targeted).isfinite().all()
    own[:, columns:] = 7
    scores = own[:, :columns]
    kernels.gradient_(scores, *constants, scores)
    # The log-normaliser of the first row is about 70, fp32 rounds it by 4e-6.
    assert (scores - expected).abs().max() < 5e-5
    behind = own[:, columns:]
    assert ((behind == 0) | (behind == 7)).all()

# The whole head on the kernels, as it runs on a GPU.
used = []
head._sweeps = lambda *_: used.append(1) or kernels
hidden = normal(11, 24).requires_grad_()
weight = (normal(128, 24)).requires_grad_()
targets = torch.randint(90, (11,), generator=generator)
a = normal(11)
log_p = (hidden.double() @ weight.double()[:90].T).log_softmax(-1)
log_probs = log_p.gather(1, targets[:, None])[:, 0]
entropies = -(log_p.exp() * log_p).sum(-1)
settings = {"vocab_size": 90, "tp_group": None, "chunk_size": 4}
loss = lambda rows, own: a[rows] * own.square()
expected = torch.autograd.grad(loss(slice(None), log_probs).sum(), [hidden, weight])
total, own_log_probs = head.token_loss_sum(hidden, weight, targets, loss, **settings)
check("log-probs", own_log_probs, log_probs.detach())
for gradient, reference in zip(torch.autograd.grad(total, [hidden, weight]), expected, strict=True):
    check("gradient", gradient, reference.double(), 1e-5)
found, ids = head.token_entropies(hidden, weight, **settings)
assert (found - entropies).abs().max() < 1e-5
assert torch.equal(ids, log_p.argmax(-1))
assert len(used) == 2

# A control: the comparison notices a kernel that is off by a thousandth.
plain = kernels.statistics_
kernels.statistics_ = lambda scores, targets: 1.001 * plain(scores, targets)
try:
    _, own = head.token_loss_sum(hidden, weight, targets, loss, **settings)
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
