"""Processes that are gone with their parent, however it went."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.training import global_vars

from megatron_rmt.job.processes import end_when_interrupted
from tests.distributed import REPOSITORY

pytestmark = [pytest.mark.faults, pytest.mark.multiprocess]

# A rank, the worker that writes its checkpoints as Megatron starts it, but idle, and what holds the
# results of a save.
RANK = """
import os, sys, time
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

def idle(*args):
    (Path(sys.argv[1]) / "worker").write_text(str(os.getpid()))
    time.sleep(60)

PersistentAsyncCaller.async_loop = staticmethod(idle)
if __name__ == "__main__":
    from megatron_rmt.job import processes

    processes.end_with_torchrun()
    processes.start_save_worker(PersistentAsyncCaller._get_process, 0)
    queue = processes.write_results_queue(filesystem_async.get_write_results_queue)
    folder = Path(sys.argv[1])
    (folder / "holder").write_text(str(queue._manager._process.pid))
    (folder / "rank").write_text(str(os.getpid()))
    time.sleep(60)
"""
# A rank that asks to end with its agent when that is gone already.
EARLY = """
import os, sys, time
from pathlib import Path

import megatron_rmt
from megatron_rmt.job.processes import end_with_torchrun

folder = Path(sys.argv[1])
(folder / "rank").write_text(str(os.getpid()))
while not (folder / "killed").exists():
    time.sleep(0.01)
end_with_torchrun()
(folder / "lives").touch()
"""
AGENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.fixture
def job(tmp_path):
    """``job(**environment)``: an agent with a rank that saves, and the numbers of the rank and of
    what it started to save."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(**environment: str) -> tuple[subprocess.Popen, int, int, int]:
        inherited = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
        command = [sys.executable, "-c", AGENT, str(tmp_path / "rank.py"), str(tmp_path)]
        inherited |= {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
        agent = subprocess.Popen(command, env=inherited | environment)
        started.append(agent.pid)
        for name in ("rank", "worker", "holder"):
            path = tmp_path / name
            assert _wait_until(functools.partial(_has_text, path), 90)
            started.append(int(path.read_text()))
        return agent, *started[1:]

    yield start
    for process in started:
        if _runs(process):
            os.kill(process, signal.SIGKILL)


def _has_text(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


def _wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rank_and_worker_are_gone_when_their_agent_is_killed(job):
    agent, *started = job(TORCHELASTIC_RUN_ID="some")
    agent.kill()
    agent.wait()
    assert _wait_until(lambda: not any(map(_runs, started)), 10)


@pytest.fixture
def interruptible(monkeypatch: pytest.MonkeyPatch):
    earlier = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", None)
    end_when_interrupted()
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_rank_in_one_sentence(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="130"):
        signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == "RMT: interrupted; the last checkpoint is as it was.\n"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "a second one ends it at once"


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_the_signal_that_a_job_waits_for(monkeypatch: pytest.MonkeyPatch):
    told = SimpleNamespace(_signal_received=False)
    monkeypatch.setattr(global_vars, "_GLOBAL_SIGNAL_HANDLER", told)
    signal.raise_signal(signal.SIGINT)
    assert told._signal_received
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_what_a_rank_forked_as_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_of_the_jobs_own_stays():
    earlier = signal.signal(signal.SIGINT, own := lambda *_: None)
    end_when_interrupted()
    assert signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, earlier)


def test_a_rank_whose_agent_dies_while_it_comes_up_ends_too(tmp_path):
    (tmp_path / "rank.py").write_text(EARLY)
    command = [sys.executable, "-c", AGENT, str(tmp_path / "rank.py"), str(tmp_path)]
    own = {"PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_RUN_ID": "some"}
    agent = subprocess.Popen(command, env=os.environ | own)
    assert _wait_until(functools.partial(_has_text, tmp_path / "rank"), 90)
    agent.kill()
    agent.wait()
    (tmp_path / "killed").touch()
    rank = int((tmp_path / "rank").read_text())
    assert _wait_until(lambda: not _runs(rank), 90)
    assert not (tmp_path / "lives").exists()


def test_a_rank_without_torchrun_outlives_its_shell_but_not_its_worker(job):
    agent, rank, *saving = job()
    agent.kill()
    agent.wait()
    time.sleep(0.5)
    assert _runs(rank)
    os.kill(rank, signal.SIGKILL)
    assert _wait_until(lambda: not any(map(_runs, saving)), 10)
