"""Gloo multi-process tests: run a function, or a whole program, on several ranks of this machine.

    from tests.distributed import run_distributed

    def _sum_of_ranks(offset: int) -> float:  # module level: it is pickled by name
        value = torch.tensor(torch.distributed.get_rank() + offset)
        torch.distributed.all_reduce(value)
        return value.item()

    @pytest.mark.multiprocess
    def test_sum():
        assert run_distributed(2, _sum_of_ranks, 10) == [21, 21]

Importing this module puts the CPU in the place of CUDA (where there is none) for the test process
and for every rank, and limits each of them to one thread.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch

from megatron_rmt.cpu import platform as cpu_platform

if not torch.cuda.is_available():
    cpu_platform.install()
torch.set_num_threads(1)

from megatron.core import parallel_state, tensor_parallel  # noqa: E402 after the platform

REPOSITORY = Path(__file__).resolve().parents[1]

# A rank is forked from a server that has imported torch and Megatron, but has run nothing: it
# starts in well under a second, where a fresh interpreter takes ten.
_ranks = get_context("forkserver")
_ranks.set_forkserver_preload(["tests.distributed"])


def run_distributed(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """``function(*args)`` on ``world_size`` gloo ranks; what each rank returned, in rank order.

    The default process group is initialised when ``function`` is called. ``function`` must be at
    module level; ``args`` and the results must be picklable (tensors are).

    Raises:
        RuntimeError: a rank raised, or died. The message holds the traceback of the first one that
            did, its exception is the cause, and the other ranks are killed.
        TimeoutError: some ranks, which are named, did not end within ``timeout`` seconds. All are
            killed; their Python stacks are on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        task = pickle.dumps((function, args))
        processes = [
            _ranks.Process(
                target=_run_rank, args=(rank, world_size, folder, task, timeout), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, timeout)
            return [_outcome(folder, rank)[1] for rank in range(world_size)]
        except ChildProcessError:
            raise _failure(processes, folder) from _first_exception(folder, world_size)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _run_rank(rank: int, world_size: int, folder: str, task: bytes, timeout: float) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.dump_traceback_later(timeout + 60, exit=True)  # should the test process be gone
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    try:
        function, args = pickle.loads(task)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        outcome = pickle.dumps((time.monotonic(), function(*args), None))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            outcome = pickle.dumps((time.monotonic(), error, text))
            pickle.loads(outcome)
        except Exception:  # an exception that cannot travel: its text can
            outcome = pickle.dumps((time.monotonic(), None, text))
        _write(folder, rank, outcome)
        os._exit(1)  # without waiting for the other ranks
    _write(folder, rank, outcome)
    torch.distributed.destroy_process_group()


def _write(folder: str, rank: int, outcome: bytes) -> None:
    partial = Path(folder, f"rank{rank}.partial")
    partial.write_bytes(outcome)
    partial.rename(Path(folder, f"rank{rank}"))


def _outcome(folder: str, rank: int) -> tuple[float, Any, str | None]:
    """(time, returned value or exception, traceback if it raised)."""
    return pickle.loads(Path(folder, f"rank{rank}").read_bytes())


def _wait(processes: Sequence[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    while running:
        ended = connection.wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            ranks = [rank for rank, p in enumerate(processes) if p in running.values()]
            raise TimeoutError(
                f"ranks {ranks} of {len(processes)} were still running after {timeout} s"
            )
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                time.sleep(0.2)  # the rank whose fault it was may still be writing its traceback
                raise ChildProcessError


def _failures(folder: str, world_size: int) -> list[tuple[float, int, Any, str]]:
    """(time, rank, exception, traceback) of the ranks that raised, the first one first."""
    failures = []
    for rank in range(world_size):
        if Path(folder, f"rank{rank}").exists():
            moment, error, text = _outcome(folder, rank)
            if text is not None:
                failures.append((moment, rank, error, text))
    return sorted(failures, key=lambda failure: failure[:2])


def _first_exception(folder: str, world_size: int) -> BaseException | None:
    failures = _failures(folder, world_size)
    return failures[0][2] if failures else None


def _failure(processes: Sequence[Any], folder: str) -> RuntimeError:
    failures = _failures(folder, len(processes))
    if failures:
        _, rank, _, text = failures[0]
        return RuntimeError(f"rank {rank} of {len(processes)} failed:\n{text}")
    died = {r: p.exitcode for r, p in enumerate(processes) if p.exitcode not in (None, 0)}
    return RuntimeError(f"ranks of {len(processes)} died without a traceback, exit codes: {died}")


def run_torchrun(
    nproc: int,
    script_args: Sequence[str | os.PathLike[str]],
    env: dict[str, str] | None = None,
    timeout: float = 600,
    cwd: str | os.PathLike[str] = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node nproc *script_args`` with this Python and a free port.

    Args:
        script_args: the script (or ``-m``, module) and its arguments.
        env: variables added to this process's environment.

    Returns:
        The completed process; ``stdout`` holds what all ranks wrote to stdout and stderr.

    Raises:
        AssertionError: it failed, or ran longer than ``timeout`` seconds (then it was stopped).
            The message ends with the last 60 lines of output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    # The rendezvous server takes a free port itself, so that tests may run side by side.
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *map(str, script_args)]
    environment = {**os.environ, **(env or {})}
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout)
            ending = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"still running after {timeout} s"
        finally:
            _stop(process)
        output.seek(0)
        text = output.read()
    if process.returncode != 0 or ending.startswith("still"):
        tail = "\n".join(text.splitlines()[-60:])
        raise AssertionError(f"{' '.join(command[1:])}: {ending}\n{tail}")
    return subprocess.CompletedProcess(command, process.returncode, text, "")


def _stop(process: subprocess.Popen[Any]) -> None:
    """Ends torchrun; on SIGTERM it ends its workers, which live in sessions of their own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def single_process_megatron(seed: int = 1234) -> None:
    """Megatron's parallel state for this one process (TP = PP = DP = 1), to build models in it.

    May be called again and again; each call reseeds.
    """
    if not torch.distributed.is_initialized():
        backend = "gloo" if cpu_platform.is_installed() else "nccl"
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
