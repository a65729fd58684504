"""Rotating and storing new tokens against float64; the kernel under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_rmt.rollout import store_rotated
from tests.distributed import REPOSITORY
from tests.rotation_problem import BOUNDS, errors, problem

# Triton decides at import whether it interprets.
PROGRAM = r"""
import sys

import torch

from megatron_rmt.rollout import store_rotated_triton
from tests.rotation_problem import BOUNDS, errors, problem

for line in sys.stdin.read().splitlines():
    *sizes, dtype = line.split()
    dtype = getattr(torch, dtype)
    found = errors(store_rotated_triton.store, problem(*map(int, sizes), dtype))
    assert max(found) < BOUNDS[dtype], (line, found)
print("the kernel agrees")
"""

# tokens, heads, kv heads, dim, rotated dims, copies, dtype
CASES = """
1 1 1 16 16 1 float32
5 4 2 24 16 1 float32
3 6 2 40 40 3 float32
2 10 2 128 128 1 bfloat16
4 4 4 20 10 2 bfloat16
2 5 1 64 32 1 float16
""".strip()


@pytest.mark.parametrize("case", [*CASES.splitlines(), "3 4 2 24 16 2 float64"])
def test_the_plain_path_is_near_float64_and_leaves_all_else_as_it_was(case: str):
    *sizes, dtype = case.split()
    dtype = getattr(torch, dtype)
    assert (
        max(errors(store_rotated.store_rotated, problem(*map(int, sizes), dtype))) < BOUNDS[dtype]
    )


def test_the_plain_path_rotates_as_megatron_does():
    query, *_, rotation, _, _, _ = problem(6, 4, 2, 24, 16, 1, torch.float64)
    angles = torch.atan2(rotation[1].double(), rotation[0].double())[:, None, None]
    expected = rope_utils._apply_rotary_pos_emb_bshd(query[:, None], angles)
    found = store_rotated.rotated(query, *rotation)
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=1e-6)


def test_the_kernel_is_near_float64_and_leaves_all_else_as_it_was():
    pytest.importorskip("triton")
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=CASES,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "the kernel agrees" in process.stdout


# Arguments of the kernel that are not int32, for heads of bf16.
KINDS = {
    **dict.fromkeys(("query", "key", "value", "output", "keys", "values"), "*bf16"),
    **dict.fromkeys(("cosine", "sine"), "*fp32"),
    **dict.fromkeys(("written", "columns"), "*i64"),
}


def test_the_kernel_compiles_for_sm_90_without_spilled_registers(tmp_path: Path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rmt.rollout import store_rotated_triton as kernels

    constants = {"heads": 10, "dim": 128, "turned": 128, "block_dim": 128}
    signature = {
        name: "constexpr" if name in constants else KINDS.get(name, "i32")
        for name in kernels._store.arg_names
    }
    compiled = triton.compile(
        ASTSource(kernels._store, signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernels.WARPS},
    )
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    used = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True)
    assert "STACK:0" in used.stdout + used.stderr
