"""What drawing a token for each row takes on the null device, as JSON: events of ``device.counts``.

    python -m tests.null_cuda.draws

Runs on the device of ``device.run``; two tensor-parallel ranks, of which this is the first, and
one alone; with the kernels and by the plain path.
"""

import json
import os
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmt.rollout import sampling
from tests.null_cuda import device, ranks

ROWS, COLUMNS = 64, 4097
KINDS = {"all": {}, "top k": {"top_k": 20}, "both": {"top_k": 20, "top_p": 0.9}}


def _events(
    scores: Tensor, uniforms: Tensor, group: dist.ProcessGroup | None, how: dict[str, Any]
) -> dict[str, int]:
    # The first time compiles.
    for _ in range(2):
        before = device.counts()
        sampling.sample_tokens(
            scores, uniforms, temperature=0.8, vocab_start=0, tp_group=group, **how
        )
        events = {n: count - before[n] for n, count in device.counts().items()}
    return {n: count for n, count in events.items() if count}


def main() -> None:
    """Print ``{ranks: {kind: {path: events}}}``."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ranks.stand_alone()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=2)
    scores = torch.empty(ROWS, COLUMNS, device="cuda")
    uniforms = torch.empty(ROWS, dtype=torch.float64, device="cuda")
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for name, group in {"1": None, "2": dist.group.WORLD}.items():
        for kind, how in KINDS.items():
            own = found.setdefault(name, {}).setdefault(kind, {})
            for path in ("kernels", "plain"):
                kernels = sampling._triton() if path == "kernels" else None
                with mock.patch.object(sampling, "_triton", return_value=kernels):
                    own[path] = _events(scores, uniforms, group, how)
    print(json.dumps(found))
    sys.stdout.flush()
    # What is left waits for ranks that are not there.
    os._exit(0)


if __name__ == "__main__":
    main()
