"""Where checkpoints go, and what goes in: finite numbers only, whichever path saves."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def save_problem(save: str | None) -> str | None:
    """One sentence if checkpoints could not be written: tried now, not after the first hours."""
    if not save or "://" in save:
        return None
    try:
        os.makedirs(save, exist_ok=True)
        with tempfile.TemporaryFile(dir=save) as file:
            file.write(b"RMT")
    except OSError as error:
        return (
            f"--save is {save}, which cannot be written to ({error.strerror}); pass a folder "
            "with room that this user may write to."
        )
    return None


def unwritten(folder: Path, failures: Mapping[int, tuple[BaseException, Any]]) -> str:
    """One sentence on a checkpoint that could not be written. failures: (error, ...) by rank."""
    rank, (error, *_) = next(iter(failures.items()))
    reason = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(OSError):
        reason += f"; {shutil.disk_usage(folder).free / 1e6:.3g} MB are free there"
    return (
        f"RMT: the checkpoint {folder} is not written (rank {rank}: {reason}); make room, or look "
        "at the disk and its rights, and restart from the last checkpoint, which is as it was."
    )


@torch.no_grad()
def refuse_what_is_not_finite(model: list[torch.nn.Module], optimizer: Any, iteration: int) -> None:
    """Collective over all ranks; waits for the device once, after a pass over the weights and the
    optimizer's state of this rank.

    Raises:
        SystemExit: a number is not finite; on every rank, before anything is written.
    """
    tensors = dict(_saved(model, optimizer))
    # The largest magnitude is not finite where one number is not, and cannot overflow.
    largest = [torch.linalg.vector_norm(own, torch.inf) for own in tensors.values()]
    broken = torch.zeros(1, device=torch.cuda.current_device())
    for own in largest:
        broken += (~own.isfinite()).to(broken.device)
    dist.all_reduce(broken)
    if not broken.item():
        return
    names = [name for name, own in zip(tensors, largest, strict=True) if not own.isfinite()]
    found = [names] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, names)
    rank, first = next((rank, names[0]) for rank, names in enumerate(found) if names)
    raise SystemExit(
        f"RMT: the checkpoint of iteration {iteration} is not written: {first} of rank {rank} "
        f"holds numbers that are not finite, as do {sum(map(len, found)) - 1} other tensors; "
        "restart from the last checkpoint, which is as it was."
    )


def _saved(model: list[torch.nn.Module], optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a rank that a checkpoint would hold, by name."""
    # ``console`` reads this module before Megatron, whose warnings it leaves out, is imported.
    from megatron_rmt.model.gpt import named_parameters

    for name, own in named_parameters(model):
        if own.numel():
            yield name, own.detach()
    for number, single in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        inner = getattr(single, "optimizer", None)
        groups = [group["params"] for group in getattr(inner, "param_groups", ())]
        for index, own in enumerate(itertools.chain.from_iterable(groups)):
            # In half precision the optimizer trains a copy in fp32.
            held = {"main weight": own.detach(), **inner.state.get(own, {})}
            for name, value in held.items():
                if torch.is_tensor(value) and value.is_floating_point() and value.numel():
                    yield f"the optimizer's {name} {number}.{index}", value
