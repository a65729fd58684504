"""What a check is, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NEEDS_A_GPU = "needs a GPU"


@dataclass(frozen=True)
class Machine:
    """device: where the checks compute. gpus: how many there are. folder: for what runs write."""

    device: torch.device
    gpus: int
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Found:
    """passed: None where the check states numbers without a bound. value, bound: in words."""

    passed: bool | None
    value: str
    bound: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def below(cls, errors: dict[str, float], bound: float) -> "Found":
        """Whether the largest of ``errors`` is below ``bound``; a NaN is not."""
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        passed = all(error < bound for error in errors.values())
        return cls(passed, f"{errors[worst]:.2g} ({worst})", f"< {bound:.2g}", errors)


@dataclass(frozen=True)
class Check:
    """name: for --only and the table. gpus: fewest GPUs that it asks for, 0 where a CPU does.
    runs: whether it starts whole training runs, which take minutes on a CPU."""

    name: str
    says: str
    run: Callable[[Machine], Found]
    gpus: int = 0
    runs: bool = False


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the float64 ``reference``."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    # A gradient that is 0 is compared as it is.
    return float((value - reference).norm() / reference.norm().clamp(min=0.1))
