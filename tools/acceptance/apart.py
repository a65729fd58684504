"""Checks in a process of their own: one that crashes, hangs or spoils the device ends alone.

The process carries out one check after the other. Where it dies, or a check takes longer than its
limit, or breaks, after which nothing more can be said of the device, another process goes on with
the next.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from acceptance.check import Found

# A process imports torch and Megatron before its first check.
START_SECONDS = 300
# For what a run leaves behind: torchrun ends its ranks.
END_SECONDS = 30


def results(
    limits: Mapping[str, float], command: Sequence[str], log: Path, seconds: float
) -> Iterator[tuple[str, Found, float]]:
    """(name, what was found, seconds) of each check of ``limits``, in turn.

    limits: seconds of each check. command: starts a process that calls ``carry_out_all`` with the
    file descriptor and the names that are put behind it. log: what the newest process prints.
    seconds: of all checks together; what then is left has failed.
    """
    end = time.monotonic() + seconds
    left = list(limits)
    while left:
        with _process(command, left, log) as (process, connection):
            began = time.monotonic()
            wait = min(START_SECONDS, end - began)
            ready = _received(process, connection, log, wait, "start")
            if ready.broke:
                # Another process would not start either.
                yield from ((name, ready, 0.0) for name in left)
                return
            goes_on = True
            while goes_on and left:
                name, began = left.pop(0), time.monotonic()
                limit = min(limits[name], end - began)
                found = _received(process, connection, log, limit, "end")
                goes_on = not found.broke
                yield name, found, time.monotonic() - began
                if time.monotonic() > end:
                    late = Found(False, f"not begun within {seconds:.0f} s")
                    yield from ((other, late, 0.0) for other in left)
                    return


def carry_out_all(descriptor: int, names: Sequence[str], carry_out: Callable[[str], Found]) -> None:
    """In the process: tell ``results`` what each check finds, up to one that breaks."""
    connection = Connection(descriptor, readable=False)
    connection.send(Found(None, "ready"))
    for name in names:
        try:
            found = carry_out(name)
        except Exception as error:
            found = Found.error(error)
        connection.send(found)
        if found.broke:
            return


@contextlib.contextmanager
def _process(
    command: Sequence[str], names: Sequence[str], log: Path
) -> Iterator[tuple[subprocess.Popen, Connection]]:
    ours, theirs = Pipe(duplex=False)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), *names],
            pass_fds=[theirs.fileno()],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    theirs.close()
    try:
        yield process, ours
    finally:
        ours.close()
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """With all that it started. torchrun's ranks are in sessions of their own: it must live on
    until it has ended them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        limit = time.monotonic() + END_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < limit:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    process.wait()


def _received(
    process: subprocess.Popen, connection: Connection, log: Path, limit: float, what: str
) -> Found:
    """What the process says within ``limit`` seconds, or why it says nothing."""
    if not connection.poll(max(0.0, limit)):
        return Found(False, f"did not {what} within {max(0.0, limit):.0f} s", broke=True)
    try:
        return connection.recv()
    except EOFError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        code = process.returncode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
        return Found(False, f"its process ended, {how}: {''.join(lines[-1:])[:200]}", broke=True)
