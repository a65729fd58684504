"""The files of a run, an evaluation and a page, for tests of tools/report.py."""

import html.parser
import json
import random
import sys
from pathlib import Path
from typing import Any

from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

from evaluation import Measured, Record, write_output
from reporting import reading
from reporting.page import page

SCRIPT = TOOLS / "report.py"


class PageReader(html.parser.HTMLParser):
    """What a page holds: its tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*words: Path | str, waits: bool = False) -> str:
    inputs = reading.read_inputs([str(word) for word in words], waits=waits)
    return page(inputs, title="a title", written="today")


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics_line(iteration: int, **more: Any) -> dict[str, Any]:
    names = ("reward", "match rate", "budget", "thought length", "update seconds", "entropy")
    return {"iteration": iteration, **dict.fromkeys(names, 0.5 + 0.01 * iteration), **more}


def rollout_line(iteration: int, number: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "context": "so the sum",
        "truth": " is 4",
        "thought": " 2+2",
        "prediction": " is",
        "reward": 0.1 * number,
        "advantage": number - 0.5,
        "right": number == 1,
        "sample": 3,
        "token": 17,
        "rollout": number,
        "entropy": 1.25,
        "thought_tokens": 2,
        "tokens": [" 2", "+2", "</think>", " is"],
        "log_probs": [-0.1, -2.5, None, -0.7],
        **more,
    }


def text_line(iteration: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "sample": 3,
        "tokens": ["so"] * 18 + [" is"],
        "entropies": [None] + [0.25 * number for number in range(18)],
        "tiers": [None] * 18 + ["hard"],
        "chosen": [18],
        **more,
    }


def written_run(folder: Path, steps: int = 3) -> Path:
    folder.mkdir(parents=True)
    numbers = range(1, steps + 1)
    write_lines(folder / reading.METRICS, [metrics_line(number) for number in numbers])
    write_lines(
        folder / reading.SAMPLES, [rollout_line(n, own) for n in numbers for own in range(2)]
    )
    write_lines(folder / reading.TEXTS, [text_line(number) for number in numbers])
    return folder


def written_evaluation(path: Path) -> Path:
    """As evaluate.py writes it, of three documents."""
    settings = {
        "samples": 1,
        "seed": 1,
        "entropy_thresholds": [0.5, 1.0, 1.5],
        "load": "runs/x",
        "budget": 8,
    }
    draw = random.Random(path.name)
    records = []
    for line in range(1, 4):
        ways = ("thought", "no_thought")
        measured = {name: [draw.randint(0, 1) for _ in range(4)] for name in ways}
        measured |= {"swapped": [0] * 4, "thought_length": [3, 4, 5, 6]}
        measured |= {"well_formed": [1] * 4, "closed_by_itself": [1] * 4}
        record = Record("held.jsonl", line, str(line), 6, 0, "-33333", "010101", 9.0, [2, 3, 4, 5])
        records.append(Record(**{**vars(record), **measured}))
    write_output(path, Measured(settings, records), 1.0)
    return path
