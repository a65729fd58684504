"""examples/post_train.sh: which positions it trains, what it rewards, its data, and a real run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import post_train
from megatron_rmt.algorithm.rewards import Evidence
from megatron_rmt.prompt.response import Response
from megatron_rmt.step import choose
from tests.distributed import REPOSITORY
from tests.packed import build_trunk, reasoned
from tests.tiny_run import TinyInputs
from tests.tiny_step import tiny_prompt, tiny_run, tiny_schedule

sys.path.insert(0, str(REPOSITORY / "tools"))

import make_questions

ANY_TIER = (0.0, 1.0, 1.5)


def _ids(text: str) -> list[int]:
    """Letters, blanks, and a bar where a document ends."""
    encode = tiny_prompt().encode
    return [
        token
        for part in re.split(r"(\|)", text)
        for token in ([0] if part == "|" else encode(part))
    ]


def _chosen(
    text: str, monkeypatch: pytest.MonkeyPatch, marker: str = "h ", **changes: Any
) -> list[str]:
    """Of a sample that is cut out of ``text | text``: the text before each chosen position."""
    monkeypatch.setattr(post_train, "MARKER", marker.encode())
    ids = torch.tensor([_ids(text)])
    trunk = build_trunk(
        ids[:, :-1],
        torch.arange(ids.shape[1] - 1)[None],
        ids[:, 1:],
        torch.ones(1, ids.shape[1] - 1),
        preamble=changes.pop("preamble", []),
        end_of_document=0,
        separate_documents=True,
    )
    run = dataclasses.replace(tiny_run(), select=post_train.answers)
    samples = reasoned(trunk, [], None)
    choose(run, samples, torch.zeros(len(trunk)), ANY_TIER, tiny_schedule(**changes))
    (of,) = samples
    found = []
    for position in of.positions:
        first, _ = of.sample.document_of(position.row)
        before = of.sample.tokens[first : position.row + 1][
            of.sample.columns[first : position.row + 1] >= 0
        ]
        found.append(run.prompt.text(before.tolist()))
    return found


@pytest.mark.parametrize("preamble", [[], [9, 9]])
def test_whole_documents_are_asked_where_their_text_ends_with_the_marker(monkeypatch, preamble):
    text = "bh c|abh cd|aah b|no marker".replace("no marker", "dd d|fh ee")
    assert _chosen(text, monkeypatch, preamble=preamble) == ["abh ", "aah "]


def test_the_last_document_counts_if_its_end_is_in_the_sample(monkeypatch):
    assert _chosen("b|abh c|d", monkeypatch) == ["abh "]
    assert _chosen("b|abh c|", monkeypatch) == []


def test_only_the_last_marker_of_a_document_asks(monkeypatch):
    assert _chosen("b|ah bh c|d", monkeypatch) == ["ah bh "]


def test_a_blank_that_belongs_to_the_answer_is_predicted_with_it(monkeypatch):
    assert _chosen("b|abhc|d", monkeypatch) == ["abh"]


def test_more_questions_than_are_wanted_are_drawn_alike_at_each_call(monkeypatch):
    text = "b|" + "|".join(f"{letter}h b" for letter in "abcdefg") + "|d"
    seen = [
        tuple(_chosen(text, monkeypatch, positions_per_sample=2, iteration=i)) for i in range(30)
    ]
    assert {len(own) for own in seen} == {2}
    assert {one for own in seen for one in own} == {f"{letter}h " for letter in "abcdefg"}
    again = _chosen(text, monkeypatch, positions_per_sample=2, iteration=3)
    assert tuple(again) == seen[3]


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (b"42", 1.0),
        (b" 42 \n", 1.0),
        (b"42\nand more", 1.0),
        (b"4", 0.0),
        (b"423", 0.0),
        (b"42 and more", 0.0),
        (b"\n", 0.0),
        (b"", 0.0),
    ],
)
def test_the_reward_is_for_the_whole_answer_alone(prediction, right):
    responses = [[Response(1, True, True, prediction), Response(1, True, False, b"42")]]
    evidence = Evidence(
        trunk=lambda index: b"",
        truth=[[b" 4", b"2"]],
        responses=responses,
        thought_lengths=torch.ones(1, 2),
        budget=torch.ones(1, 1),
        boxed=False,
        log_probs_of_truth=lambda: (torch.zeros(1), torch.zeros(1, 2)),
    )
    assert post_train.exact(evidence).tolist() == [[right, 0.0]]


def _problem(problem: str, answer: Any, **changes: Any) -> str:
    text = f"{problem}\n\nFirst this.\n#### {answer}"
    return json.dumps({"text": text, "problem_chars": len(problem), "answer": answer} | changes)


def test_questions_are_problem_marker_and_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = tmp_path / "in.jsonl", tmp_path / "new/out.jsonl"
    source.write_text(
        "\n".join([_problem("Zoë has 3?", "18"), _problem("a", "1\n2"), _problem("b", " ")])
    )
    make_questions.main(["--input", str(source), "--output", str(target)])
    (line,) = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert line == {"text": "Zoë has 3?\n#### 18", "answer_spans": [[16, 18]]}
    assert capsys.readouterr().out == f"{target}: 1 questions, 2 lines left out\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (_problem("a", 3), ":1: text and answer must be strings and problem_chars a whole number."),
        (_problem("a", "3", problem_chars=99), ":1: problem_chars is 99, the text has 21."),
        (_problem("a", "3", problem_chars=0), ":1: problem_chars is 0, the text has 21."),
        (_problem("a", ""), " has no line with an answer of one line."),
    ],
)
def test_what_is_no_worked_problem_is_one_sentence(tmp_path: Path, line: str, sentence: str):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line)
    with pytest.raises(SystemExit, match=re.escape(f"make_questions.py: {source}{sentence}")):
        make_questions.main(["--input", str(source), "--output", str(target)])
    assert list(tmp_path.iterdir()) == [source]


def _tool(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_script_trains_answers_to_questions_and_evaluate_measures_them(
    inputs: TinyInputs, tmp_path: Path
):
    corpus, tokens, saved = tmp_path / "corpus", tmp_path / "tokens", tmp_path / "saved"
    _tool(
        *("tools/generate_computed_corpus.py", "--output", corpus, "--questions", "1"),
        *("--train-documents", "60", "--heldout-documents", "10"),
    )
    _tool(
        *("tools/preprocess_data.py", "--input", corpus / "train.jsonl"),
        *("--output-prefix", tokens, "--tokenizer", inputs.huggingface),
    )
    environment = os.environ | {
        "CHECKPOINT": str(inputs.checkpoint),
        "DATA": str(tokens),
        "SAVE": str(saved),
        "MARKER": "Answer: ",
        "TEMPLATE": "examples/templates/worked.json",
        "NPROC_PER_NODE": "1",
        "PYTHON": sys.executable,
    }
    flags = (
        "--save-interval 2 --seq-length 256 --global-batch-size 2 --rmt-initial-budget 6 "
        "--rmt-answer-tokens 2 --rmt-log-samples-interval 1 --lr 1e-4 --train-iters 2"
    )
    start = {"env": environment, "cwd": REPOSITORY, "capture_output": True, "text": True}
    command = ["bash", "examples/post_train.sh", *flags.split()]
    done = subprocess.run(command, **start)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    start["env"] = environment | {"MARKER": "?"}
    refused = subprocess.run(command, **start)
    assert refused.returncode != 0
    said = "was trained with other settings: MARKER is '?' and was 'Answer: '; pass what they were"
    assert said in refused.stdout + refused.stderr
    texts = {
        json.loads(line)["text"]
        for line in (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()
    }
    samples = [json.loads(line) for line in (saved / "rmt_samples.jsonl").read_text().splitlines()]
    assert len({(one["sample"], one["token"]) for one in samples}) > 4
    for one in samples:
        assert one["context"].rstrip().endswith("Answer:")
        assert one["context"] + one["truth"] in texts
        assert one["budget"] == 6
        said = one["prediction"].strip().splitlines()[:1]
        assert one["reward"] == float(said == [one["truth"].strip()])
    metrics = [json.loads(line) for line in (saved / "rmt_metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 2]
    _tool(
        *("tools/evaluate.py", "--load", saved, "--model-flags", inputs.checkpoint),
        *("--data", corpus / "heldout.jsonl", "--output", tmp_path / "after.json"),
        *("--positions", "answers", "--budget", "6", "--rmt-answer-tokens", "2"),
        *("--rmt-template", "examples/templates/worked.json", "--rmt-force-close", "--bf16"),
    )
    documents = json.loads((tmp_path / "after.json").read_text())["documents"]
    assert [len(one["positions"]) for one in documents] == [1] * 10
    # Every answer is a digit, so a right beginning is all of it, unless more is said.
    for one in documents:
        for name in ("", "no_thought_"):
            assert len(one[f"{name}whole_answer"]) == 1
