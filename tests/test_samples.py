"""Rollouts as text: which, what is read from them, and that file and wandb hold the same rows."""

import dataclasses
import json
import struct
from dataclasses import fields
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from megatron_rmt.algorithm.settings import Settings, argument_name
from megatron_rmt.job import samples
from megatron_rmt.job.samples import is_shown, read_samples
from megatron_rmt.job.settings import versions
from megatron_rmt.update.tree import ReasonedSample
from tests.packed import reasoned
from tests.tiny_run import PRETRAIN, RMT, TinyInputs, run
from tests.tiny_step import BYTES, readable_rows, scored, tiny_prompt, tiny_trunk

COLUMNS = ["iteration", "budget", "context", "truth", "thought", "prediction", "reward"]


def test_rows_by_hand():
    of = scored(answer_tokens=1)
    shown = read_samples(of.run.prompt, of.reasoned, 6)
    assert [one.iteration for one in shown] == [7] * 4
    assert [one.thought for one in shown] == ["aa", "aaaaaaaa", "a", "aaaa"]
    assert [one.reward for one in shown] == [0.875, 0.0, 0.0625, 1.0]
    first, never_closed, wrong, right = shown
    assert never_closed.prediction == ""
    assert first.truth.startswith(first.prediction)
    assert right.truth.startswith(right.prediction)
    assert not wrong.truth.startswith(wrong.prediction)
    # The labels begin one token after the trunk.
    text = of.run.prompt.text(of.reasoned[0].sample.labels.tolist())
    for one in shown:
        assert 0 < len(one.truth) <= samples.TRUTH_TOKENS
        assert (one.context + one.truth)[1:] in text


def test_only_the_first_positions_are_shown_each_with_its_group():
    of = scored()
    shown = read_samples(of.run.prompt, of.reasoned * 3, 0)
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
    settings = Settings(log_samples_interval=interval, warmup_iters=warm_up)
    assert [step for step in range(6) if is_shown(settings, step)] == expected


def test_a_context_is_the_end_of_its_document_without_the_prompt():
    of = scored()
    words = [f"<{token}>".encode() for token in range(len(BYTES))]
    prompt = dataclasses.replace(of.run.prompt, bytes_of=words)
    trunk = tiny_trunk([9, 9])
    row = readable_rows(trunk, 30)[-1]
    (sample,) = reasoned(trunk, [], None)[int(trunk.samples[row]) :][:1]
    own = row - int((trunk.samples < trunk.samples[row]).sum())
    first, _ = sample.sample.document_of(own)
    assert sample.sample.columns[first] == -1, "the prompt"
    expected = "".join(f"<{t}>" for t in sample.sample.tokens[first + 2 : own + 1].tolist())
    position = dataclasses.replace(of.reasoned[0].positions[0], row=own)
    shown = read_samples(prompt, [ReasonedSample(sample.sample, [position])], 0)
    assert {one.context for one in shown} == {expected[-200:]}


def test_bytes_that_are_no_utf8_are_replaced():
    prompt = dataclasses.replace(tiny_prompt(), bytes_of=["é".encode()[:1], "é".encode()[1:]])
    assert prompt.text([0, 1]) == "é"
    assert prompt.text([0]) == "\ufffd"


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
