"""Make questions with their answers of worked problems: the way between them is left out.

    python tools/make_questions.py --input gsm8k/train.jsonl --output questions/train.jsonl

Each input line has a ``text`` whose first ``problem_chars`` characters are the problem, and an
``answer``. It becomes a document for ``examples/post_train.sh``: the problem and, after a marker,
the answer, which ``answer_spans`` tell to ``evaluate.py --positions answers``:

    {"text": "How many ... sold?\\n#### 18", "answer_spans": [[24, 26]]}

Lines whose answer is not a single line of text are left out, and counted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from json_lines import Row, read_rows


def question(row: Row, marker: str) -> dict[str, object] | None:
    """The question of a line; None if its answer is not one line.

    Raises:
        ValueError: text, problem_chars or answer are missing, or of another kind.
    """
    text, length, answer = (row.values.get(key) for key in ("text", "problem_chars", "answer"))
    if not (isinstance(text, str) and isinstance(answer, str) and type(length) is int):
        raise ValueError(
            f"{row.place}: text and answer must be strings and problem_chars a whole number."
        )
    if not 0 < length <= len(text):
        raise ValueError(f"{row.place}: problem_chars is {length}, the text has {len(text)}.")
    answer = answer.strip()
    if len(answer.splitlines()) != 1:
        return None
    asked = f"{text[:length].rstrip()}\n{marker}"
    return {"text": asked + answer, "answer_spans": [[len(asked), len(asked) + len(answer)]]}


def make(source: Path, target: Path, marker: str) -> tuple[int, int]:
    """Write the questions of ``source`` to ``target``, which appears when it is complete.

    Returns how many were written, and how many left out.

    Raises:
        ValueError: a line is none of a worked problem, or no question is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    written = left_out = 0
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for row in read_rows(source):
                if (asked := question(row, marker)) is None:
                    left_out += 1
                else:
                    written += 1
                    file.write(json.dumps(asked, ensure_ascii=False) + "\n")
        if not written:
            raise ValueError(f"{source} has no line with an answer of one line.")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return written, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    """Make questions; bad input ends it with one sentence."""
    parser = argparse.ArgumentParser(
        prog="make_questions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="JSON lines of worked problems")
    add("--output", type=Path, required=True, help="JSON lines to be written")
    add("--marker", default="#### ", help='before the answer (default "#### ")')
    flags = parser.parse_args(arguments)
    try:
        written, left_out = make(flags.input, flags.output, flags.marker)
    except ValueError as error:
        sys.exit(f"make_questions.py: {error}")
    print(f"{flags.output}: {written} questions, {left_out} lines left out")


if __name__ == "__main__":
    main()
