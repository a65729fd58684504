"""One job at a time writes to a ``--save`` folder.

The first rank locks a file there for as long as it lives. The kernel (on NFS the server) gives the
lock back when the process ends, however it ends, so what a dead job leaves behind is in nobody's
way; processes that it forked do not keep it.
"""

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
# By folder. Closing any file object of a locked file would give the lock back.
_held: dict[Path, IO[str]] = {}


def lock_problem(save: str | None) -> str | None:
    """One sentence if another job writes to ``save``, else None and the folder is this process's.

    Waits for ``LEASE_SECONDS`` where the holder is on another machine, which may be gone. Where
    there is no folder on a file system, or the file system has no locks, nothing is locked.
    """
    if not save or "://" in save:
        return None
    folder = Path(save).resolve()
    if folder in _held:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / NAME).open("a+", encoding="utf-8")
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
                return (
                    f"--save is {save}, to which another job writes (process {process or '?'} on "
                    f"{host or 'an unknown machine'}); end that job, or pass another folder."
                )
            time.sleep(min(2.0, LEASE_SECONDS / 10))
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}\n")
    file.flush()
    _held[folder] = file
    return None
