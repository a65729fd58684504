"""Rollouts as text: which, what is read from them, and that file and wandb hold the same rows."""

import dataclasses
import json
import random
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from wandb.proto.wandb_internal_pb2 import Record

from megatron_rmt.algorithm.settings import Settings, argument_name
from megatron_rmt.job import samples
from megatron_rmt.job.samples import is_shown, read_samples, read_text
from megatron_rmt.job.settings import versions
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample
from tests.packed import reasoned
from tests.tiny_run import PRETRAIN, RMT, TinyInputs, run
from tests.tiny_step import BYTES, readable_rows, scored, tiny_prompt, tiny_trunk

COLUMNS = [field.name for field in fields(samples.ShownRollout)]
IN_TABLE = [name for name in COLUMNS if name not in ("tokens", "log_probs")]


def test_rows_by_hand():
    of = scored(answer_tokens=1)
    shown = read_samples(of.run.prompt, of.reasoned, _entropies(of.reasoned), 6)
    assert [one.iteration for one in shown] == [7] * 4
    assert [one.thought for one in shown] == ["aa", "aaaaaaaa", "a", "aaaa"]
    assert [one.reward for one in shown] == [0.875, 0.0, 0.0625, 1.0]
    assert [one.thought_tokens for one in shown] == [2, 8, 1, 4]
    assert [one.right for one in shown] == [True, False, False, True]
    assert [one.rollout for one in shown] == [0, 1, 0, 1]
    places = [(of.sample, own) for of in of.reasoned for own in of.positions]
    for one, (sample, position) in zip(shown[::2], places, strict=True):
        assert (one.sample, one.token) == (sample.index, int(sample.columns[position.row]))
    advantages = [value for _, position in places for value in position.advantages]
    assert [one.advantage for one in shown] == [round(value, 6) for value in advantages]
    assert all(text == "a" for text in shown[1].tokens)
    # The fifth token of the last response was not drawn.
    assert [at for at, value in enumerate(shown[3].log_probs) if value is None] == [4]
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
    shown = read_samples(of.run.prompt, of.reasoned * 3, _entropies(of.reasoned * 3), 0)
    assert len(shown) == samples.POSITIONS * 2
    assert shown[:4] == shown[4:]


def _entropies(reasoned_samples: list[ReasonedSample]) -> torch.Tensor:
    """A number of its own for each row: the row in its sample."""
    return torch.cat([torch.arange(len(of.sample)).float() for of in reasoned_samples])


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
    alone = [ReasonedSample(sample.sample, [position])]
    shown = read_samples(prompt, alone, _entropies(alone), 0)
    assert {one.context for one in shown} == {expected[-200:]}


def test_a_text_has_the_entropy_of_each_token_where_it_is_predicted_and_the_chosen_ones():
    of = scored()
    words = [f"<{token}>".encode() for token in range(len(BYTES))]
    prompt = dataclasses.replace(of.run.prompt, bytes_of=words)
    sample = reasoned(tiny_trunk([9, 9]), [], None)[0].sample
    labelled = sample.labelled
    rows = [row for row in range(len(sample)) if labelled[row] and sample.columns[row] >= 0]
    own = [ReasonedSample(sample, [ChosenPosition(row, 1, []) for row in (rows[3], rows[-1])])]
    tiers = torch.where(labelled, torch.arange(len(sample)) % 4 - 1, -1)
    text = read_text(prompt, own, _entropies(own), tiers, 4)
    assert (text.iteration, text.sample) == (5, sample.index)
    by_column = {int(column): row for row, column in enumerate(sample.columns)}
    known = [int(sample.tokens[by_column[column]]) for column in range(int(max(by_column)) + 1)]
    if labelled[-1]:
        known.append(int(sample.labels[-1]))
    assert text.tokens == [f"<{token}>" for token in known]
    expected = [by_column.get(at - 1) for at in range(len(known))]
    expected = [None if row is None or not labelled[row] else row for row in expected]
    assert text.entropies == [None if row is None else float(row) for row in expected]
    names = {-1: None, 0: "easy", 1: "medium", 2: "hard"}
    assert text.tiers == [None if row is None else names[int(tiers[row])] for row in expected]
    assert text.chosen == [int(sample.columns[rows[3]]) + 1, int(sample.columns[rows[-1]]) + 1]
    assert read_text(prompt, [ReasonedSample(sample)], _entropies(own), tiers, 4) is None


def test_the_texts_of_tokens_are_the_text_whatever_the_tokens_cut():
    pieces = [b"\xc3", b"\xa9", b"a\xe2\x88", b"\x9a", b"", b"\xf0\x9f", b"b", b"\xf0"]
    prompt = dataclasses.replace(tiny_prompt(), bytes_of=pieces)
    generator = random.Random(0)
    for length in range(12):
        for _ in range(50):
            tokens = generator.choices(range(len(pieces)), k=length)
            texts = samples._texts(prompt, tokens)
            assert len(texts) == length
            assert "".join(texts) == prompt.text(tokens)


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
    for row in rows:
        assert "".join(row["tokens"]).startswith(row["thought"])
        assert len(row["tokens"]) == len(row["log_probs"])
        assert all(value is None or value <= 0 for value in row["log_probs"])

    lines = (tmp_path / "logs/rmt_texts.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    assert [text["iteration"] for text in texts] == [1, 2, 3, 4]
    for text in texts:
        # Of 64 tokens, all predicted but the first, and the one behind them.
        assert len(text["tokens"]) == len(text["entropies"]) == len(text["tiers"]) == 65
        of = {row["token"]: row for row in rows if row["iteration"] == text["iteration"]}
        assert {index - 1 for index in text["chosen"]} <= of.keys()
        for index in text["chosen"]:
            shown = of[index - 1]
            assert text["entropies"][index] == shown["entropy"]
            assert text["tiers"][index] is not None
            assert shown["context"].endswith("".join(text["tokens"][:index])[-20:])
    assert (tmp_path / "again/rmt_texts.jsonl").read_text().splitlines() == lines[2:]

    tables = sorted(first.glob("wandb/offline-run-*/files/media/table/*.json"))
    found = [json.loads(table.read_text()) for table in tables]
    assert [table["columns"] for table in found] == [IN_TABLE] * 4
    in_tables = sorted((row for table in found for row in table["data"]), key=lambda row: row[0])
    assert in_tables == [[row[name] for name in IN_TABLE] for row in rows]

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
