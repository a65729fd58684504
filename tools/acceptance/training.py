"""Whole runs of a tiny model: a reference, layouts, precisions and a resumed run against it."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from acceptance import engine
from acceptance.check import Found, Machine
from acceptance.program import REPOSITORY, TOOLS, run_program
from tests.tiny_run import RMT, STEPS, TRAINING, TinyInputs, build_inputs

PRETRAIN = REPOSITORY / "examples/pretrain_rmt.py"
# A run that takes this long hangs; start-up is most of what it takes.
LIMIT = 240
LIMIT_ON_CPU = 1200

MIXTURE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 "
    "--moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
)
# Fused layers of other packages have other roundings, and may not be there.
LOCAL = shlex.split(
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-persist-layer-norm --no-rope-fusion"
)
ENGINE = shlex.split(
    "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion"
)
# With thoughts of 1 to 24 tokens the ranks are done at different times in each step.
UNEVEN = "--train-iters 30 --rmt-initial-budget 12 --rmt-no-budget-decay --rmt-max-tokens 600"
# Qwen3-1.7B but for its vocabulary.
MEMORY_MODEL = (
    "--hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16 "
    "--group-query-attention --num-query-groups 8 --kv-channels 128 "
    "--max-position-embeddings 4096 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --bf16 "
    "--tokenizer-type HuggingFaceTokenizer"
)
MEMORY_STEPS = (
    "--train-iters 2 --seq-length 1024 --global-batch-size 2 --rmt-positions-per-sample 8 "
    "--rmt-initial-budget 64 --rmt-no-budget-decay"
)


def inputs(machine: Machine) -> Found:
    """The model, its checkpoint and token files; all runs need them."""
    made = build_inputs(machine.folder / "inputs")
    (machine.folder / "inputs/made").write_text("", encoding="utf-8")
    return Found(True, "made", "made", {"tokens": made.data.with_suffix(".bin").stat().st_size})


def _inputs(machine: Machine) -> TinyInputs:
    root = machine.folder / "inputs"
    if not (root / "made").exists():
        inputs(machine)
    return TinyInputs(root / "huggingface", root / "megatron", root / "data/train")


def _run(
    machine: Machine,
    name: str,
    ranks: int,
    flags: Sequence[str],
    resume_from: Path | None = None,
    own_model: Sequence[str] | None = None,
    program: Path = PRETRAIN,
) -> list[dict[str, float]]:
    """The lines of the metrics of a run, which is made once. own_model: flags of another model than
    the tiny one.

    Raises:
        RuntimeError: it failed or hangs; with its last lines.
    """
    name = name.replace("/", "_").replace(" ", "_")
    metrics, done = (machine.folder / f"{name}.{what}" for what in ("jsonl", "done"))
    if not done.exists():
        metrics.unlink(missing_ok=True)
        words = [str(program), *(own_model or _inputs(machine).flags(resume_from)), *RMT]
        words += ["--rmt-metrics-file", str(metrics)]
        words += [] if "transformer_engine" in flags else LOCAL
        # A rank that waits for another this long waits for good.
        words += ["--distributed-timeout-minutes", "2"] if machine.on_gpu else []
        words += flags
        run_program(machine, name, ranks, words, LIMIT if machine.on_gpu else LIMIT_ON_CPU)
        done.write_text("", encoding="utf-8")
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _apart(lines: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    return max(abs(a[name] - b[name]) for a, b in zip(lines, others, strict=True))


def rollouts_and_update(machine: Machine, flags: Sequence[str], bound: float) -> Found:
    """Mean |log-prob in the update - when drawn| of each step."""
    needs_engine = "transformer_engine" in flags
    if needs_engine and (reason := engine.lacking(machine)) is not None:
        return reason
    lines = _run(machine, "-".join(["agree", *flags]), 1, flags)
    differences = {f"step {i}": line["logprob difference"] for i, line in enumerate(lines, 1)}
    found = Found.below(differences, bound)
    return found if len(lines) == STEPS else Found(False, f"{len(lines)} steps", str(STEPS))


def resumed(machine: Machine) -> Found:
    """A run that is stopped after 3 of 6 steps and goes on, against one that is not."""
    saved = machine.folder / "saved"
    whole = _run(machine, "whole", 1, ["--bf16", "--save", str(saved), "--save-interval", "3"])
    second = _run(machine, "resumed", 1, ["--bf16", "--ckpt-step", "3"], resume_from=saved)
    errors = {name: _apart(whole[3:], second, name) for name in ("ntp loss", "grad norm")}
    return Found.below(errors, 1e-3)


def repeated(machine: Machine) -> Found:
    """How far two runs of the same seed are apart, in bf16; nothing is judged."""
    one, other = (_run(machine, f"again-{i}", 1, ["--bf16"]) for i in range(2))
    apart = {name: _apart(one, other, name) for name in ("ntp loss", "reward", "grad norm")}
    same = not any(apart.values())
    value = "bit for bit" if same else f"grad norm off by {apart['grad norm']:.1g}"
    return Found(None, value, numbers=apart)


def layout(machine: Machine, ranks: int, flags: str) -> Found:
    """The curve of several ranks against that of one, fp32."""
    one = _run(machine, "one", 1, [])
    several = _run(machine, flags or "dp", ranks, flags.split())
    names = ("ntp loss", "reward", "grad norm")
    return Found.below({name: _apart(several, one, name) for name in names}, 1e-3)


def experts(machine: Machine) -> Found:
    """The same of a mixture of experts, split over two ranks; both go on from one checkpoint."""
    saved, flags = machine.folder / "mixture", MIXTURE.split()
    first = [*flags, "--save", str(saved), "--save-interval", "1", "--exit-interval", "1"]
    _run(machine, "mixture-first", 1, [*first, "--load", str(machine.folder / "none")])
    goes_on = [*flags, "--exit-interval", "3", "--no-load-optim", "--no-load-rng"]
    one = _run(machine, "mixture-one", 1, goes_on, resume_from=saved)
    split = [*goes_on, "--expert-model-parallel-size", "2"]
    two = _run(machine, "mixture-two", 2, split, resume_from=saved)
    return Found.below({name: _apart(two, one, name) for name in ("ntp loss", "grad norm")}, 1e-3)


def uneven(machine: Machine) -> Found:
    """Many steps in which the ranks' rollouts have other lengths come to their end."""
    lines = _run(machine, "uneven", 2, UNEVEN.split())
    return Found(len(lines) == 30, f"{len(lines)} steps", "30")


def memory(machine: Machine) -> Found:
    """The most bytes that the allocator had given out, against the planner's peak without what it
    sets aside for CUDA and NCCL; on a CPU the planner's number alone."""
    model = _inputs(machine)
    target = machine.folder / "peak.json"
    layers, vocabulary = (28, 32768) if machine.on_gpu else (2, 512)
    flags = [*MEMORY_MODEL.split(), "--num-layers", str(layers)]
    flags += ["--tokenizer-model", str(model.huggingface), "--data-path", str(model.data)]
    flags += ["--make-vocab-size-divisible-by", str(vocabulary)]
    changes = MEMORY_STEPS.split()
    of_run = [*TRAINING, *flags]
    length = 64.0
    measured = None
    if machine.on_gpu:
        os.environ["ACCEPT_PEAK"] = str(target)
        lines = _run(
            machine, "memory", 1, changes, own_model=of_run, program=TOOLS / "acceptance/peak.py"
        )
        length = lines[-1]["thought length"]
        measured = json.loads(target.read_text(encoding="utf-8"))["allocated"]
    planned = _planned(machine, [*of_run, *RMT, *LOCAL, *changes], length)
    numbers = {"planned GiB": planned}
    if measured is None:
        return Found(None, f"planned {planned:.2f} GiB", numbers=numbers)
    numbers["allocated GiB"] = measured / 2**30
    off = planned / numbers["allocated GiB"] - 1
    value = f"planned {planned:.2f} GiB, allocated {numbers['allocated GiB']:.2f}, {off:+.0%}"
    return Found(abs(off) < 0.15, value, "within 15 %", numbers | {"off": off})


def _planned(machine: Machine, flags: Sequence[str], length: float) -> float:
    """GiB at the peak, the reserve left out, of thoughts of ``length`` tokens."""
    plan = machine.folder / "plan.json"
    words = [str(TOOLS / "plan.py"), "--hardware", "h100" if machine.on_gpu else "cpu"]
    words += ["--thought-length", str(length), "--json", str(plan), *flags]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"plan.py: {done.stderr.strip()[-200:]}")
    memory = json.loads(plan.read_text(encoding="utf-8"))["memory of a rank in GiB"]
    own = next(iter(memory.values()))
    return own["peak"] - own["reserve"]
