"""Two jobs on one ``--save`` folder or metrics file; what a dead one leaves is in nobody's way."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rmt.job import run_lock
from megatron_rmt.job.run_lock import NAME, lock_problem, metrics_lock_problem
from tests.distributed import REPOSITORY
from tests.tiny_run import RMT, TinyInputs, run

pytestmark = pytest.mark.faults

HOLDER = """
import os, sys, time
from megatron_rmt.job.run_lock import lock_problem, metrics_lock_problem
assert lock_problem(sys.argv[1]) is None
assert metrics_lock_problem(sys.argv[1] + "/metrics.jsonl") is None
if os.fork() == 0:
    # As a process that writes a checkpoint, and outlives its parent.
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another job that writes to ``tmp_path``, and the process that it forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_second_job_is_refused_until_the_first_is_dead(
    holder: tuple[subprocess.Popen[str], int], tmp_path: Path
):
    began = time.monotonic()
    process, child = holder
    assert lock_problem(str(tmp_path)) == (
        f"--save is {tmp_path}, to which another job writes (process {process.pid} on "
        f"{socket.gethostname()}); end that job, or pass another folder."
    )
    assert time.monotonic() - began < 1
    process.kill()
    process.wait()
    os.kill(child, 0)  # what it forked is alive
    assert lock_problem(str(tmp_path)) is None
    assert (tmp_path / NAME).read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert lock_problem(str(tmp_path)) is None, "it is its own already"


def _is_refused_elsewhere(folder: Path) -> bool:
    """Whether another process, a fork of this one, may not write to ``folder``."""
    child = os.fork()
    if child == 0:
        run_lock._held.clear()
        os._exit(int(lock_problem(str(folder)) is not None))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_who_asks_for_a_lock_of_its_own_again_keeps_it(tmp_path: Path):
    for _ in range(2):
        assert lock_problem(str(tmp_path)) is None
        assert _is_refused_elsewhere(tmp_path)


def test_a_machine_that_may_be_gone_is_waited_for(
    holder: tuple[subprocess.Popen[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 0.5)
    (tmp_path / NAME).write_text("elsewhere 17\n")
    began = time.monotonic()
    assert "(process 17 on elsewhere); end that job" in lock_problem(str(tmp_path))
    assert time.monotonic() - began >= 0.5
    (tmp_path / NAME).write_bytes(b"\xff\xfe")
    assert "(process ? on \ufffd\ufffd); end that job" in lock_problem(str(tmp_path))


def test_what_a_dead_job_wrote_is_in_nobodys_way(tmp_path: Path):
    (tmp_path / NAME).write_text("elsewhere 17\n")
    assert lock_problem(str(tmp_path)) is None
    assert lock_problem(str(tmp_path / "new")) is None
    assert lock_problem(None) is None
    assert lock_problem("msc://bucket/run") is None


def test_a_second_job_on_one_metrics_file_is_refused(
    holder: tuple[subprocess.Popen[str], int], tmp_path: Path
):
    file = str(tmp_path / "metrics.jsonl")
    assert metrics_lock_problem(file) == (
        f"--rmt-metrics-file is {file}, to which another job writes (process {holder[0].pid} on "
        f"{socket.gethostname()}); end that job, or pass another file."
    )
    assert metrics_lock_problem(str(tmp_path / "others.jsonl")) is None
    assert metrics_lock_problem(None) is None


def test_what_is_no_file_or_cannot_be_locked_is_no_reason_to_end(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for place in ("/dev/null", tmp_path / "pipe", tmp_path / "file/metrics.jsonl", "/proc/m"):
        assert metrics_lock_problem(str(place)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert not Path("/dev/null.lock").exists()


def test_a_lock_that_is_no_file_of_the_folder_is_refused_and_no_link_followed(tmp_path: Path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / NAME).symlink_to(tmp_path / "kept")
    assert lock_problem(str(tmp_path)) == (
        f"--save is {tmp_path}, whose {NAME} cannot be opened (Too many levels of symbolic links); "
        "delete it, if no other job writes there."
    )
    assert (tmp_path / "kept").read_text() == "kept"
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    assert f"whose {NAME} cannot be opened (Is a directory)" in lock_problem(str(tmp_path))
    (tmp_path / NAME).rmdir()
    os.mkfifo(tmp_path / NAME)
    assert f"whose {NAME} cannot be opened (" in lock_problem(str(tmp_path))
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).write_bytes(b"\xff\xfe\0" * 50)
    assert lock_problem(str(tmp_path)) is None


def test_a_file_system_without_locks_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    assert lock_problem(str(tmp_path)) is None
    assert tmp_path.resolve() / NAME not in run_lock._held


@pytest.mark.multiprocess
def test_the_ranks_of_a_second_job_end_with_one_sentence(
    holder: tuple[subprocess.Popen[str], int], inputs: TinyInputs, tmp_path: Path
):
    flags = [*inputs.flags(), *RMT, "--save", str(tmp_path), "--save-interval", "1"]
    with pytest.raises(AssertionError) as error:
        run(tmp_path / "logs", 2, flags)
    said = f"RMT cannot train here: --save is {tmp_path}, to which another job writes (process "
    assert f"SystemExit: {said}{holder[0].pid} on" in str(error.value)
    # The last rank writes the metrics.
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"rmt: true\nmetrics-file: {tmp_path}/metrics.jsonl\n")
    flags = [*inputs.flags(), *RMT, "--rmt-config", str(settings)]
    flags.remove("--rmt")
    with pytest.raises(AssertionError) as error:
        run(tmp_path / "more", 2, flags)
    said = f"RMT cannot train here: --rmt-metrics-file is {tmp_path}/metrics.jsonl, to which anothe"
    assert f"SystemExit: {said}" in str(error.value)
