"""tools/study.py: what a study may say, that stages are done once, and the statistics of seeds."""

import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.settings import flag_name
from tests.distributed import REPOSITORY
from tests.tiny_run import TinyInputs

sys.path.insert(0, str(REPOSITORY / "tools"))

import study
import study_tables
from evaluation import RESAMPLES, Measured, Record, resample, write_output

SETTINGS = {
    "samples": 1,
    "seed": 3,
    "entropy_thresholds": [0.5, 1.0, 1.5],
    "prompt": {"head": "", "stem": "", "close": "", "digest": "0a"},
}
CONTENT: dict[str, Any] = {
    "model": "somewhere",
    "seeds": [1, 2],
    "reference": "plain",
    "heldout": {"a": "{folder}/a.jsonl"},
    "arms": {
        "plain": {"flags": "--rmt-no-rl"},
        "RMT": {"from": "plain", "flags": "", "reason": True},
        "longer": {"flags": "", "time_of": "RMT", "step_time_of": "plain"},
        "other": {"flags": ""},
    },
}
POST_TRAIN: dict[str, Any] = {
    "after": ["plain", "RMT"],
    "data": "{folder}/questions",
    "marker": "Answer: ",
    "heldout": {"asked": "{folder}/asked.jsonl"},
    "flags": "--train-iters 3",
    "positions": "--positions answers",
}


def written(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(CONTENT | changes, sort_keys=False))
    return path


def measured(rights: list[list[int]]) -> Measured:
    """An evaluation of as many documents as ``rights``, each with an answer at each position."""
    records = [
        Record(
            file="a",
            line=line,
            id="",
            tokens=len(own) + 1,
            dropped=0,
            difficulty="-" + "3" * len(own),
            next_token="0" * (len(own) + 1),
            entropy=1.0,
            positions=list(range(1, len(own) + 1)),
            thought=own,
        )
        for line, own in enumerate(rights, 1)
    ]
    return Measured(SETTINGS, records)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": 3}, "model is 3; it must be a str"),
        ({"seeds": []}, "arms and seeds, whole numbers, must not be empty"),
        ({"seeds": ["1"]}, "arms and seeds, whole numbers, must not be empty"),
        ({"reference": "nobody"}, "reference is 'nobody'; name one of the arms"),
        ({"colour": "red"}, "'colour' is unknown"),
        ({"arms": {"plain": "--flag"}}, "arms: plain: '--flag' must be a mapping with flags"),
        ({"arms": {"plain": {"flags": "", "colour": 1}}}, "arms: plain: 'colour' is unknown"),
        ({"arms": {"a/b": {"flags": ""}}}, "arms: a/b is no name of a file; leave out the /."),
        ({"arms": {"plain": {"flags": 1}}}, "arms: plain: flags is 1; it must be a str"),
        (
            {"arms": {"plain": {"flags": "", "from": "RMT"}, "RMT": {"flags": ""}}},
            "arms: plain: from is 'RMT'; name an arm before it",
        ),
        (
            {"arms": {"a": {"flags": ""}, "plain": {"flags": "", "time_of": "a"}}},
            "arms: plain: time_of and step_time_of belong together",
        ),
        ({"post_train": {"colour": 1}}, "post_train: 'colour' is unknown"),
        ({"post_train": {"after": "RMT"}}, "post_train: after is 'RMT'; it must be a list"),
        (
            {"post_train": POST_TRAIN | {"marker": 3}},
            "post_train: marker is 3; it must be a str",
        ),
        (
            {"post_train": POST_TRAIN | {"after": ["RMT", "nobody"]}},
            "post_train: after has 'nobody'; name arms of the study",
        ),
        (
            {"post_train": POST_TRAIN | {"after": []}},
            "post_train: after has ''; name arms of the study",
        ),
        (
            {"post_train": POST_TRAIN | {"heldout": {"a": "a.jsonl"}}},
            "post_train: heldout: 'a' is one of the study's; rename it",
        ),
        (
            {"post_train": POST_TRAIN | {"after": ["RMT", "RMT"]}},
            "post_train: after: an arm has that name already; rename it",
        ),
    ],
)
def test_what_a_study_cannot_mean_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
):
    path = written(tmp_path / "study.yaml", **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {sentence}')}"):
        study.read_study(path)


@pytest.mark.parametrize("text", ["[", "- a\n", "", "\0"])
def test_a_file_that_is_no_study_is_one_sentence(tmp_path: Path, text: str):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit, match=str(path)):
        study.main([str(path), "--output", str(tmp_path)])


def test_a_pipe_is_no_study(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"cannot be read: .*it is a pipe or a device"):
        study.read_study(tmp_path / "pipe")


def test_the_studies_of_the_examples_can_be_read():
    paths = list((REPOSITORY / "examples/studies").iterdir())
    assert paths
    known = {flag_name(field.name) for field in fields(Settings)}
    for path in paths:
        study.read_study(path)
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"--rmt-[a-z-]+", text)) <= known, path


def test_arms_need_those_they_build_on_and_the_first(tmp_path: Path):
    found = study.read_study(written(tmp_path / "study.yaml"))
    assert study.needed(found, ["other"]) == ["plain", "other"]
    assert study.needed(found, ["longer"]) == ["plain", "RMT", "longer"]
    with pytest.raises(ValueError, match="--arms nobody: the study has plain, RMT, longer, other"):
        study.needed(found, ["nobody"])


def commands_of(
    monkeypatch: pytest.MonkeyPatch, folder: Path, arms: list[str], **changes: Any
) -> dict[str, tuple[str, dict[str, str], str]]:
    """What ``run_seed`` would start: command, environment and the stamps it builds on, by stage."""
    found = {}

    def run(
        stages: study.Stages,
        name: str,
        command: list[str],
        after: str = "",
        environment: dict[str, str] | None = None,
    ) -> str:
        found[name] = (" ".join(command), environment or {}, after)
        return f"<{name}>"

    monkeypatch.setattr(study.Stages, "run", run)
    asked = study.read_study(written(folder / "study.yaml", **changes))
    study.run_seed(asked, 2, folder / "out", study.needed(asked, arms))
    return found


def test_post_training_begins_with_an_arm_and_asks_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {
        "prepare": ["make {seed}"],
        "train": "--seq-length 8",
        "reason": "--rmt-template inline",
        "evaluate": "--budget 4",
        "post_train": POST_TRAIN | {"prepare": ["ask {seed}"]},
    }
    arms = ["RMT, post-trained"]
    found = commands_of(monkeypatch, tmp_path, arms, **changes)
    folder = tmp_path / "out/2"
    assert [*found] == [
        "prepare 1",
        "prepare questions 1",
        *("train plain", "evaluate plain a", "evaluate plain asked"),
        *("train RMT", "evaluate RMT a", "evaluate RMT asked"),
        *("train RMT, post-trained", "evaluate RMT, post-trained asked"),
    ]
    command, environment, after = found["train RMT, post-trained"]
    assert command == ("bash examples/post_train.sh --seed 2 --rmt-template inline --train-iters 3")
    assert environment == {
        "CHECKPOINT": str(Path("somewhere").resolve()),
        "START": str(folder / "RMT"),
        "SAVE": str(folder / "RMT,-post-trained"),
        "DATA": str(folder / "questions"),
        "MARKER": "Answer: ",
        "NPROC_PER_NODE": "1",
    }
    assert after == "<train RMT><prepare questions 1>"
    assert "--positions answers" in found["evaluate plain asked"][0]
    for name, load in (("RMT", "RMT"), ("RMT, post-trained", "RMT,-post-trained")):
        command, _, after = found[f"evaluate {name} asked"]
        assert f"--load {folder / load} --data {folder}/asked.jsonl" in command
        assert f"--positions-from {folder}/plain.asked.json --budget 4" in command
        assert after.startswith(f"<train {name}>")
    # A study that is done is not begun anew when questions are added to it.
    others = commands_of(monkeypatch, tmp_path, ["RMT"], **changes)
    assert others == {name: found[name] for name in others}
    assert not any("asked" in name or "questions" in name for name in others)


def test_post_training_may_have_a_prompt_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = {"reason": "--rmt-answer-tokens 9", "evaluate": "--budget 7"}
    found = commands_of(
        *(monkeypatch, tmp_path, ["plain, post-trained"]),
        reason="--rmt-answer-tokens 1",
        evaluate="--budget 4",
        post_train=POST_TRAIN | own,
    )
    assert "--rmt-answer-tokens 9" in found["train plain, post-trained"][0]
    assert found["evaluate plain asked"][0].endswith("--budget 7 --rmt-answer-tokens 9")
    assert found["evaluate plain a"][0].endswith("--budget 4 --rmt-answer-tokens 1")


def test_post_trained_arms_are_compared_with_where_they_began_and_with_the_first(tmp_path: Path):
    found = study.read_study(written(tmp_path / "study.yaml", post_train=POST_TRAIN))
    assert study.compared(found) == {
        "a": {"difference from plain": dict.fromkeys(("RMT", "longer", "other"), "plain")},
        "asked": {
            "gain by post-training": {
                "plain, post-trained": "plain",
                "RMT, post-trained": "RMT",
            },
            "difference from plain, post-trained": {"RMT, post-trained": "plain, post-trained"},
        },
    }


def test_a_stage_is_done_once_until_it_or_one_before_it_changes(tmp_path: Path):
    stages = study.Stages(tmp_path / "1")
    counted = tmp_path / "count"

    def count(word: str, after: str) -> tuple[str, int]:
        stamp = stages.run("a stage", ["bash", "-c", f"echo {word} >>{counted}"], after)
        return stamp, len(counted.read_text().split())

    first, done = count("x", "")
    assert (count("x", ""), done) == ((first, 1), 1)
    assert count("x", "another")[1] == 2
    assert count("y", "another")[1] == 3
    assert count("y", "another")[1] == 3


def test_a_stage_that_fails_names_its_log_and_is_done_again(tmp_path: Path):
    stages = study.Stages(tmp_path / "1")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1: a stage failed, see .*a-stage\.log"):
            stages.run("a stage", ["bash", "-c", "echo why; exit 3"])
    assert (tmp_path / "1/a-stage.log").read_text() == "why\n"


def test_a_seed_that_is_at_work_is_refused(tmp_path: Path):
    stages = study.Stages(tmp_path / "1")
    with pytest.raises(ValueError, match="is at work in another process"):
        study.Stages(tmp_path / "1")
    del stages


def test_intervals_draw_seeds_and_then_their_documents():
    rng = np.random.default_rng(5)
    by_seed = {
        seed: measured([list(map(int, rng.random(3) < share)) for _ in range(20)])
        for seed, share in ((1, 0.2), (2, 0.6), (3, 0.7))
    }
    right = {
        seed: np.array([sum(record.thought) for record in one.records])
        for seed, one in by_seed.items()
    }
    picked = np.random.default_rng(0).integers(3, size=(3, RESAMPLES))
    weights, drawn = [resample(20, draw) for draw in range(3)], []
    for row in range(RESAMPLES):
        values = []
        for draw in range(3):
            values.append(weights[draw][row] @ right[1 + picked[draw, row]] / 60)
        drawn.append(np.mean(values))
    found = study_tables.over_seeds(by_seed)["thought"][-1]
    assert found.value == pytest.approx(np.mean([own.sum() / 60 for own in right.values()]))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    # Three seeds that differ by so much tell less than their documents.
    pooled = study_tables.over_seeds(
        {1: measured([r.thought for o in by_seed.values() for r in o.records])}
    )
    assert found.high - found.low > 2 * (pooled["thought"][-1].high - pooled["thought"][-1].low)


def test_a_difference_is_of_the_same_seeds_and_documents():
    rng = np.random.default_rng(6)
    before = [list(map(int, rng.random(3) < 0.5)) for _ in range(20)]
    after = [[max(a, int(rng.random() < 0.2)) for a in own] for own in before]
    change = study_tables.over_seeds({1: measured(after)}, {1: measured(before)})["thought"][-1]
    assert change.value == pytest.approx((np.sum(after) - np.sum(before)) / 60)
    gains = np.array([sum(a) - sum(b) for a, b in zip(after, before, strict=True)])
    drawn = resample(20, 0) @ gains / 60
    assert (change.low, change.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    # No document got worse.
    assert change.low >= 0


def a_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    # Killed behind the second step, and started again.
    times = [
        f" [2026] iteration {i:8}/       4 | consumed samples: 9 | "
        f"elapsed time per iteration (ms): {1000 * t}.0 | learning rate: 1 |"
        for i, t in ((1, 80), (2, 70), (1, 90), (2, 2), (3, 3), (4, 4))
    ]
    head = [
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 600",
        " > number of parameters on (tensor, pipeline) model parallel rank (1, 0): 400",
        "  global_batch_size ............................... 2",
        "  seq_length ...................................... 8",
    ]
    (folder / "megatron.log").write_text("\n".join(2 * head + times) + "\n")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    if rows:
        (folder / "rmt_metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_cost_of_a_run_without_rollouts_and_of_one_with_that_was_resumed(tmp_path: Path):
    assert study_tables.read_cost(a_run(tmp_path / "plain", [])) == study_tables.Cost(
        steps=4, seconds=12.5, step_seconds=3.5, trained=64, generated=0, flops=6 * 1000 * 64
    )
    tokens = {"trunk tokens": 16, "stem tokens": 4, "branch tokens": 20}
    rows = [{"iteration": 0}] + [{"iteration": i} | tokens for i in (1, 2, 2, 3, 4)]
    assert study_tables.read_cost(a_run(tmp_path / "rmt", rows)) == study_tables.Cost(
        steps=4, seconds=12.5, step_seconds=3.5, trained=160, generated=80, flops=8 * 1000 * 160
    )


def test_a_log_that_tells_nothing_is_one_sentence(tmp_path: Path):
    (tmp_path / "megatron.log").write_text("killed\n")
    with pytest.raises(ValueError, match="is not of a whole run; remove it and run again"):
        study_tables.read_cost(tmp_path)


def test_tables_hold_the_seeds_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path / "study.yaml")
    for seed, arm, rights in (
        (1, "plain", [[0, 1], [0, 0]]),
        (2, "plain", [[0, 1], [0, 1]]),
        (2, "RMT", [[1, 1], [1, 1]]),
    ):
        folder = tmp_path / "out" / str(seed)
        a_run(folder / arm, [])
        write_output(study.evaluation_of(folder, arm, "a"), measured(rights), 1.0)
    study.main([str(path), "--output", str(tmp_path / "out"), "--tables"])
    results, differences, costs = json.loads((tmp_path / "out/study.json").read_text())["tables"]
    found = {row[0]: (row[1], row[2]["value"]) for row in results["rows"]}
    assert found == {"plain": (2, 37.5), "RMT": (1, 100.0)}
    assert [(row[0], row[1], row[2]["value"]) for row in differences["rows"]] == [("RMT", 1, 50.0)]
    assert [row[:2] for row in costs["rows"]] == [["plain", 4], ["RMT", 4]]
    assert "perplexity" not in results["columns"], "nobody measured it"
    shown = capsys.readouterr().out
    assert "| RMT | 1 | 100.0 [100.0, 100.0] |" in shown
    assert "### Held out: a: difference from plain" in shown


@pytest.mark.slow
def test_a_study_trains_evaluates_and_goes_on_where_it_was(
    inputs: TinyInputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(
        "".join(json.dumps({"text": f"{n} and {n + 1} and so on"}) + "\n" for n in (1, 2))
    )
    common = "--micro-batch-size 1 --global-batch-size 1 --rmt-group-size 2 --rmt-initial-budget 4"
    steps = "--train-iters 2 --save-interval 2 --lr-warmup-iters 1"
    questions = "{folder}/questions"
    path = written(
        tmp_path / "study.yaml",
        model=str(inputs.checkpoint),
        seeds=[1],
        data=str(inputs.data),
        heldout={"a": str(heldout)},
        train=f"{common} {steps} --seq-length 32",
        reason="--rmt-template inline --rmt-force-close --rmt-answer-tokens 2",
        positions="--documents 2 --positions-per-document 1",
        evaluate="--budget 4",
        arms=dict(list(CONTENT["arms"].items())[:3]),
        post_train={
            "after": ["RMT"],
            "prepare": [
                f"{sys.executable} tools/generate_computed_corpus.py --output {questions} "
                "--questions 1 --train-documents 60 --heldout-documents 2",
                f"{sys.executable} tools/preprocess_data.py --input {questions}/train.jsonl "
                f"--output-prefix {questions}/train --tokenizer {inputs.huggingface}",
            ],
            "data": f"{questions}/train",
            "marker": "Answer: ",
            "heldout": {"asked": f"{questions}/heldout.jsonl"},
            "flags": f"{common} --seq-length 256 --train-iters 1 --save-interval 1",
            "reason": "--rmt-template examples/templates/worked.json --rmt-force-close "
            "--rmt-answer-tokens 2",
            "positions": "--positions answers --documents 2 --positions-per-document 1",
        },
    )
    arguments = [str(path), "--output", str(tmp_path / "out")]
    study.main(arguments)
    first = capfd.readouterr()
    assert [line.split(": ")[1] for line in first.err.splitlines() if ": train" in line] == [
        f"train {name}" for name in ("plain", "RMT", "longer", "RMT, post-trained")
    ]
    tables = json.loads((tmp_path / "out/study.json").read_text())["tables"]
    assert [(table["title"], [row[0] for row in table["rows"]]) for table in tables] == [
        ("Held out: a", ["plain", "RMT", "longer"]),
        ("Held out: a: difference from plain", ["RMT", "longer"]),
        ("Held out: asked", ["plain", "RMT", "RMT, post-trained"]),
        ("Held out: asked: gain by post-training", ["RMT, post-trained"]),
        ("Cost", ["plain", "RMT", "longer", "RMT, post-trained"]),
    ]
    assert "whole answer, %" in tables[2]["columns"]
    study.main(arguments)
    again = capfd.readouterr()
    assert again.out == first.out
    assert "train" not in again.err
