"""What a token of each row takes on the null device beside its layers, and what the attention of a
layer takes: events of ``device.counts``, as JSON.

    python -m tests.null_cuda.draws

Runs on the device of ``device.run``; draws as the first of two tensor-parallel ranks, and as one
alone, with the kernels and by the plain path.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.template import Template
from megatron_rmt.rollout import sampling
from megatron_rmt.rollout.kv_cache import KeyValueStore, LimitsVisibility, TailCache
from megatron_rmt.rollout.live_rollouts import LiveRollouts, RolloutPosition
from megatron_rmt.rollout.row_limits import RowLimits
from megatron_rmt.rollout.sampling import RolloutSettings
from tests.null_cuda import device, ranks

ROWS, COLUMNS = 64, 4097
KINDS = {
    "all": {},
    "top k": {"top_k": 20},
    "both": {"top_k": 20, "top_p": 0.9},
    "greedy": {},
}


def _events(call: Callable[[], Any]) -> dict[str, int]:
    # The first time compiles.
    for _ in range(2):
        before = device.counts()
        call()
        events = {n: count - before[n] for n, count in device.counts().items()}
    return {n: count for n, count in events.items() if count}


def _draw(
    kind: str, scores: Tensor, numbers: Tensor, group: dist.ProcessGroup | None
) -> Callable[[], Any]:
    given = {"temperature": 0.8, "vocab_start": 0, "tp_group": group}
    if kind == "greedy":
        return lambda: sampling.most_probable(scores, **given)
    return lambda: sampling.sample_tokens(scores, numbers, **given, **KINDS[kind])


def _rollouts() -> LiveRollouts:
    prompt = Prompt(
        template=Template("test", "", "{budget}", "</think>", "next"),
        encode=lambda text: [5, 6, 7],
        bytes_of=[b"a"] * COLUMNS,
        stop=[0],
        end_of_document=0,
        answer_tokens=1,
        force_close=True,
    )
    how = RolloutSettings(group=8, budget=4, seed=0, iteration=0, temperature=0.8)
    positions = [RolloutPosition(0, place, 0, place + 1, place + 1) for place in range(ROWS // 8)]
    on_device = torch.device("cuda")
    live = LiveRollouts(positions, prompt, how, prompt.bound(4), on_device, pads=True)
    live.write(live.newest, torch.empty(ROWS, device="cuda"))
    return live


def _attention() -> Callable[[], Any]:
    """Of one layer, of bf16 and heads of 128."""

    def rows(heads: int) -> Tensor:
        return torch.empty(ROWS, heads, 128, dtype=torch.bfloat16, device="cuda")

    indices = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    store, tails = KeyValueStore(512), TailCache(64)
    trunk = torch.empty(512, 2, 128, dtype=torch.bfloat16, device="cuda")
    store.write_trunk(1, 0, trunk, trunk)
    visibility = LimitsVisibility(
        tokens=ROWS,
        store=store,
        tails=tails,
        limits=RowLimits.of(*[indices] * 4),
        written=indices[None],
        columns=indices,
        count=ROWS + 1,
    )
    assert visibility.take_angles(torch.zeros(ROWS, 1, 1, 128, device="cuda"))
    return lambda: visibility.attend(LayerAttention(1, 0.1), rows(8), rows(2), rows(2))


def main() -> None:
    """Print ``{"draws": {ranks: {kind: {path: events}}}, what else: events}``."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ranks.stand_alone()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=2)
    scores = torch.empty(ROWS, COLUMNS, device="cuda")
    uniforms = torch.empty(ROWS, dtype=torch.float64, device="cuda")
    draws: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for name, group in {"1": None, "2": dist.group.WORLD}.items():
        for kind in KINDS:
            own = draws.setdefault(name, {}).setdefault(kind, {})
            for path in ("kernels", "plain"):
                kernels = sampling._triton() if path == "kernels" else None
                with mock.patch.object(sampling, "_triton", return_value=kernels):
                    own[path] = _events(_draw(kind, scores, uniforms, group))
    live = _rollouts()
    log_probs = torch.empty(ROWS, device="cuda")
    found = {
        "draws": draws,
        "numbers": _events(live.draws),
        "write": _events(lambda: live.write(live.newest, log_probs)),
        "attention": _events(_attention()),
    }
    print(json.dumps(found))
    sys.stdout.flush()
    # What is left waits for ranks that are not there.
    os._exit(0)


if __name__ == "__main__":
    main()
