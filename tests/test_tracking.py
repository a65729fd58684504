"""Logs that cannot be written: said once, no half line stays, and training goes on."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_rmt.job import metrics, tracking
from megatron_rmt.job.metrics import append_lines, write_metrics
from megatron_rmt.job.tracking import WANDB_KEY, Forgiving, continue_wandb_run

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_told", set())


class FullDisk:
    """A file that takes ``room`` bytes, a few at a time, and then fails."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(len(content), self.room, 7)
        self.room -= taken
        return self.file.write(content[:taken])

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch):
    """``disk(room)``: from now on files opened for appending have so many bytes left."""

    def limit(room: int) -> None:
        def opened(*rest, **named) -> FullDisk:
            return FullDisk(open(*rest, **named), room)

        monkeypatch.setattr(metrics, "open", opened, raising=False)

    return limit


def test_a_short_write_is_written_on(tmp_path, disk):
    disk(10_000)
    append_lines(tmp_path / "m.jsonl", ['{"a": 1}', '{"b": "long enough for several writes"}'])
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 2


def test_a_full_disk_leaves_no_half_line_and_is_said_once(tmp_path, disk, capsys):
    path = tmp_path / "m.jsonl"
    write_metrics(path, 1, {"rmt reward": 0.5})
    whole = path.read_text()
    disk(20)
    for iteration in (2, 3):
        write_metrics(path, iteration, {"rmt reward": 0.5})
        assert path.read_text() == whole
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"RMT: {path} cannot be written (OSError: [Errno 28] No space left on device)" in said
    disk(10_000)
    write_metrics(path, 4, {"rmt reward": 0.5})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 4]


@pytest.mark.parametrize("path", ["/dev/full", "/proc/nowhere/m.jsonl", "/dev/null/m.jsonl"])
def test_a_place_where_nothing_can_be_written_is_said_once(path, capsys):
    for iteration in (1, 2):
        write_metrics(Path(path), iteration, {"rmt reward": 0.5})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert path in said


def test_a_pipe_that_nobody_reads_holds_nothing_up(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    append_lines(pipe, ["{}"])
    assert f"RMT: {pipe} cannot be written (OSError: [Errno 6]" in capsys.readouterr().err
    tracking._told.clear()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    append_lines(pipe, ['{"a": 1}'])
    assert os.read(reader, 100) == b'{"a": 1}\n'
    append_lines(pipe, ["x" * 10**6])
    assert "its reader does not read); training goes on" in capsys.readouterr().err
    os.close(reader)


def test_a_folder_that_is_deleted_is_made_again(tmp_path):
    path = tmp_path / "folder/m.jsonl"
    append_lines(path, ['{"a": 1}'])
    path.unlink()
    path.parent.rmdir()
    append_lines(path, ['{"a": 2}'])
    assert path.read_text() == '{"a": 2}\n'


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ('{"a": 1}\n{"a": 2', '{"a": 1}\n{"b": 3}\n'),
        ('{"a": 1', '{"b": 3}\n'),
        ('{"a": 1}\n{"a": 2}', '{"a": 1}\n{"a": 2}\n{"b": 3}\n'),
        ("notes of somebody", 'notes of somebody\n{"b": 3}\n'),
        ("", '{"b": 3}\n'),
    ],
)
def test_half_a_line_of_an_earlier_run_is_cut_off_and_nothing_else(tmp_path, left, expected):
    path = tmp_path / "m.jsonl"
    path.write_text(left)
    append_lines(path, ['{"b": 3}'])
    assert path.read_text() == expected


def test_the_start_of_a_last_line_that_is_too_long_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LONGEST_LINE", 8)
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 123456789')
    append_lines(path, ['{"b": 3}'])
    assert path.read_text() == '{"a": 123456789\n{"b": 3}\n'
    # Nor does it begin where one begins to look.
    path.write_text('text before {"a": 12')
    append_lines(path, ['{"b": 3}'])
    assert path.read_text() == 'text before {"a": 12\n{"b": 3}\n'


class Broken:
    """A writer whose service is gone."""

    name = "a run"
    steps = 3

    def log(self, values, step=None):
        raise ConnectionError("service is gone")

    @property
    def run(self):
        raise RuntimeError("no run")

    class Table:
        pass


def test_a_writer_that_fails_is_said_once_and_answers_nothing(capsys):
    writer = Forgiving(Broken(), "wandb")
    for _ in range(3):
        assert writer.log({"a": 1}, 2) is None
    assert writer.run is None
    assert (writer.name, writer.steps) == ("a run", 3)
    assert isinstance(writer.Table(), Broken.Table)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "RMT: wandb cannot be written (ConnectionError: service is gone)" in said


def test_a_writer_passes_for_the_one_it_stands_for(tmp_path):
    inner = SummaryWriter(tmp_path)
    writer = Forgiving(inner, "TensorBoard")
    assert isinstance(writer, SummaryWriter)
    assert writer == inner
    assert bool(writer)
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 100
    # As Megatron's timers ask which module it is.
    assert Forgiving(torch, "a module") == torch
    inner.close()


def test_tensorboard_on_a_full_disk_goes_on(tmp_path, capsys):
    inner = SummaryWriter(tmp_path)
    writer = Forgiving(inner, "TensorBoard")

    def full(content):
        raise OSError(28, "No space left on device")

    inner.file_writer.event_writer._async_writer._writer.write = full
    for iteration in range(30):
        writer.add_scalar("loss", 1.0, iteration)
    writer.flush()
    writer.close()
    said = capsys.readouterr().err
    assert said.count("RMT:") == 1
    assert "RMT: TensorBoard cannot be written (OSError: [Errno 28] No space left" in said


def _args(folder: Path, **changes) -> Namespace:
    values = {"wandb_project": "p", "wandb_exp_name": "e", "wandb_entity": "", "rank": 1}
    return Namespace(**values | {"world_size": 2, "save": str(folder)} | changes)


@pytest.fixture
def run_id(monkeypatch: pytest.MonkeyPatch):
    """The run that the environment names after ``continue_wandb_run``."""
    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.setenv("WANDB_RESUME", "")

    def after(args: Namespace) -> str:
        os.environ["WANDB_RUN_ID"] = ""
        del os.environ["WANDB_RESUME"]
        continue_wandb_run(args)
        os.environ.setdefault("WANDB_RESUME", "")
        return os.environ["WANDB_RUN_ID"]

    return after


def test_a_resumed_job_names_the_same_wandb_run_and_another_job_another(tmp_path, run_id):
    first = run_id(_args(tmp_path / "one"))
    assert len(first) == 8
    assert os.environ["WANDB_RESUME"] == "allow"
    assert run_id(_args(tmp_path / "one")) == first
    assert run_id(_args(tmp_path / "two")) != first
    assert run_id(_args(tmp_path / "one", wandb_exp_name="f")) != first
    (tmp_path / "one" / WANDB_KEY).write_text("$(rm -rf)")
    assert run_id(_args(tmp_path / "one")) not in ("", first)
    assert re.fullmatch(r"[0-9a-f]{16}\n", (tmp_path / "one" / WANDB_KEY).read_text())


def test_a_run_that_the_environment_names_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    continue_wandb_run(_args(tmp_path))
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("changes", [{"wandb_project": ""}, {"save": None}, {"rank": 0}])
def test_without_wandb_no_run_is_named(tmp_path, run_id, changes):
    assert run_id(_args(tmp_path / "one", **changes)) == ""
    assert not (tmp_path / "one").exists()
