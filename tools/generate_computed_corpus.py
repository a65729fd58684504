"""Write a corpus whose results can be computed but not guessed, correct by construction.

    python tools/generate_computed_corpus.py --output data --train-documents 3000 \\
        --heldout-documents 100 --seed 1

A document gives five letters a digit each and asks ten questions. Half of them, drawn one by one,
show the work before the answer, on the tape of a pocket calculator, where each ``=`` shows the
total so far; the other half do not:

    a=6, b=4, c=8, d=1, e=3
    d+e+b-a? Work: 1+3=4+4=8-6=2. Answer: 2
    a-d+e-b? Answer: 4

``--word-problems SHARE`` tells that share of the questions in words, with digits of their own:

    Ann has 3 coins, finds 4, loses 2 and gets 1. How many now? Answer: 6

``--questions 1`` gives each document a single question, whose work is not shown and whose answer
ends it: the form that ``examples/post_train.sh`` takes.

So a model that reads the corpus learns how the work is done, but nothing that makes it do the work
where the text does not show it. At those answers a thought that does the work makes the next token
certain; without one it would have to be known at a glance. The digits of the first line are noise
that nothing can predict, as there is in all text. All totals are digits.

Lines of ``train.jsonl`` and ``heldout.jsonl`` have questions of four terms, those of
``heldout_longer.jsonl`` of five, which training never shows. Each has ``text`` and
``answer_spans``, the [first, limit) characters of each answer whose work is not shown. No held-out
document gives the letters the same digits as another document, and no word problem of a held-out
document has the digits and signs of one in training. The same arguments give the same
bytes, and a larger set begins with the smaller one.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

LETTERS = "abcde"
QUESTIONS = 10  # in a document by default, the first different ones of those drawn
DRAWN_QUESTIONS = 500
LARGEST_TOTAL = 9
# Assignments of digits to letters of which one in so many is kept for held-out documents.
HELD_OUT = 16
MOST_ATTEMPTS = 500
NAMES = ("Ann", "Ben", "Tom", "Sam", "Max", "Kim")
THINGS = ("coins", "books", "cards", "apples", "eggs", "pens")
VERBS = {"+": ("finds", "gets", "buys"), "-": ("loses", "sells", "drops")}


class Question(NamedTuple):
    """Such as ``a+b-c?``, its ``work`` such as ``1+2=3-3=0``, and its ``answer``."""

    text: str
    work: str
    answer: int


def held_out(key: object) -> bool:
    """Whether ``key`` is one of those that only held-out documents have."""
    return Random(f"{key}").randrange(HELD_OUT) == 0


def draw_question(rng: Random, digits: dict[str, int], terms: int) -> Question | None:
    """A question of ``terms`` different letters; None if a total of it is not a digit."""
    first, *letters = rng.sample(LETTERS, terms)
    expression, total = first, digits[first]
    work = str(total)
    for letter in letters:
        sign = rng.choice("+-")
        total += digits[letter] if sign == "+" else -digits[letter]
        if not 0 <= total <= LARGEST_TOTAL:
            return None
        expression += f"{sign}{letter}"
        work += f"{sign}{digits[letter]}={total}"
    return Question(f"{expression}?", work, total)


def draw_word_problem(rng: Random, split: str, terms: int) -> Question | None:
    """One of ``terms`` numbers; None if a total is no digit, or if it is of the other splits."""
    digits = {letter: rng.randint(1, 9) for letter in LETTERS}
    question = draw_question(rng, digits, terms)
    if question is None or held_out(question.work) != (split != "train"):
        return None
    numbers = [digits[letter] for letter in question.text[:-1:2]]
    *changes, last = [
        f"{rng.choice(VERBS[sign])} {number}"
        for sign, number in zip(question.text[1:-1:2], numbers[1:], strict=True)
    ]
    text = f"{rng.choice(NAMES)} has {numbers[0]} {rng.choice(THINGS)}, {', '.join(changes)}"
    return question._replace(text=f"{text} and {last}. How many now?")


def draw_document(
    rng: Random,
    digits: dict[str, int],
    split: str,
    terms: int,
    word_problems: float,
    questions_wanted: int,
) -> dict[str, object] | None:
    """One line of a file; None if these digits hardly allow so many questions, or all that are
    drawn show their work."""
    drawn = (draw_question(rng, digits, terms) for _ in range(DRAWN_QUESTIONS))
    questions = list(dict.fromkeys(question for question in drawn if question))[:questions_wanted]
    if len(questions) < questions_wanted:
        return None
    for index in range(questions_wanted):
        if word_problems and rng.random() < word_problems:
            while (problem := draw_word_problem(rng, split, terms)) is None:
                pass
            questions[index] = problem
    text = ", ".join(f"{letter}={digit}" for letter, digit in digits.items())
    spans = []
    for question in questions:
        shown = rng.random() < 0.5
        text += f"\n{question.text} "
        text += f"Work: {question.work}. Answer: " if shown else "Answer: "
        if not shown:
            spans.append([len(text), len(text) + 1])
        text += str(question.answer)
    return {"text": text, "answer_spans": spans} if spans else None


def draw_documents(
    count: int, seed: int, split: str, terms: int, word_problems: float, questions: int
) -> Iterator[dict[str, object]]:
    """``count`` documents of ``split``; held-out ones, of all splits but train, share no digits."""
    taken = set[tuple[int, ...]]()
    for number in range(count):
        rng = Random(f"{seed}/{split}/{number}")
        for _ in range(MOST_ATTEMPTS):
            digits = {letter: rng.randint(1, 9) for letter in LETTERS}
            assignment = tuple(digits.values())
            if held_out(assignment) != (split != "train") or assignment in taken:
                continue
            document = draw_document(rng, digits, split, terms, word_problems, questions)
            if document:
                break
        else:
            raise ValueError(
                f"after {number} {split} documents no new one was found in {MOST_ATTEMPTS} "
                "attempts; ask for fewer documents."
            )
        if split != "train":
            taken.add(assignment)
        yield document


def generate(
    output: Path,
    train_documents: int,
    heldout_documents: int,
    seed: int,
    word_problems: float = 0.0,
    questions: int = QUESTIONS,
) -> None:
    """Write the three files into the directory ``output``; each appears when it is complete.

    Raises:
        ValueError: a number of documents is below 1, or too large to be had; the share
            ``word_problems`` is not in [0, 1]; ``questions`` are not 1 to 10 in a document.
    """
    for name, value in (("train", train_documents), ("heldout", heldout_documents)):
        if value < 1:
            raise ValueError(f"--{name}-documents is {value}; it must be 1 or more.")
    if not 0 <= word_problems <= 1:
        raise ValueError(f"--word-problems is {word_problems}; it must be in [0, 1].")
    if not 1 <= questions <= QUESTIONS:
        raise ValueError(f"--questions is {questions}; it must be in [1, {QUESTIONS}].")
    output.mkdir(parents=True, exist_ok=True)
    for split, count, terms in (
        ("train", train_documents, 4),
        ("heldout", heldout_documents, 4),
        ("heldout_longer", heldout_documents, 5),
    ):
        path = output / f"{split}.jsonl"
        partial = path.with_name(f"{path.name}.partial")
        try:
            with open(partial, "w", encoding="utf-8", newline="\n") as file:
                for document in draw_documents(count, seed, split, terms, word_problems, questions):
                    file.write(json.dumps(document) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        print(f"{path}: {count} documents, {path.stat().st_size} bytes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for the three .jsonl files"
    )
    parser.add_argument("--train-documents", type=int, default=3000)
    parser.add_argument("--heldout-documents", type=int, default=100)
    parser.add_argument(
        "--word-problems",
        type=float,
        default=0.0,
        help="share of questions told in words, default 0",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=QUESTIONS,
        help=f"in each document, default {QUESTIONS}",
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    try:
        generate(**vars(arguments))
    except ValueError as error:
        raise SystemExit(f"generate_computed_corpus: {error}") from None


if __name__ == "__main__":
    main()
