"""One process as one rank of many: the other ranks say what this one would."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


class LonelyStore(dist.Store):
    """Holds what this rank sets; what another should have set is a message of NCCL's size."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.counters: Counter[str] = Counter()

    def set(self, key: str, value: str | bytes) -> None:
        self.values[key] = value if isinstance(value, bytes) else value.encode("latin1")

    def get(self, key: str) -> bytes:
        return self.values.get(key, bytes([1]) * 128)

    def add(self, key: str, amount: int) -> int:
        self.counters[key] += amount
        return self.counters[key]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.set(key, desired)
        return self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self.values for key in keys)

    def wait(self, *_: Any) -> None:
        """Nobody is waited for."""

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self.values)

    def set_timeout(self, timeout: timedelta) -> None:
        """Nothing takes time."""

    def clone(self) -> "LonelyStore":
        return self


def stand_alone() -> None:
    """Let ``torch.distributed`` believe that all ranks of RANK and WORLD_SIZE are there."""
    initialize, stores = dist.init_process_group, []

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        stores.append(LonelyStore())
        initialize(*args, **kwargs | {"store": stores[-1], "timeout": timedelta(seconds=60)})

    dist.init_process_group = init_process_group
    distributed_c10d._store_based_barrier = lambda *_, **__: None
    dist.all_gather_object = _all_gather_object
    dist.broadcast_object_list = _broadcast_object_list


def _all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
    found[:] = [own] * len(found)


def _broadcast_object_list(objects: list[Any], *_: Any, **__: Any) -> None:
    """What this rank holds is what the source holds, or None for "no problem"."""


def batch_of_stage(value: dict[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
    """Stands in for ``user_batch._from_stage``: another stage's part of this rank's batch."""
    from megatron.training import get_args

    if value:
        return value
    args = get_args()
    tokens = torch.arange(args.seq_length).remainder(150).add(32)
    tokens = tokens.repeat(args.micro_batch_size, 1)
    if stage == 0:
        positions = torch.arange(args.seq_length).expand_as(tokens)
        return {"input_ids": tokens, "position_ids": positions}
    return {"labels": tokens.roll(-1, 1), "loss_mask": torch.ones(tokens.shape)}
