"""Rollouts of a model of known sizes: with and without the decode graph, and what a token takes."""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from acceptance.check import Found, Machine
from benchmarks.random_model import random_model
from benchmarks.rollout import KnownLengths, KnownLengthsPrompt
from megatron_rmt.model.gpt import Policy, generating
from megatron_rmt.probe import document_sample
from megatron_rmt.prompt.template import Template
from megatron_rmt.rollout import generate as generate_module
from megatron_rmt.rollout.generate import RolloutSettings, generate
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.prefill import read_trunk
from megatron_rmt.rollout.responses import Rollout
from tests.distributed import single_process_megatron


@dataclass(frozen=True)
class Sizes:
    """Of a model, and of the rollouts: ``positions`` in each sample, ``group`` of each."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    trunk: int
    positions: int
    group: int
    tokens: int


# Qwen3-14B as one rank of TP 4 holds it, with a quarter of its tokens of a step.
LARGE = Sizes(40, 5120, 4352, 10, 2, 128, 37984, 1024, 8, 8, 96)
# Small enough for a CPU, and for an exact comparison.
SMALL = Sizes(2, 64, 96, 4, 2, 16, 199, 24, 3, 4, 12)


def _model(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Policy:
    single_process_megatron()
    model = random_model(
        layers=sizes.layers,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        width=sizes.dim,
        vocab_size=sizes.vocab,
        longest=4096,
        dtype=dtype,
        device=device,
        deviation=0.02 if sizes.layers > 2 else 0.2,
    )
    return Policy(model, sizes.vocab, longest_position=4096, head_chunk_size=256)


def _prompt(sizes: Sizes, spread: bool, device: torch.device) -> KnownLengthsPrompt:
    """Responses are all thought; their lengths are known, or spread."""
    lengths = KnownLengths(sizes.vocab, sizes.tokens, spread)
    for name in ("next_state", "thinking", "done"):
        setattr(lengths, name, getattr(lengths, name).to(device))
    return KnownLengthsPrompt(
        template=Template("lengths", "", "{budget}", "</think>", "next"),
        encode=lambda text: [5, 6, 7],
        bytes_of=[b"a"] * sizes.vocab,
        stop=[],
        end_of_document=-1,
        answer_tokens=0,
        lengths=lengths,
    )


def _rollouts(
    policy: Policy, sizes: Sizes, samples: int, graph: bool, spread: bool
) -> tuple[list[Rollout], float]:
    """The responses to positions of ``samples`` documents, and the seconds from the stems on."""
    device = policy.device
    generator = torch.Generator().manual_seed(8)
    store = KeyValueStore(samples * sizes.trunk)
    positions = []
    with generating(policy.model):
        for sample in range(samples):
            document = torch.randint(sizes.vocab, (sizes.trunk,), generator=generator)
            first = sample * sizes.trunk
            read_trunk(policy, [document_sample(document)], store, first)
            for place in range(1, sizes.positions + 1):
                seen = place * sizes.trunk // sizes.positions
                positions.append(RolloutPosition(sample, seen, first, first + seen, seen))
        settings = RolloutSettings(
            group=sizes.group,
            budget=-(-sizes.tokens // 2),
            seed=1,
            iteration=0,
            temperature=0.8,
            graph=graph,
        )
        prompt = _prompt(sizes, spread, device)
        _finish(device)
        began = time.perf_counter()
        groups = generate(policy, prompt, store, positions, settings)
        _finish(device)
    return [own for group in groups for own in group], time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _recordings() -> Iterator[list[bool]]:
    """Of each step that was to be recorded, whether it was."""
    made: list[bool] = []
    record = generate_module.record

    @functools.wraps(record)
    def noted(step: Callable[[], None]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded = record(step)
        made.append(recorded is not step)
        return recorded

    with mock.patch.object(generate_module, "record", noted):
        yield made


def _apart(some: list[Rollout], others: list[Rollout]) -> tuple[int, float]:
    """Responses with other tokens, and the largest difference of log-probs of those with the
    same."""
    differ, off = 0, 0.0
    for one, other in zip(some, others, strict=True):
        if not np.array_equal(one.tokens, other.tokens):
            differ += 1
        elif len(one.log_probs):
            off = max(off, float(np.abs(one.log_probs - other.log_probs).max()))
    return differ, off


def graph(machine: Machine) -> Found:
    """The same tokens from recorded steps; on a CPU, where nothing is recorded, from steps that
    read from vectors what a row sees, against steps that slice."""
    policy = _model(SMALL, torch.float32, machine.device)
    with _recordings() as made:
        if machine.on_gpu:
            plain, _ = _rollouts(policy, SMALL, 2, graph=False, spread=True)
            recorded, _ = _rollouts(policy, SMALL, 2, graph=True, spread=True)
        else:
            plain, _ = _rollouts(policy, SMALL, 2, graph=False, spread=True)
            with mock.patch.object(generate_module, "tells_limits", return_value=True):
                recorded, _ = _rollouts(policy, SMALL, 2, graph=False, spread=True)
    differ, off = _apart(recorded, plain)
    unrecorded = made.count(False) if made else int(machine.on_gpu)
    numbers = {"responses": len(plain), "differ": differ, "log-probs": off, "graphs": len(made)}
    value = f"{differ} of {len(plain)} differ, {len(made)} graphs, {unrecorded} not recorded"
    passed = differ == 0 and unrecorded == 0 and off < 1e-4
    return Found(passed, value, "0, 0 not recorded", numbers | {"not recorded": unrecorded})


def speed(machine: Machine) -> Found:
    """Milliseconds of a token of all rows with 4 and 16 samples, with and without the graph."""
    sizes = LARGE if machine.on_gpu else SMALL
    dtype = torch.bfloat16 if machine.on_gpu else torch.float32
    policy = _model(sizes, dtype, machine.device)
    numbers: dict[str, float] = {}
    for samples in (4, 16) if machine.on_gpu else (1, 2):
        for name, recorded in {"graph": True, "no graph": False}.items():
            if recorded and not machine.on_gpu:
                continue
            # The first time compiles.
            taken = [
                _rollouts(policy, sizes, samples, recorded, spread=False)[1] for _ in range(3)
            ][1:]
            numbers[f"{samples} samples, {name}"] = 1e3 * min(taken) / sizes.tokens
    if machine.on_gpu:
        numbers["reading the weights alone"] = 1e3 * _seconds_to_read(policy)
    value = ", ".join(f"{name} {number:.1f}" for name, number in numbers.items())
    return Found(None, f"ms a token: {value}", numbers=numbers)


def _seconds_to_read(policy: Policy) -> float:
    """What a copy of as many bytes as half of the weights, read and written, takes."""
    size = sum(weight.nbytes for weight in policy.model.parameters())
    source = torch.zeros(size // 2, dtype=torch.uint8, device=policy.device)
    target, taken = torch.empty_like(source), []
    for _ in range(3):
        _finish(policy.device)
        began = time.perf_counter()
        target.copy_(source)
        _finish(policy.device)
        taken.append(time.perf_counter() - began)
    return min(taken)
