"""The sampling kernels against the plain path, under Triton's interpreter; their code for sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
from tests.test_sampling_triton import problem

own, plain = (inspect.signature(module.sample_tokens) for module in (kernels, sampling))
assert own == plain


def weights(scores, maxima, temperature):
    exponents = (scores - maxima) * (1.0 / temperature)
    exponents = exponents.clamp(min=sampling._LEAST_EXPONENT)
    return torch.from_numpy(np.exp(exponents.numpy())).mul(sampling._WEIGHT_SCALE).floor()


sampling._weights = weights
kernels.COLUMNS, kernels.SEARCH_COLUMNS, kernels.ROWS = 512, 128, 4


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
        self.shared["barrier"].wait()
        found = torch.stack(self.shared["values"])
        self.shared["barrier"].wait()
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


def drawn(logits, numbers, bounds, how):
    shared = {"values": [None] * (len(bounds) - 1), "barrier": threading.Barrier(len(bounds) - 1)}
    results = [None] * (len(bounds) - 1)

    def run(rank):
        start, stop = bounds[rank : rank + 2]
        group = Group(rank, shared) if len(bounds) > 2 else None
        with Group.turn:
            results[rank] = kernels.sample_tokens(
                logits[:, start:stop], numbers, vocab_start=start, tp_group=group, **how
            )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(results))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


kinds = [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9}, {"top_k": 9000},
         {"top_p": 1.0}, {"top_k": 1}]
checked = 0
for rows, columns in [(1, 1), (2, 255), (3, 256), (5, 257), (6, 700)]:
    logits, numbers = problem(rows, columns)
    for kind in kinds if columns == 700 else kinds[:4]:
        for temperature in (0.8, 2.0)[: 1 + (not kind)]:
            how = kind | {"temperature": temperature}
            expected = sampling.sample_tokens(
                logits, numbers, vocab_start=0, tp_group=None, **how
            )
            splits = [[0, columns]]
            if columns == 700 and kind in kinds[:4]:
                splits += [[0, 333, 334, 700]]
            for bounds in splits:
                for found in drawn(logits, numbers, bounds, how):
                    assert torch.equal(found[0], expected[0]), (rows, columns, how)
                    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
                checked += 1

# What is not finite says so; the ids are arbitrary.
logits, numbers = problem(4, 300)
logits[0], logits[1, 7], logits[2, 299] = -torch.inf, torch.nan, torch.inf
[(_, log_probs)] = drawn(logits, numbers, [0, 300], {"temperature": 1.0, "top_p": 0.9})
assert log_probs.isfinite().tolist() == [False, False, False, True]
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
    **dict.fromkeys(("least", "kept"), "*i32"),
    **dict.fromkeys(("block_sums", "tokens"), "*i64"),
    "factor": "fp32",
}


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores fp32 with ties, vanishing ones and -inf, whose rows are not dense, and numbers."""
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (4 * torch.randn(rows, columns + 3, generator=generator))[:, :columns]
    logits[-1] = logits[-1].round()
    logits[0, columns // 2 :] -= 60 * (columns > 1)
    logits[rows // 2, : columns * 2 // 3] = -torch.inf
    numbers = torch.rand(rows, generator=generator, dtype=torch.float64)
    numbers[-1] = 1 - 2.0**-53
    # Where whole blocks lie before the first token that may be drawn, too.
    numbers[[0, rows // 2]] = 0.0
    return logits, numbers


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
    search = {"has_kept": True, "counts": False, "width": kernels.SEARCH_COLUMNS}
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
