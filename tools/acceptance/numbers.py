"""Numbers of one device against float64 on the CPU: head, attention, random numbers, gathers."""

import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from acceptance.check import Found, Machine, relative
from megatron_rmt.algorithm.rng import uniforms
from megatron_rmt.job.settings import versions
from megatron_rmt.model.blocks import Block, ancestry, position_block
from megatron_rmt.model.head import token_entropies, token_loss_sum
from megatron_rmt.model.tree_attention import BACKENDS
from megatron_rmt.rollout.decode_attention import decode_attention as attend_by_limits
from megatron_rmt.rollout.row_limits import RowLimits
from megatron_rmt.rollout.store_rotated import store_rotated
from megatron_rmt.update.forward_step import _rows_of as rows_of
from tests import decode_problem, rotation_problem


def surroundings(machine: Machine) -> Found:
    """Versions, card and allocator; nothing is judged."""
    found = versions() | {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("flash-attn", "triton", "nvidia-cudnn-cu13"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if machine.on_gpu:
        card = torch.cuda.get_device_properties(machine.device)
        found |= {"card": card.name, "sm": f"{card.major}{card.minor}", "bytes": card.total_memory}
        found["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    card = found.get("card", "no GPU")
    return Found(None, f"{card}, torch {found['torch']}", numbers=found)


def random_numbers(machine: Machine) -> Found:
    """Uniform numbers of the device against those of this program's CPU, bit for bit."""
    keys = [torch.arange(count).view(shape) for count, shape in _KEY_SHAPES]
    on_cpu = uniforms(7, 3, *keys)
    on_device = uniforms(7, 3, *(key.to(machine.device) for key in keys)).cpu()
    digest = hashlib.sha256(on_cpu.numpy().tobytes()).hexdigest()
    passed = torch.equal(on_cpu, on_device) and digest == _DIGEST
    return Found(passed, f"{int((on_cpu != on_device).sum())} differ", "0", {"digest": digest})


_KEY_SHAPES = ((2, (-1, 1, 1, 1)), (5, (-1, 1, 1)), (4, (-1, 1)), (16, (-1,)))
# Of these numbers, which any machine gives: integers alone make them.
_DIGEST = "86400328eefb922c37cd4e1223471d9855cc887dce050bcaa0a7c42f9444168c"


def _problem(columns: int, padded: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows, hidden = 150, 96
    return (
        torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype),
        (torch.randn(padded, hidden, generator=generator, dtype=torch.float64) / 3).to(dtype),
        torch.randint(columns, (rows,), generator=generator),
    )


def _leaf(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy that gets a gradient."""
    return values.detach().to(device, dtype, copy=True).requires_grad_()


def head(machine: Machine, dtype: torch.dtype, bound: float) -> Found:
    """Log-probs, entropies and gradients of the head, an even and an odd vocabulary."""
    errors: dict[str, float] = {}
    for columns, padded in ((4096, 4096), (4609, 4736)):
        inputs = _problem(columns, padded, dtype)
        hidden, weight = (_leaf(x, machine.device, dtype) for x in inputs[:2])
        targets = inputs[2].to(machine.device)
        settings = {"vocab_size": columns, "tp_group": None, "chunk_size": 64}
        total, log_probs = token_loss_sum(
            hidden, weight, targets, lambda rows, own: own.square(), **settings
        )
        total.backward()
        entropies, _ = token_entropies(hidden.detach(), weight.detach(), **settings)
        cpu = torch.device("cpu")
        wide_hidden, wide_weight = (_leaf(x, cpu, torch.float64) for x in inputs[:2])
        of_all = (wide_hidden @ wide_weight[:columns].T).log_softmax(-1)
        expected = of_all.gather(1, inputs[2][:, None])[:, 0]
        expected.square().sum().backward()
        results = {
            "log-probs": (log_probs, expected),
            "entropies": (entropies, -(of_all.exp() * of_all).sum(-1)),
            "by hidden": (hidden.grad, wide_hidden.grad),
            "by weight": (weight.grad, wide_weight.grad),
        }
        for name, (value, reference) in results.items():
            errors[f"{name}, {columns} tokens"] = relative(value, reference)
    return Found.below(errors, bound)


def main_grad(machine: Machine) -> Found:
    """The head's weight gradient, added to ``main_grad`` in fp32, against the rounded one."""
    hidden, weight, targets = (x.to(machine.device) for x in _problem(4609, 4736, torch.bfloat16))
    settings = {"vocab_size": 4609, "tp_group": None, "chunk_size": 64}
    weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=machine.device)

    def gradient(into_main_grad: bool) -> Tensor:
        weight.grad = None
        total, _ = token_loss_sum(
            hidden,
            weight,
            targets,
            lambda rows, own: own,
            into_main_grad=into_main_grad,
            **settings,
        )
        total.backward()
        return weight.main_grad if into_main_grad else weight.grad

    rounded, added = gradient(False), gradient(True)
    same = torch.equal(added.to(weight.dtype), rounded)
    return Found(same, "equal but for the rounding" if same else "not the same", "equal")


def _trees(largest: int) -> Iterator[tuple[str, list[Block]]]:
    """Sequences of one row, round the kernels' blocks, and a tree of about ``largest`` rows."""
    for rows in (1, 127, 128):
        yield f"{rows} rows", [Block(0, rows)]
    trunk = largest // 3
    blocks = [Block(0, trunk)]
    for part in (3, 2, 1):
        branch = largest // 18
        blocks.append(
            position_block(blocks[-1].limit, 0, trunk // part, 40, [branch - 9, branch, branch - 5])
        )
    yield f"{blocks[-1].limit} rows in branches", blocks


def tree_attention(machine: Machine, backend: str) -> Found:
    """Output and gradients in bf16 against dense attention in float64, scores of spread 1 and 6."""
    errors: dict[str, float] = {}
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for spread in (1.0, 6.0):
        for name, blocks in _trees(5000 if machine.on_gpu else 600):
            found, reference = _attended(machine, backend, blocks, spread)
            for part, value, expected in zip(
                ["output", "dq", "dk", "dv"], found, reference, strict=True
            ):
                errors[f"{part}, spread {spread:g}, {name}"] = relative(value, expected)
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiles
    # The mask, forward and backward: no shape but the first may compile anything.
    found = Found.below(errors, 2e-2)
    few = compiles <= 4
    return Found(found.passed and few, f"{found.value}, {compiles} graphs", f"{found.bound}, <= 4")


def _attended(
    machine: Machine, backend: str, blocks: list[Block], spread: float
) -> tuple[list[Tensor], list[Tensor]]:
    heads, kv_heads, width, tokens = 4, 2, 64, blocks[-1].limit
    generator = torch.Generator().manual_seed(tokens)

    def normal(count: int) -> Tensor:
        return torch.randn(tokens, count, width, generator=generator, dtype=torch.float64)

    inputs = [x.bfloat16() for x in (spread * normal(heads), normal(kv_heads), normal(kv_heads))]
    by_output = normal(heads).bfloat16()
    scale = 1 / math.sqrt(width)
    own = [x.to(machine.device).requires_grad_() for x in inputs]
    output = BACKENDS[backend](blocks)(*own, scale)
    found = [output, *torch.autograd.grad(output, own, by_output.to(machine.device))]
    query, key, value = wide = [x.double().requires_grad_() for x in inputs]
    rows = torch.arange(tokens)
    visible = ancestry(blocks)(rows[:, None], rows)
    outputs = []
    for head_index in range(heads):
        of_key = head_index // (heads // kv_heads)
        scores = scale * query[:, head_index] @ key[:, of_key].T
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        outputs.append(weights @ value[:, of_key])
    expected = torch.stack(outputs, 1)
    return found, [expected, *torch.autograd.grad(expected, wide, by_output.double())]


def decode_attention(machine: Machine, std: float) -> Found:
    """Attention of decoding in bf16 against float64, scores of spread ``std``, ragged limits."""
    errors = {}
    for rows in (1, 256, 2048) if machine.on_gpu else (1, 48):
        trunk, capacity = (1500, 300) if machine.on_gpu else (200, 40)
        given = decode_problem.problem(rows, 10, 2, 128, trunk, capacity, torch.bfloat16, std)
        query, *stored, limits, scale = given
        on_device = [[x.to(machine.device) for x in pair] for pair in stored]
        moved = RowLimits(*(x.to(machine.device) for x in limits))
        output = attend_by_limits(query.to(machine.device), *on_device, moved, scale)
        errors[f"{rows} rows"] = decode_problem.error(output.cpu(), *given)
    return Found.below(errors, decode_problem.BOUNDS[torch.bfloat16])


def rotate_and_store(machine: Machine) -> Found:
    """Queries, and tails with new keys and values, of decoding in bf16 against float64."""

    def on_device(*args: Any) -> Tensor:
        moved = tree_map_only(Tensor, lambda x: x.to(machine.device), args)
        output = store_rotated(*moved)
        # Where the problem looks for them.
        for tail, written in zip(args[4], moved[4], strict=True):
            tail.copy_(written)
        return output.cpu()

    errors = {}
    for tokens, copies in ((256, 1), (24, 8)) if machine.on_gpu else ((20, 1), (3, 8)):
        given = rotation_problem.problem(tokens, 10, 2, 128, 128, copies, torch.bfloat16)
        errors[f"{tokens} tokens"] = max(rotation_problem.errors(on_device, given))
    return Found.below(errors, rotation_problem.BOUNDS[torch.bfloat16])


def repeated_rows(machine: Machine) -> Found:
    """The gradient of hidden states of which some are read many times: the same bits each time."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(512, 256, generator=generator)
    rows = torch.randint(64, (8192,), generator=generator)
    by_rows = torch.randn(len(rows), 256, generator=generator)
    expected = torch.zeros(hidden.shape, dtype=torch.float64).index_add_(0, rows, by_rows.double())
    found = []
    for _ in range(5):
        own = _leaf(hidden, machine.device, torch.float32)
        picked = rows_of(own, rows.to(machine.device), sorts=machine.on_gpu)
        picked.backward(by_rows.to(machine.device))
        found.append(own.grad)
    others = sum(not torch.equal(found[0], other) for other in found[1:])
    off = relative(found[0], expected)
    value = f"{others} of {len(found) - 1} differ, off by {off:.1g}"
    return Found(others == 0 and off < 1e-5, value, "0, < 1e-05", {"differ": others, "off": off})
