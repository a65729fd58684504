"""What a check is, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NEEDS_A_GPU = "needs a GPU"


@dataclass(frozen=True)
class Machine:
    """device: where the checks compute. gpus: how many there are. folder: for what runs write."""

    device: "torch.device"
    gpus: int
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Found:
    """passed: None where the check states numbers without a bound, or cannot be carried out. value,
    bound: in words. broke: the check did not come to its end."""

    passed: bool | None
    value: str
    bound: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    broke: bool = False

    @classmethod
    def below(cls, errors: dict[str, float], bound: float) -> "Found":
        """Whether the largest of ``errors`` is below ``bound``; a NaN is not."""
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        passed = all(error < bound for error in errors.values())
        return cls(passed, f"{errors[worst]:.2g} ({worst})", f"< {bound:.2g}", errors)

    @classmethod
    def error(cls, error: Exception) -> "Found":
        """Of a check that raised."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return cls(False, text, broke=True)


@dataclass(frozen=True)
class Check:
    """name: for --only and the table. remedy: what to do where it fails. gpus: fewest GPUs that it
    asks for, 0 where a CPU does. runs: whether it starts whole training runs, which take minutes on
    a CPU. limit: seconds after which it is ended and has failed."""

    name: str
    says: str
    run: Callable[[Machine], Found]
    remedy: str
    gpus: int = 0
    runs: bool = False
    limit: float = 180


def relative(value: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Norm of the difference over the norm of the float64 ``reference``."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    # A gradient that is 0 is compared as it is.
    return float((value - reference).norm() / reference.norm().clamp(min=0.1))
