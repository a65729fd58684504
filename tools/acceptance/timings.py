"""What only a GPU can say: seconds, waits and memory. Nothing here has a form for a CPU."""

from collections.abc import Callable
from unittest import mock

import torch

from acceptance.check import Found, Machine
from megatron_rmt.model import tree_attention
from megatron_rmt.model.blocks import Block, position_block
from megatron_rmt.model.head import token_loss_sum
from megatron_rmt.model.tree_attention import FLEX_OPTIONS as OURS
from megatron_rmt.model.tree_attention import FlexAttention


def _milliseconds(machine: Machine, work: Callable[[], object], repeats: int = 10) -> float:
    """Median time on the device, after three calls that warm up."""
    times = []
    for index in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(machine.device)
        if index >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def flex_speed(machine: Machine) -> Found:
    """FlexAttention, forward and backward, over a causal sequence and over a tree."""
    numbers = {}
    trees = {"causal 8192": [Block(0, 8192)]}
    blocks = [Block(0, 4096)]
    for _ in range(4):
        blocks.append(position_block(blocks[-1].limit, 0, 3000, 64, [250] * 8))
    trees["tree"] = blocks
    heads, kv_heads, width = 10, 2, 128
    for name, blocks in trees.items():
        tokens = blocks[-1].limit
        pairs = sum(_pairs(block) for block in blocks)
        query, key, value = (
            torch.randn(tokens, count, width, device=machine.device, dtype=torch.bfloat16)
            for count in (heads, kv_heads, kv_heads)
        )
        for x in (query, key, value):
            x.requires_grad_()
        attend = FlexAttention(blocks)

        def forward(attend=attend, inputs=(query, key, value)) -> torch.Tensor:
            return attend(*inputs, width**-0.5)

        flops = 4 * pairs * heads * width
        seconds = _milliseconds(machine, forward) / 1e3
        numbers[f"{name}: forward TFLOP/s"] = flops / seconds / 1e12
        for kind, options in (("our", OURS), ("torch's", {})):
            with mock.patch.object(tree_attention, "FLEX_OPTIONS", options):
                both = _milliseconds(machine, lambda own=forward: own().sum().backward()) / 1e3
            numbers[f"{name}: backward TFLOP/s, {kind} blocks"] = (
                2.5 * flops / (both - seconds) / 1e12
            )
    value = ", ".join(f"{name} {number:.0f}" for name, number in numbers.items())
    return Found(None, value, numbers=numbers)


def _pairs(block: Block) -> int:
    rows, stem = block.limit - block.first, block.stem_limit - block.first
    own = sum(n * (n + 1) // 2 for n in (stem, *block.branches)) + sum(block.branches) * stem
    return own + rows * (block.trunk_limit - block.trunk_first)


def head_speed(machine: Machine) -> Found:
    """The head of a model of 14B at TP 4: 16,384 rows, 37,984 tokens, hidden size 5,120."""
    rows, columns, hidden_size = 16384, 37984, 5120
    hidden, weight = (
        torch.randn(
            size, hidden_size, device=machine.device, dtype=torch.bfloat16, requires_grad=True
        )
        for size in (rows, columns)
    )
    targets = torch.randint(columns, (rows,), device=machine.device)
    numbers = {}
    for chunk in (384, 4096):
        torch.cuda.reset_peak_memory_stats(machine.device)

        def both(chunk: int = chunk) -> None:
            total, _ = token_loss_sum(
                hidden,
                weight,
                targets,
                lambda of, own: own,
                vocab_size=columns,
                tp_group=None,
                chunk_size=chunk,
            )
            total.backward()

        seconds = _milliseconds(machine, both, repeats=5) / 1e3
        numbers[f"chunks of {chunk}: TFLOP/s"] = 6 * rows * columns * hidden_size / seconds / 1e12
        peak = torch.cuda.max_memory_allocated(machine.device)
        numbers[f"chunks of {chunk}: peak GiB"] = peak / 2**30
    value = ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())
    return Found(None, value, numbers=numbers)


def waits(machine: Machine) -> Found:
    """That the head, forward and backward, never waits for the device."""
    hidden, weight = (
        torch.randn(size, 64, device=machine.device, requires_grad=True) for size in (300, 4096)
    )
    targets = torch.randint(4096, (300,), device=machine.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total, _ = token_loss_sum(
            hidden,
            weight,
            targets,
            lambda of, own: own,
            vocab_size=4000,
            tp_group=None,
            chunk_size=128,
        )
        total.backward()
    except RuntimeError as error:
        return Found(False, str(error).splitlines()[0], "no wait")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Found(True, "no wait", "no wait")
