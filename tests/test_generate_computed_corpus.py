"""The computed corpus is right, its held-out digits are new, and it is the same each time."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import generate_computed_corpus

STORY = re.compile(
    r"[A-Z][a-z]+ has (\d) [a-z]+((?:(?:,| and) [a-z]+ \d)+)\. How many now\? "
    r"(?:Work: (\S+)\. )?Answer: (\d)"
)
GAINS, LOSSES = ("finds", "gets", "buys"), ("loses", "sells", "drops")
LINE = re.compile(r"([a-e](?:[-+][a-e])+)\? (?:Work: (\S+)\. )?Answer: (\d)")
Rows = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Rows:
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.iterdir()
    }


def digits_of(text: str) -> dict[str, int]:
    pairs = [pair.split("=") for pair in text.partition("\n")[0].split(", ")]
    return {letter: int(digit) for letter, digit in pairs}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("corpus")
    generate_computed_corpus.generate(folder, train_documents=200, heldout_documents=40, seed=7)
    return read(folder)


def test_every_answer_is_the_value_of_its_question(rows: Rows):
    for row in itertools.chain.from_iterable(rows.values()):
        digits = digits_of(row["text"])
        for line in row["text"].splitlines()[1:]:
            expression, _, answer = LINE.fullmatch(line).groups()
            assert eval(expression, {}, digits) == int(answer)


def test_shown_work_puts_in_the_digits_and_totals_from_left_to_right(rows: Rows):
    for row in itertools.chain.from_iterable(rows.values()):
        digits = digits_of(row["text"])
        for line in row["text"].splitlines()[1:]:
            expression, work, answer = LINE.fullmatch(line).groups()
            if work is None:
                continue
            total, tape = 0, ""
            for sign, letter in re.findall(r"([-+]?)(\w)", expression):
                total += -digits[letter] if sign == "-" else digits[letter]
                tape += f"{sign}{digits[letter]}" + (f"={total}" if sign else "")
            assert work == tape
            assert work.endswith(f"={answer}")


def test_answer_spans_are_the_answers_whose_work_is_not_shown(rows: Rows):
    for row in itertools.chain.from_iterable(rows.values()):
        text = row["text"]
        hidden = [m.span(3) for m in LINE.finditer(text) if m[2] is None]
        assert row["answer_spans"] == [list(span) for span in hidden]
        assert hidden


def test_half_of_the_questions_show_their_work(rows: Rows):
    lines = [LINE.fullmatch(x) for r in rows["train"] for x in r["text"].splitlines()[1:]]
    assert len(lines) == 2000
    assert 0.46 < sum(line[2] is not None for line in lines) / len(lines) < 0.54


def test_held_out_documents_have_digits_of_their_own_and_longer_questions_are_new(rows: Rows):
    seen = {tuple(digits_of(row["text"]).values()) for row in rows["train"]}
    for split, terms in (("heldout", 4), ("heldout_longer", 5)):
        digits = [tuple(digits_of(row["text"]).values()) for row in rows[split]]
        assert len(set(digits)) == len(digits) == 40
        assert not seen & set(digits)
        lines = [LINE.fullmatch(x) for r in rows[split] for x in r["text"].splitlines()[1:]]
        assert {len(line[1]) for line in lines} == {2 * terms - 1}


def test_a_larger_set_begins_with_the_smaller_and_another_seed_differs(rows: Rows, tmp_path: Path):
    generate_computed_corpus.generate(tmp_path / "a", 20, 10, seed=7)
    generate_computed_corpus.generate(tmp_path / "b", 20, 10, seed=8)
    smaller, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert all(rows[split][: len(smaller[split])] == smaller[split] for split in rows)
    assert all(other[split] != smaller[split] for split in rows)


@pytest.fixture(scope="module")
def told_rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("told")
    generate_computed_corpus.generate(folder, 200, 40, seed=7, word_problems=0.5)
    return read(folder)


def word_problems_of(rows: list[dict[str, Any]]) -> list[tuple[re.Match[str], str]]:
    """Each with its numbers and signs, as ``3+4-2``."""
    lines = [line for row in rows for line in row["text"].splitlines()[1:]]
    problems = []
    for line in lines:
        if match := STORY.fullmatch(line):
            changes = re.findall(r"(\w+) (\d)", match[2])
            signs = dict.fromkeys(GAINS, "+") | dict.fromkeys(LOSSES, "-")
            problems.append((match, match[1] + "".join(signs[v] + n for v, n in changes)))
        else:
            assert LINE.fullmatch(line)
    return problems


def test_word_problems_are_right_and_held_out_ones_are_new(told_rows: Rows):
    expressions = {}
    for split, found in told_rows.items():
        problems = word_problems_of(found)
        for match, expression in problems:
            assert eval(expression) == int(match[4])
            if match[3]:
                assert re.sub(r"=\d+", "", match[3]) == expression
        expressions[split] = {expression for _, expression in problems}
        assert {len(expression) for expression in expressions[split]} == {
            9 if split == "heldout_longer" else 7
        }
        assert 0.4 < len(problems) / (10 * len(found)) < 0.6
    assert expressions["heldout"]
    assert not expressions["train"] & expressions["heldout"]


def test_answer_spans_of_word_problems_are_the_answers_whose_work_is_not_shown(told_rows: Rows):
    for row in itertools.chain.from_iterable(told_rows.values()):
        hidden, start = [], 0
        for line in row["text"].splitlines(keepends=True):
            if "? Answer: " in line:
                hidden.append([start + len(line.rstrip()) - 1, start + len(line.rstrip())])
            start += len(line)
        assert row["answer_spans"] == hidden


def test_a_share_outside_zero_to_one_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"--word-problems is 1.5; it must be in \[0, 1\]"):
        generate_computed_corpus.main(["--output", str(tmp_path), "--word-problems", "1.5"])


@pytest.mark.parametrize("flag", ["--train-documents", "--heldout-documents"])
def test_a_number_of_documents_below_one_is_refused(flag: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=f"{flag} is 0; it must be 1 or more"):
        generate_computed_corpus.main(["--output", str(tmp_path), flag, "0"])


def test_more_documents_than_there_are_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate_computed_corpus, "HELD_OUT", 4000)  # leaves about 15
    with pytest.raises(SystemExit, match="ask for fewer documents"):
        generate_computed_corpus.main(
            ["--output", str(tmp_path), "--heldout-documents", "100", "--train-documents", "1"]
        )
    assert not list(tmp_path.glob("*.partial"))


def test_a_document_of_one_question_ends_with_its_answer(tmp_path: Path):
    generate_computed_corpus.generate(tmp_path, 50, 10, seed=7, questions=1)
    for row in itertools.chain.from_iterable(read(tmp_path).values()):
        _, question = row["text"].splitlines()
        expression, work, answer = LINE.fullmatch(question).groups()
        assert work is None
        assert eval(expression, {}, digits_of(row["text"])) == int(answer)
        assert row["answer_spans"] == [[len(row["text"]) - 1, len(row["text"])]]


@pytest.mark.parametrize("questions", [0, 11])
def test_as_many_questions_as_no_document_holds_are_refused(tmp_path: Path, questions: int):
    with pytest.raises(ValueError, match=rf"^--questions is {questions}; it must be in \[1, 10\]"):
        generate_computed_corpus.generate(tmp_path / "a", 1, 1, seed=1, questions=questions)
    assert not (tmp_path / "a").exists()
