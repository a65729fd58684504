"""The sampling kernels against the plain path, under Triton's interpreter; their code for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY

pytest.importorskip("triton")

# Triton decides at import whether it interprets. Exponentials are what devices round differently:
# here both paths take numpy's, as the interpreter does, so that all else must agree bit for bit.
PROGRAM = r"""
import inspect
import threading

import numpy as np
import torch
import megatron_rmt.rollout.sampling_triton as kernels
from megatron_rmt.rollout import sampling
from tests.sampling_problem import problem

for name in ("sample_tokens", "most_probable"):
    own, plain = (inspect.signature(getattr(module, name)) for module in (kernels, sampling))
    assert own == plain


def weights(scores, maxima, temperature):
    exponents = (scores - maxima) * (1.0 / temperature)
    exponents = exponents.clamp(min=sampling._LEAST_EXPONENT)
    return torch.from_numpy(np.exp(exponents.numpy())).mul(sampling._WEIGHT_SCALE).floor()


sampling._weights = weights
# Small, so that few columns and rows are several passes of a program, and several programs.
kernels.COLUMNS, kernels.SEARCH_COLUMNS, kernels.ROWS = 512, 256, 2


class Group:
    # Ranks are threads. One runs at a time, as the interpreter keeps the number of the running
    # program for the whole process; they wait for each other in collectives.
    turn = threading.Lock()

    def __init__(self, rank, shared):
        self._rank, self.shared = rank, shared

    def rank(self):
        return self._rank

    def size(self):
        return len(self.shared["values"])

    def all(self, values):
        self.shared["values"][self._rank] = values.clone()
        self.turn.release()
        try:
            self.shared["barrier"].wait()
            found = torch.stack(self.shared["values"])
            self.shared["barrier"].wait()
        finally:
            self.turn.acquire()
        return found


def reduce_over_ranks(values, operation, group):
    if group is not None:
        found = group.all(values)
        is_sum = operation == torch.distributed.ReduceOp.SUM
        values.copy_(found.sum(0) if is_sum else found.amax(0))
    return values


kernels.reduce_over_ranks = reduce_over_ranks
kernels.of_all_ranks = lambda values, group: values[None] if group is None else group.all(values)


def first_with_maximum(ids, maxima, group):
    if group is None:
        return ids
    all_ids, all_maxima = group.all(ids), group.all(maxima)
    return all_ids.masked_fill(all_maxima != all_maxima.amax(0), 2**60).amin(0)


kernels.first_with_maximum = first_with_maximum


def drawn(logits, numbers, bounds, how):
    ranks = len(bounds) - 1
    shared = {"values": [None] * ranks, "barrier": threading.Barrier(ranks)}
    results, failures = [None] * ranks, []

    def run(rank):
        start, stop = bounds[rank : rank + 2]
        group = Group(rank, shared) if ranks > 1 else None
        with Group.turn:
            try:
                given = {"vocab_start": start, "tp_group": group, **how}
                own = logits[:, start:stop]
                if numbers is None:
                    results[rank] = kernels.most_probable(own, **given)
                else:
                    results[rank] = kernels.sample_tokens(own, numbers, **given)
            except BaseException as error:
                failures.append(error)
                # Those that wait for this one end too.
                shared["barrier"].abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if failures:
        raise failures[0]
    return results


WHOLE, SPLIT = [0, 600], [0, 250, 251, 600]
BOTH = {"top_k": 40, "top_p": 0.9}
checked = 0
for rows, bounds, how in [
    # Below, at and above a block, and with several passes of a program.
    (1, [0, 1], {"temperature": 0.8}),
    (2, [0, 255], {"temperature": 0.8}),
    (3, [0, 256], {"temperature": 2.0}),
    (3, [0, 257], {"temperature": 0.8}),
    (5, WHOLE, {"temperature": 0.8}),
    (5, SPLIT, {"temperature": 0.8}),
    (5, SPLIT, {"temperature": 2.0}),
    (1, [0, 1], BOTH | {"temperature": 0.8}),
    (3, [0, 257], {"top_k": 1, "temperature": 0.8}),
    (3, [0, 257], {"top_k": 9000, "temperature": 0.8}),
    (3, [0, 257], {"top_p": 1.0, "temperature": 0.8}),
    (3, WHOLE, {"top_k": 3, "temperature": 0.8}),
    (3, WHOLE, {"top_p": 0.6, "temperature": 0.8}),
    (3, WHOLE, BOTH | {"temperature": 0.8}),
    (2, SPLIT, {"top_k": 3, "temperature": 0.8}),
    (2, SPLIT, BOTH | {"temperature": 2.0}),
]:
    logits, numbers = problem(rows, bounds[-1])
    expected = sampling.sample_tokens(logits, numbers, vocab_start=0, tp_group=None, **how)
    for found in drawn(logits, numbers, bounds, how):
        assert torch.equal(found[0], expected[0]), (rows, bounds, how, found, expected)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
    checked += 1

# Weights that only the last bits of the search tell apart.
logits = torch.full((1, 600), -30.0)
third = 3 + 5 / 512
logits[0, [10, 200, 400, 599]] = torch.tensor([5.0, 4.0, third, third - 2.0**-22])
for bounds in (WHOLE, SPLIT):
    how = {"top_k": 3, "temperature": 0.8}
    for tokens, _ in drawn(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64), bounds, how):
        assert tokens.tolist() == [400]

for rows, bounds in [(1, [0, 1]), (3, [0, 257]), (5, WHOLE), (5, SPLIT)]:
    logits, _ = problem(rows, bounds[-1])
    # The first of equals, in one pass of a program and in another, on one rank and on another.
    logits[:, bounds[-1] * 2 // 3] = logits[-1, [bounds[-1] - 1, bounds[-1] // 2]] = 30.0
    if bounds[-1] > 512:
        logits[0, [60, 60 + 512]] = 31.0
        logits[1, 590] = 32.0
    how = {"temperature": 0.8}
    expected = sampling.most_probable(logits, vocab_start=0, tp_group=None, **how)
    for found in drawn(logits, None, bounds, how):
        assert torch.equal(found[0], expected[0]), (rows, bounds, found, expected)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)

# What is not finite says so; the ids are arbitrary.
logits, numbers = problem(4, 300)
logits[0], logits[1, 7], logits[2, 299] = -torch.inf, torch.nan, torch.inf
[(_, log_probs)] = drawn(logits, numbers, [0, 300], {"temperature": 1.0})
assert log_probs.isfinite().tolist() == [False, False, False, True]
[(ids, log_probs)] = drawn(logits, None, [0, 300], {"temperature": 1.0})
assert log_probs.isfinite().tolist() == [False, False, False, True]
assert ((ids >= 0) & (ids < 300)).all()
# A rank that has another uniform number is told so, or tells the one that drew.
own = kernels.sample_tokens


def another(logits, numbers, *, tp_group, **how):
    return own(logits, numbers + 0.01 * tp_group.rank(), tp_group=tp_group, **how)


kernels.sample_tokens = another
logits, numbers = problem(4, 300)
found = drawn(logits, numbers, [0, 100, 300], {"temperature": 1.0})
assert torch.stack([log_probs for _, log_probs in found]).isposinf().any(0).all()
print(checked, "cases agree")
"""

# Arguments of the kernels that are not int32.
KINDS = {
    **dict.fromkeys(("logits", "maxima", "log_probs"), "*fp32"),
    **dict.fromkeys(("enough", "reached", "shard_sums", "uniforms", "drawn"), "*fp64"),
    "least": "*i32",
    **dict.fromkeys(("block_sums", "tokens", "ids"), "*i64"),
    "factor": "fp32",
}


def test_kernels_draw_what_the_plain_path_draws():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            # It would make torch's exponentials of numpy's.
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": str(REPOSITORY),
        },
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().endswith("cases agree")


def test_kernels_compile_for_sm_90_without_spilled_registers(tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rmt.rollout import sampling_triton as kernels

    # A fourth of the vocabulary of Qwen3, whose last shard is odd.
    width = {"width": kernels.COLUMNS}
    search = {"counts": False, "width": kernels.SEARCH_COLUMNS}
    draw = {"has_least": True, "ranks": 4, "most_blocks": 256}
    for kernel, constants, warps in (
        (kernels._maxima, width, kernels.WARPS),
        (kernels._sum_blocks, width | {"has_least": True}, kernels.WARPS),
        (kernels._search, search | {"alone": True}, kernels.SEARCH_WARPS),
        (kernels._search, search | {"alone": False}, kernels.SEARCH_WARPS),
        (kernels._draw, draw, kernels.DRAW_WARPS),
        (kernels._tell, {"ranks": 4, "block": kernels.ROWS}, kernels.TELL_WARPS),
    ):
        signature = {
            name: "constexpr" if name in constants else KINDS.get(name, "i32")
            for name in kernel.arg_names
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        used = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True)
        assert "STACK:0" in used.stdout + used.stderr, kernel.__name__
