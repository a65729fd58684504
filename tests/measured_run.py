"""Measure a whole run: matrix products of each phase of each step, and the peak of its memory.

``main`` runs examples/pretrain_rmt.py, unchanged but watched; a program for ``tests.tiny_run.run``
is two lines that call it.
"""

import contextlib
import ctypes
import functools
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PRETRAIN = Path(__file__).resolve().parents[1] / "examples/pretrain_rmt.py"
_M_MMAP_THRESHOLD = -3


def _attention(query: torch.Tensor, key: torch.Tensor, causal: bool, products: int) -> int:
    """Of flash attention, which leaves out what a causal mask hides."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    pairs = queries * (queries + 1) // 2 if causal else queries * keys
    return 2 * products * batch * heads * pairs * width


_FORMULAS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class FlopCount(TorchDispatchMode):
    """Counts the operations of torch's own products, by torch's own formulas, as they run; torch
    has none for attention on the CPU, of which two and five products are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _FORMULAS:
            self.total += _FORMULAS[packet](*args, **kwargs, out_val=result)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
            self.total += _attention(args[0], args[1], causal, products=2)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += _attention(args[1], args[2], args[7], products=5)
        return result


def _memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since ``_forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _return_what_is_freed() -> None:
    """Give each block of 64 KiB and more back at once, so that resident is what is allocated."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


class Watch:
    """Operations and peak memory, phase by phase."""

    def __init__(self, target: Path, counts_flops: bool) -> None:
        self.target, self.counts_flops = target, counts_flops
        self.baseline = 0
        self.measured: dict[str, int] = {}

    def phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with what it takes added under ``name``."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            count = FlopCount()
            _forget_peak()
            with count if self.counts_flops else contextlib.nullcontext():
                result = function(*args, **kwargs)
            flops = self.measured.get(f"{name} flops", 0) + count.total
            self.measured[f"{name} flops"] = flops
            peak = max(_memory("VmHWM") - self.baseline, self.measured.get(f"{name} bytes", 0))
            self.measured[f"{name} bytes"] = peak
            return result

        return watched

    def before_the_model(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def building(*args: Any, **kwargs: Any) -> Any:
            self.baseline = _memory("VmRSS")
            return function(*args, **kwargs)

        return building

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.measured = {}
            result = function(*args, **kwargs)
            with open(self.target, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.measured) + "\n")
            return result

        return watched


def main(target: Path, counts_flops: bool) -> None:
    """Run examples/pretrain_rmt.py with the flags of ``sys.argv``.

    target: gets a JSON line for each step. counts_flops: takes long, so it is left out where memory
    alone is of interest.
    """
    from megatron.training import training

    from megatron_rmt import step
    from megatron_rmt.job import patches

    _return_what_is_freed()
    watch = Watch(target, counts_flops)
    step.read_trunk = watch.phase("trunk", step.read_trunk)
    step.generate = watch.phase("rollout", step.generate)
    # What RMT's step calls once its rollouts are done.
    training.train_step = watch.phase("update", training.train_step)
    patches.run_step = watch.step(patches.run_step)
    training.setup_model_and_optimizer = watch.before_the_model(training.setup_model_and_optimizer)
    runpy.run_path(str(PRETRAIN), run_name="__main__")
