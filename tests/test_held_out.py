"""Held-out documents of a run: what is read, refused, chosen, and measured when."""

import codecs
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job import held_out, train_step
from megatron_rmt.job.held_out import (
    held_out_problems,
    is_measured,
    log_held_out,
    measure_held_out,
    read_held_out,
    tokenize_held_out,
)
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.probe import HeldOut, Standing
from tests.tiny_step import BYTES, tiny_run


class Letters:
    """A tokenizer with a token for each letter, that counts its texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def tokenize(self, text: str) -> list[int]:
        self.texts.append(text)
        return [BYTES.index(letter.encode()) for letter in text]


def _lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_run_is_measured_before_its_first_step_and_after_every_nth():
    assert [n for n in range(9) if is_measured(Settings(eval_interval=4), n)] == [0, 4, 8]
    assert not any(is_measured(Settings(), steps) for steps in range(9))


def test_the_first_documents_are_read_and_blank_lines_are_none(tmp_path: Path):
    path = tmp_path / "held.jsonl"
    rows = [{"text": "ab"}, {"text": "cd ef", "answer_spans": [[3, 5]]}, {"text": "gh"}]
    lines = [json.dumps(row) for row in rows]
    path.write_bytes(codecs.BOM_UTF8 + "\n\n".join(lines).encode())
    first = read_held_out(Settings(eval_data=str(path), eval_documents=2))
    assert first == [("ab", ()), ("cd ef", ((3, 5),))]
    # What lies behind them may be anything.
    path.write_text("\n".join([*lines, "no JSON"]))
    assert len(read_held_out(Settings(eval_data=str(path), eval_documents=3))) == 3
    with pytest.raises(ValueError, match=r"cannot be read \(Expecting value"):
        read_held_out(Settings(eval_data=str(path), eval_documents=4))


ANSWERS = {"eval_positions": "answers"}


@pytest.mark.parametrize(
    ("rows", "changes", "sentence"),
    [
        ([[]], {}, "line 1 is no object with a text); name a file of JSON lines"),
        ([{"text": "a"}, {"text": 3}], {}, "line 2 is no object with a text)"),
        ([{"body": "a"}], {}, "line 1 is no object with a text)"),
        ([{"text": "a", "answer_spans": [[0, 2]]}], {}, "limit <= 1, the length of the text)"),
        ([], {}, "holds no text in its first 32 documents; name another"),
        ([{"text": ""}], {}, "holds no text in its first 32 documents"),
        ([{"text": "abc"}], ANSWERS, "holds no answer_spans in its first 32 documents"),
    ],
)
def test_data_that_cannot_be_measured_is_one_sentence(
    tmp_path: Path, rows: list[Any], changes: dict[str, str], sentence: str
):
    path = _lines(tmp_path / "held.jsonl", rows)
    settings = Settings(eval_interval=2, eval_data=path, **changes)
    (problem,) = held_out_problems(settings)
    assert problem.startswith(f"--rmt-eval-data {path} ")
    assert sentence in problem
    assert "\n" not in problem


def test_the_interval_and_the_data_go_together(tmp_path: Path):
    path = _lines(tmp_path / "held.jsonl", [{"text": "abc"}])
    assert [*held_out_problems(Settings())] == []
    assert [*held_out_problems(Settings(eval_interval=2, eval_data=path))] == []
    (problem,) = held_out_problems(Settings(eval_data=path))
    assert problem.startswith(f"--rmt-eval-data is {path}, and --rmt-eval-interval is 0; pass")
    (problem,) = held_out_problems(Settings(eval_interval=2))
    assert problem.startswith("--rmt-eval-interval is 2; pass --rmt-eval-data")
    (problem,) = held_out_problems(Settings(eval_interval=2, eval_data=str(tmp_path / "none")))
    assert "none cannot be read (No such file or directory); name a file" in problem


def _run(path: str, seq_length: int = 8, **changes: Any) -> MidTraining:
    run = tiny_run(eval_data=path, eval_interval=1, **changes)
    return MidTraining(**vars(run) | {"args": Namespace(seq_length=seq_length)})


def test_tokens_are_drawn_from_what_is_read_and_can_be_answered(tmp_path: Path):
    """Neither the first token, nor the end of a thought, nor what --seq-length cuts off."""
    rows = [{"text": text} for text in ("abcdefghab", "a", "abc", "a b")]
    # Letters are tokens from 2 on, a blank is 11; "</t>", token 10, is never an answer.
    found = tokenize_held_out(
        _run(_lines(tmp_path / "all.jsonl", rows), eval_positions_per_document=99), Letters()
    )
    assert [(text.number, text.read) for text in found.texts] == [(0, 8), (2, 3), (3, 3)]
    assert found.texts[0].ids == [2, 3, 4, 5, 6, 7, 8, 9, 2, 3]
    assert found.tokens == [[1, 2, 3, 4, 5, 6, 7], [1, 2], [1, 2]]

    class Closing(Letters):
        def tokenize(self, text: str) -> list[int]:
            return [2, 3, 10, 0, 4]

    one = _run(_lines(tmp_path / "one.jsonl", rows[:1]), eval_positions_per_document=99)
    assert tokenize_held_out(one, Closing()).tokens == [[1, 4]]

    few = _run(_lines(tmp_path / "few.jsonl", rows[:1] * 40), eval_positions_per_document=2)
    drawn = tokenize_held_out(few, Letters()).tokens
    assert all(len(own) == 2 and own == sorted(set(own)) for own in drawn)
    assert {token for own in drawn for token in own} == {1, 2, 3, 4, 5, 6, 7}
    assert tokenize_held_out(few, Letters()).tokens == drawn
    other = MidTraining(**vars(few) | {"seed": 6})
    assert tokenize_held_out(other, Letters()).tokens != drawn


def test_answers_are_predicted_where_they_are_asked_for(tmp_path: Path):
    spans = {"answer_spans": [[0, 1], [3, 5], [9, 10]]}
    path = _lines(tmp_path / "held.jsonl", [{"text": "abc"}, {"text": "abcdefghab"} | spans])
    found = tokenize_held_out(_run(path, eval_positions="answers"), Letters())
    assert [text.number for text in found.texts] == [1]
    # Nothing stands before the first, and the last is cut off.
    assert found.tokens == [[3]]
    anywhere = tokenize_held_out(_run(path), Letters())
    assert [len(own) for own in anywhere.tokens] == [2, 4]


def test_documents_are_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = _run(_lines(tmp_path / "held.jsonl", [{"text": "abc"}, {"text": "ab"}]))
    letters = Letters()
    monkeypatch.setattr(train_step, "prepared", lambda model: run)
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: letters)
    model = object()
    first = train_step.held_out_of(model)
    assert train_step.held_out_of(model) is first
    assert letters.texts == ["abc", "ab"]


def test_metrics_are_parts_of_the_positions(monkeypatch: pytest.MonkeyPatch):
    none = HeldOut([], [])

    def of(*sums: float) -> dict[str, float | None]:
        monkeypatch.setattr(held_out, "standing", lambda run, texts, budget: Standing(*sums))
        return measure_held_out(None, none, 3)

    assert of(8.0, 2.0, 4.0, 1.0, -2.0) == {
        "held-out next token": 0.25,
        "held-out thought": 0.5,
        "held-out no thought": 0.125,
        "held-out gain": -0.25,
        "held-out positions": 8.0,
    }
    empty = of(0.0, 0.0, 0.0, 0.0, 0.0)
    assert empty.pop("held-out positions") == 0
    assert set(empty.values()) == {None}


def test_what_was_measured_goes_to_tensorboard_and_wandb(monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[Any, ...]] = []
    board = SimpleNamespace(add_scalar=lambda *words: written.append(words))
    wandb = SimpleNamespace(log=lambda values, steps: written.append((values, steps)))
    monkeypatch.setattr("megatron.training.get_tensorboard_writer", lambda: board)
    monkeypatch.setattr("megatron.training.get_wandb_writer", lambda: wandb)
    log_held_out({"held-out gain": 0.5, "held-out thought": None}, 6)
    assert written == [("rmt held-out gain", 0.5, 6), ({"rmt held-out gain": 0.5}, 6)]
    monkeypatch.setattr("megatron.training.get_tensorboard_writer", lambda: None)
    monkeypatch.setattr("megatron.training.get_wandb_writer", lambda: None)
    log_held_out({"held-out gain": 0.5}, 6)
    assert len(written) == 2
