"""One job at a time writes to a ``--save`` folder, and to a ``--rmt-metrics-file``.

The rank that writes there locks a file beside it for as long as it lives. The kernel (on NFS the
server) gives the lock back when the process ends, however it ends, so what a dead job leaves behind
is in nobody's way; processes that it forked do not keep it.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

NAME = "rmt.lock"
# How long an NFS server may hold the lock of a node that is gone (its lease, 90 s, and a little).
LEASE_SECONDS = 100.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# By path. Closing any file object of a locked file would give the lock back.
_held: dict[Path, IO[str]] = {}


def lock_problem(save: str | None) -> str | None:
    """One sentence if another job writes to ``save``, or nobody can tell; else None and the folder
    is this process's. Where there is no folder on a file system, nothing is locked."""
    if not save or "://" in save:
        return None
    try:
        holder = _lock(Path(save) / NAME)
    except OSError as error:
        return (
            f"--save is {save}, whose {NAME} cannot be opened ({error.strerror or error}); delete "
            "it, if no other job writes there."
        )
    return holder and (
        f"--save is {save}, to which another job writes ({holder}); end that job, or pass another "
        "folder."
    )


def metrics_lock_problem(file: str | None) -> str | None:
    """The same of ``--rmt-metrics-file``, whose lines would mix; nothing where it cannot be locked,
    as a log ends no run, or is no regular file."""
    if not file or (Path(file).exists() and not Path(file).is_file()):
        return None
    holder = None
    with contextlib.suppress(OSError):
        holder = _lock(Path(f"{file}.lock"))
    return holder and (
        f"--rmt-metrics-file is {file}, to which another job writes ({holder}); end that job, or "
        "pass another file."
    )


def _lock(place: Path) -> str | None:
    """The process that holds the lock ``place``, in words; None if it is this one's from now on, or
    the file system has no locks.

    Waits for ``LEASE_SECONDS`` where the holder is on another machine, which may be gone.

    Raises:
        OSError: it cannot be opened.
    """
    place = place.parent.resolve() / place.name
    if place in _held:
        return None
    place.parent.mkdir(parents=True, exist_ok=True)
    # It is emptied, so it must not be what a link leads to.
    opened = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(opened, "r+", encoding="utf-8", errors="replace")
    until = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            file.seek(0)
            host, _, process = file.read(200).strip().partition(" ")
            if host == socket.gethostname() or time.monotonic() > until:
                file.close()
                return f"process {process or '?'} on {host or 'an unknown machine'}"
            time.sleep(min(2.0, LEASE_SECONDS / 10))
    file.seek(0)
    file.truncate()
    file.write(f"{socket.gethostname()} {os.getpid()}\n")
    file.flush()
    _held[place] = file
    return None
