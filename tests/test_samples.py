"""Rollouts as text: which, what is read from them, and that file and wandb hold the same rows."""

import json
import struct
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from wandb.proto.wandb_internal_pb2 import Record

from megatron_rmt.algorithm.settings import Settings, argument_name
from megatron_rmt.job import samples
from megatron_rmt.job.samples import read_samples
from megatron_rmt.job.settings import versions
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.update.packing import TreeSource, empty_source
from megatron_rmt.update.scoring import score
from tests.tiny_run import PRETRAIN, RMT, TinyInputs, run
from tests.tiny_step import BYTES, readable_rows, scored, tiny_trunk

COLUMNS = ["iteration", "context", "truth", "thought", "prediction", "reward"]


def test_rows_by_hand():
    training, source, rewards = _scored(rmt_answer_tokens=1)
    shown = read_samples(training, [empty_source(2), source], [rewards[:0], rewards], 6)
    assert [sample.iteration for sample in shown] == [7] * 4
    assert [sample.thought for sample in shown] == ["aa", "aaaaaaaa", "a", "aaaa"]
    assert [sample.reward for sample in shown] == [0.875, 0.0, 0.0625, 1.0]
    first, never_closed, wrong, right = shown
    assert never_closed.prediction == ""
    assert first.truth.startswith(first.prediction)
    assert right.truth.startswith(right.prediction)
    assert not wrong.truth.startswith(wrong.prediction)
    # The labels begin one token after the trunk.
    text = samples._text(training, source.trunk.labels.tolist())
    for sample in shown:
        assert 0 < len(sample.truth) <= samples.TRUTH_TOKENS
        assert (sample.context + sample.truth)[1:] in text


def test_only_the_first_positions_are_shown_each_with_its_group():
    training, source, rewards = _scored()
    shown = read_samples(training, [source] * 3, [rewards] * 3, 0)
    assert len(shown) == samples.POSITIONS * 2
    assert shown[:4] == shown[4:]


@pytest.mark.parametrize(
    ("interval", "warm_up", "expected"),
    [
        (0, 0, []),
        (1, 0, [0, 1, 2, 3, 4, 5]),
        (2, 0, [0, 2, 4]),
        (4, 0, [0, 4]),
        (2, 3, [3, 5]),
        (100, 3, [3]),
        (100, 6, []),
    ],
)
def test_the_first_step_after_the_warm_up_is_shown_and_every_nth_after_it(
    interval: int, warm_up: int, expected: list[int]
):
    training, source, rewards = _scored(rmt_log_samples_interval=interval, rmt_warmup_iters=warm_up)
    shown = [step for step in range(6) if read_samples(training, [source], [rewards], step)]
    assert shown == expected


def _scored(**changes: Any) -> tuple[MidTraining, TreeSource, Tensor]:
    """Four rollouts, whose texts ``tests.tiny_step.scored`` says, and their rewards."""
    _, _, (training, trunk, rows, responses, step) = scored(**changes)
    rewards, advantages, _ = score(training, trunk, rows, responses, step)
    return training, TreeSource(trunk, rows, responses, advantages), rewards


def test_a_context_is_the_end_of_its_document_without_the_prompt():
    trunk = tiny_trunk(head=[9, 9])
    words = [f"<{token}>".encode() for token in range(len(BYTES))]
    row = readable_rows(trunk, 30)[-1]
    first = int(trunk.document_first[row])
    assert trunk.columns[first] == -1, "the prompt"
    tokens = trunk.tokens[first + 2 : row + 1].tolist()
    expected = "".join(f"<{token}>" for token in tokens)
    assert samples._context(Namespace(bytes_of=words), trunk, row) == expected[-200:]


def test_bytes_that_are_no_utf8_are_replaced():
    training = Namespace(bytes_of=["é".encode()[:1], "é".encode()[1:]])
    assert samples._text(training, [0, 1]) == "é"
    assert samples._text(training, [0]) == "\ufffd"


# What examples/recipe.py does for a run that names a wandb project.
OFFLINE = f"""
import os, runpy

if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "offline"
    runpy.run_path({str(PRETRAIN)!r}, run_name="__main__")
"""


def _records(folder: Path) -> list[Record]:
    """What wandb recorded: pieces behind headers of checksum, length and kind, in 32 KiB blocks."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, records, whole = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        left = -place % 32768
        if 0 < left < 7:
            place += left
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole in one piece, or its last one
            records.append(Record.FromString(whole))
            whole = b""
    return records


@pytest.mark.multiprocess
def test_file_and_wandb_hold_the_rows_and_a_resumed_run_writes_them_again(
    inputs: TinyInputs, tmp_path: Path
):
    program = tmp_path / "offline.py"
    program.write_text(OFFLINE)
    steps = ["--exit-interval", "4", "--save-interval", "2", "--rmt-log-samples-interval", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    tracked = ["--wandb-project", "rmt", "--wandb-exp-name", "tiny", "--wandb-save-dir", first]
    tracked += ["--tensorboard-dir", tmp_path / "tensorboard"]
    flags = [*RMT, *steps, "--save", first, *tracked]
    run(tmp_path / "logs", 1, [*inputs.flags(), *map(str, flags)], program)
    # The run ended after step 4; here it was interrupted after step 2.
    (first / "latest_checkpointed_iteration.txt").write_text("2")
    flags = [*RMT, *steps, "--save", str(second)]
    run(tmp_path / "again", 1, [*inputs.flags(resume_from=first), *flags])

    lines = (tmp_path / "logs/rmt_samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # Two micro-batches of three positions: four positions, four rollouts each.
    assert [row["iteration"] for row in rows] == [1] * 16 + [2] * 16 + [3] * 16 + [4] * 16
    assert all(list(row) == COLUMNS for row in rows)
    assert any(row["truth"].startswith(row["prediction"] or "?") for row in rows)
    assert len({row["thought"] for row in rows}) > 16
    assert (tmp_path / "again/rmt_samples.jsonl").read_text().splitlines() == lines[32:]

    tables = sorted(first.glob("wandb/offline-run-*/files/media/table/*.json"))
    found = [json.loads(table.read_text()) for table in tables]
    assert [table["columns"] for table in found] == [COLUMNS] * 4
    in_tables = sorted((row for table in found for row in table["data"]), key=lambda row: row[0])
    assert in_tables == [list(row.values()) for row in rows]

    records = _records(first)
    config = {
        item.key: json.loads(item.value_json)
        for record in records
        for item in record.run.config.update
    }
    assert config["rmt_versions"] == versions()
    assert {argument_name(field.name) for field in fields(Settings)} <= config.keys()
    assert config["rmt_group_size"] == 4
    assert config["rmt_log_samples_interval"] == 1
    logged = {item.nested_key[0] or item.key for r in records for item in r.history.item}
    assert {"rmt reward", "rmt match rate", samples.TABLE} <= logged
