"""Whole runs of a hybrid stack: Mamba, attention and MLP layers, in Megatron's own loop.

The model is pre-trained by the program itself, without RMT, on text in which thoughts are closed
here and there, so that some of its thoughts end and some of its answers are right.
"""

import json
import random
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.tiny_run import (
    REPOSITORY,
    RMT,
    STEPS,
    Line,
    Run,
    TinyInputs,
    _python,
    checkpoint_tensors,
    run,
)
from tests.training_curves import OVERLAP, PACKED, SHARDED_OPTIMIZER, TP2, Start, assert_same_curve

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STACK = shlex.split(
    "--hybrid-layer-pattern M*M- --position-embedding-type none --mamba-state-dim 16 "
    "--mamba-head-dim 16 --mamba-num-groups 2 --mamba-num-heads 8"
)
BEFORE = shlex.split(
    "--train-iters 200 --micro-batch-size 16 --global-batch-size 16 --lr 4e-3 --clip-grad 1"
)
LAYOUTS = {
    "TP2": (2, TP2),
    "DP2, distributed optimizer": (2, SHARDED_OPTIMIZER + OVERLAP),
    "packed, micro-batches of 2": (1, [*PACKED, "--micro-batch-size", "2"]),
    "packed, DP2": (2, PACKED),
    "full recompute": (
        1,
        shlex.split(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        ),
    ),
}


def _with_thoughts(text: str, seed: int) -> str:
    """``text`` with thoughts before some of its words, of the words before these."""
    draws, words, written = random.Random(seed), text.split(" "), []
    for index, word in enumerate(words):
        if draws.random() < 0.15:
            thought = " ".join(words[max(0, index - draws.randint(1, 4)) : index])
            word = f"<think budget={draws.randint(1, 6)}>{thought}</think>{word}"
        written.append(word)
    return " ".join(written)


@pytest.fixture(scope="session")
def start(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """``start(ranks, flags)``: a run from the pre-trained checkpoint, or from a run's."""
    root = tmp_path_factory.mktemp("hybrid")
    lines = (inputs.data.parents[1] / "corpus/train.jsonl").read_text().splitlines()
    texts = [_with_thoughts(json.loads(line)["text"], seed) for seed, line in enumerate(lines)]
    (root / "mixed.jsonl").write_text("".join(json.dumps({"text": own}) + "\n" for own in texts))
    _python(
        f"{REPOSITORY}/tools/preprocess_data.py --input {root}/mixed.jsonl "
        f"--output-prefix {root}/mixed --tokenizer {inputs.huggingface}"
    )
    flags = [*inputs.flags(root / "nothing"), *STACK, *BEFORE, "--data-path", f"{root}/mixed"]
    run(root / "before", 1, [*flags, "--save", f"{root}/model", "--save-interval", "1000"])

    def start_run(ranks: int, flags: Sequence[str], resume_from: Path | None = None) -> Run:
        directory = tmp_path_factory.mktemp("run") / "logs"
        own = [*inputs.flags(resume_from or root / "model"), *STACK]
        own += [] if resume_from else ["--finetune"]
        return run(directory, ranks, [*own, *flags])

    return start_run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reference leaves its last checkpoint."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture(scope="session")
def reference(start: Start, saved: Path) -> Run:
    """Six steps of one process."""
    return start(1, [*RMT, "--save", str(saved), "--save-interval", str(STEPS)])


@pytest.fixture(scope="session")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """The checkpoint of three steps, and their run."""
    directory = tmp_path_factory.mktemp("stopped")
    flags = ["--save", str(directory), "--save-interval", "3", "--exit-interval", "3"]
    return directory, start(1, [*RMT, *flags])


def test_the_reference_is_worth_comparing_with(reference: Run):
    lines: list[Line] = reference.metrics
    assert len(lines) == STEPS
    for tier in ("easy", "medium", "hard"):
        assert sum(line[f"chosen {tier}"] for line in lines) > 0, tier
    assert any(0 < line["closed by itself"] < 1 for line in lines)
    assert any(0 < line["match rate"] < 1 for line in lines)
    assert any(line["zero-variance groups"] < 1 for line in lines)
    assert len({line["rollout checksum"] for line in lines}) == STEPS


@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_trains_like_one_process(
    start: Start, reference: Run, ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*RMT, *flags]).metrics, reference.metrics)


def test_rollouts_in_waves_train_alike(start: Start, reference: Run):
    in_waves = start(1, [*RMT, "--rmt-rollout-kv-gib", "0.0012"])
    assert re.search(r"20992 of states a rollout; [2-9] wave\(s\)", in_waves.log)
    assert_same_curve(in_waves.metrics, reference.metrics)


def test_greedy_rollouts_are_alike_in_every_layout(start: Start):
    greedy = [*RMT, "--rmt-greedy"]
    assert_same_curve(start(2, [*greedy, *TP2]).metrics, start(1, greedy).metrics)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    start: Start, reference: Run, saved: Path, stopped: tuple[Path, Run], tmp_path: Path
):
    directory, first_half = stopped
    assert first_half.metrics == reference.metrics[:3]
    flags = ["--save", str(tmp_path / "second"), "--save-interval", str(STEPS)]
    assert start(1, [*RMT, *flags], resume_from=directory).metrics == reference.metrics[3:]
    ours, expected = (checkpoint_tensors(of, STEPS) for of in (tmp_path / "second", saved))
    assert ours.keys() == expected.keys()
    assert any("mixer.conv1d" in name and "exp_avg_sq" in name for name in ours)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    before = checkpoint_tensors(directory, 3)
    moved = [name for name in expected if not torch.equal(before[name], expected[name])]
    for part in ("mixer.A_log", "mixer.dt_bias", "mixer.D", "mixer.conv1d.weight.x", "mixer.norm"):
        assert any(part in name for name in moved), part


def test_a_run_resumed_on_two_ranks_goes_on_alike(
    start: Start, reference: Run, stopped: tuple[Path, Run]
):
    second_half = start(2, [*RMT, *TP2], resume_from=stopped[0])
    assert_same_curve(second_half.metrics, reference.metrics[3:])
