"""The metrics file: one whole JSON line for each step."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_rmt.job.metrics import metrics_path, write_metrics


@pytest.mark.parametrize(
    ("file", "save", "expected"),
    [
        ("there.jsonl", "/run", "there.jsonl"),
        ("there.jsonl", None, "there.jsonl"),
        (None, "/run", "/run/rmt_metrics.jsonl"),
        (None, None, None),
    ],
)
def test_where_the_lines_go(file, save, expected):
    path = metrics_path(Namespace(rmt_metrics_file=file, save=save))
    assert path == (None if expected is None else Path(expected))


def test_one_line_per_step_is_appended(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    write_metrics(path, 1, {"rmt reward": torch.tensor(0.5), "ntp loss": 2})
    write_metrics(path, 2, {"rmt reward": 0.75, "ntp loss": 1})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"iteration": 1, "reward": 0.5, "ntp loss": 2.0},
        {"iteration": 2, "reward": 0.75, "ntp loss": 1.0},
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_what_was_not_measured_becomes_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 3, {"grad norm": value})
    assert json.loads(path.read_text()) == {"iteration": 3, "grad norm": None}
