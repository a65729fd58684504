"""Attention by limits on the device against float64; the kernels under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rmt.rollout import decode_attention
from tests.decode_problem import BOUNDS, error, problem, window_and_sink, within
from tests.distributed import REPOSITORY

# Triton decides at import whether it interprets.
PROGRAM = r"""
import sys

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

import megatron_rmt.rollout.decode_attention_triton as kernels
from tests.decode_problem import BOUNDS, error, problem, window_and_sink, within

dot = InterpreterBuilder.create_dot


def as_tensor_cores_multiply(builder, a, b, *others):
    # The interpreter keeps bf16 as 16 bits and would multiply those as whole numbers.
    if a.dtype.scalar == tl.bfloat16:
        a, b = (
            TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            for x in (a, b)
        )
    return dot(builder, a, b, *others)


InterpreterBuilder.create_dot = as_tensor_cores_multiply
few = {2: 16, 4: 16}
LEAST, LANES, KEYS = kernels.LEAST_KEYS, kernels.TRUNK_LANES, kernels.KEYS
for line in sys.stdin.read().splitlines():
    rows, heads, kv_heads, dim, trunk, capacity, dtype, std, parts, layer = line.split()
    dtype = getattr(torch, dtype)
    small = int(parts) > 1
    # Small blocks and forced parts reach every edge; else those of a GPU.
    kernels.KEYS, kernels.TRUNK_LANES = (few, few) if small else (KEYS, LANES)
    kernels.LEAST_KEYS = 1 if small else LEAST
    kernels._parts = lambda wanted, programs, most, parts=int(parts): parts
    given = problem(*map(int, (rows, heads, kv_heads, dim, trunk, capacity)), dtype, float(std))
    own = window_and_sink(layer, int(heads), dtype)
    off = error(kernels.attend(*within(own[0], *given), own[1]), *given, *own)
    assert off < BOUNDS[dtype], (line, off)
    print(f"{off:.1e}", end=" ")
print("\nkernels agree")
"""

# rows, heads, kv heads, dim, trunk tokens, capacity of tails, dtype, std of scores, parts, the
# layer's window, with s a sink
SMALL = """
1 1 1 16 1 1 float32 1 1 -
1 4 2 16 70 33 float32 1 3 -
2 5 1 8 40 20 float32 3 2 -
7 6 2 24 50 17 float32 6 3 -
13 3 3 16 33 40 float32 10 4 -
12 10 2 32 100 50 bfloat16 1 2 -
12 10 2 32 100 50 bfloat16 3 2 -
12 10 2 32 100 50 bfloat16 6 2 -
12 10 2 32 100 50 bfloat16 10 2 -
9 20 1 16 60 30 float16 3 2 -
40 5 1 16 150 70 bfloat16 6 1 -
64 2 1 16 300 20 float16 1 1 -
1 4 2 16 70 33 float32 1 3 40
7 6 2 24 50 17 float32 6 3 20s
13 3 3 16 33 40 float32 10 4 3
13 3 3 16 33 40 float32 10 4 0s
13 3 3 16 33 40 float32 1 1 s
12 10 2 32 100 50 bfloat16 3 2 30s
"""


def _interpret(cases: str) -> None:
    pytest.importorskip("triton")
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=cases.strip(),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split("\n")[1] == "kernels agree"


def test_kernels_equal_float64_at_odd_sizes_and_peaked_scores():
    _interpret(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("std", [1, 3, 6, 10])
@pytest.mark.parametrize("rows", [1, 256, 2048])
def test_kernels_equal_float64_at_real_sizes(rows, std):
    _interpret(
        f"{rows} 5 1 128 1500 300 bfloat16 {std} 1 -\n{rows} 5 1 128 700 70 bfloat16 {std} 4 -"
    )


@pytest.mark.parametrize("case", SMALL.split("\n")[1:-1])
def test_written_out_scores_equal_float64(case):
    *sizes, dtype, std, _, layer = case.split()
    for name in (dtype, "float64"):
        given = problem(*map(int, sizes), getattr(torch, name), float(std))
        own = window_and_sink(layer, int(sizes[1]), getattr(torch, name))
        found = decode_attention.decode_attention(*within(own[0], *given), own[1])
        off = error(found, *given, *own)
        assert off < BOUNDS[getattr(torch, name)]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_sm_90_without_spilled_registers(dtype, tmp_path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rmt.rollout import decode_attention_triton as kernels

    size = {"bf16": 2, "fp32": 4}[dtype]
    dims = {"dim": 128, "block_dim": 128}
    of_parts = {
        "trunk_parts": 4,
        "tail_parts": 2,
        "queries": 5,
        "trunk_lanes": kernels.TRUNK_LANES[size],
        "tail_lanes": kernels.TAIL_LANES,
        "keys": kernels.KEYS[size],
    }
    for kernel, constants, warps in (
        (kernels._attend_parts, of_parts | dims, kernels.WARPS),
        (kernels._join_parts, {"parts": 6, "has_sink": True, "heads": 10} | dims, 1),
    ):
        pointers = ("query", "trunk_key", "trunk_value", "tail_key", "tail_value", "sink", "output")
        signature = {
            name: "constexpr"
            if name in constants
            else f"*{dtype}"
            if name in pointers
            else "*i32"
            if name in ("first", "limit", "tail", "length", "tail_first")
            else "*fp32"
            if name in ("found", "log_sums")
            else "fp32"
            if name == "scale"
            else "i32"
            for name in kernel.arg_names
        }
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(signature.values())
            if kind not in ("fp32", "constexpr")
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps, "num_stages": kernels.STAGES},
        )
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        used = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True)
        assert "STACK:0" in used.stdout + used.stderr


def test_triton_is_looked_for_once_and_not_for_each_layer(monkeypatch: pytest.MonkeyPatch):
    looked_for: list[str] = []
    monkeypatch.setattr(decode_attention.importlib.util, "find_spec", looked_for.append)
    decode_attention._has_triton.cache_clear()
    for _ in range(3):
        assert not decode_attention.runs_kernels(_OnAGpu(torch.bfloat16))
    assert looked_for == ["triton"]
    monkeypatch.undo()
    decode_attention._has_triton.cache_clear()
    assert not decode_attention.runs_kernels(_OnAGpu(torch.float64))


class _OnAGpu:
    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
