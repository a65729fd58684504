"""A directory that exists only when it is complete, whatever ends the process that fills it."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
# What flock says where the file system has no locks.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Left free on the disk beside what is written: metadata, tokenizer, other people's small files.
SPARE_BYTES = 64 * 2**20


@contextlib.contextmanager
def complete_directory(target: Path, size: int = 0) -> Iterator[Path]:
    """A new directory to fill, which takes the name ``target`` only if the block succeeds.

    It is filled as ``.NAME.partial`` beside ``target``. What a killed process left there is removed
    by the next one; a living process is not disturbed.

    Args:
        target: Directory to create.
        size: Bytes that will be written.

    Raises:
        ValueError: ``target`` exists and is not an empty directory, another process is writing it,
            a symbolic link stands where it is filled, the disk has too little space, or the
            directory cannot be made.
    """
    _check_absent(target)
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial, target):
            try:
                _check_space(target.parent, size)
                yield partial
                (partial / LOCK).unlink(missing_ok=True)
                # Replaces an empty directory, and nothing else.
                _check_absent(target)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        where = error.filename or target
        raise ValueError(
            f"--target {target} cannot be written ({where}: {error.strerror or error}); "
            "nothing was left behind."
        ) from error


def _check_absent(target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ValueError(f"--target {target} exists; remove it or choose another name.")


def _check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size and free < size + SPARE_BYTES:
        raise ValueError(
            f"--target needs {size / 2**30:.2f} GiB in {directory}, and only "
            f"{max(0, free - SPARE_BYTES) / 2**30:.2f} GiB are free; make room or choose another "
            "disk."
        )


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Hold ``partial``, made afresh, for this process alone."""
    busy = ValueError(
        f"Another process is writing --target {target}; wait for it to end. If there is none, "
        f"remove {partial}."
    )
    while True:
        try:
            partial.mkdir()
            is_new = True
        except FileExistsError:
            is_new = False
        if partial.is_symlink():
            raise ValueError(
                f"{partial}, where --target {target} would be filled, is a symbolic link, which is "
                "not followed; remove it."
            )
        try:
            # Nor is a link to another file locked, or made, in place of this one.
            lock = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # Its owner has just finished, or given up.
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not (is_new and error.errno in WITHOUT_LOCKS):
                    raise busy from error
            if not _is_same_file(lock, partial / LOCK):
                continue  # The owner renamed or removed it between open and flock.
            _empty(partial)
            yield
            return
        finally:
            os.close(lock)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _empty(directory: Path) -> None:
    """Remove all but the lock."""
    for path in directory.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
