"""The ``.bin`` and ``.idx`` that a tool writes: one process at a time, whole or not at all."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def check_output(prefix: str, inputs: Sequence[Path], overwrite: bool) -> dict[str, Path]:
    """The paths of the ``.bin`` and ``.idx`` files.

    Raises:
        ValueError: the prefix names no file that can be written, or one that is there.
    """
    if "://" in prefix or Path(prefix).name in ("", "..") or prefix.endswith((os.sep, "/.")):
        raise ValueError(
            f"--output-prefix {prefix} names no local file; add the name that .bin and .idx get."
        )
    final = {kind: Path(f"{prefix}.{kind}") for kind in ("bin", "idx")}
    nearest = next(path for path in final["bin"].absolute().parents if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--output-prefix {prefix}: {nearest} is a file; choose another prefix.")
    for path in final.values():
        if path.is_dir() or path.resolve() in [source.resolve() for source in inputs]:
            kind = "a directory" if path.is_dir() else "an --input"
            raise ValueError(f"--output-prefix {prefix}: {path} is {kind}; choose another prefix.")
    if not overwrite and any(path.exists() for path in final.values()):
        raise ValueError(
            f"--output-prefix {prefix}: {prefix}.bin or .idx exists; choose another prefix, or "
            "pass --overwrite."
        )
    return final


@contextlib.contextmanager
def partial_files(prefix: str) -> Iterator[dict[str, Path]]:
    """Paths of the two files while they are written, for this process alone; removed afterwards.

    Raises:
        ValueError: another process writes them, or they cannot be made.
    """
    paths = {kind: Path(f"{prefix}.partial.{kind}") for kind in ("bin", "idx")}
    with contextlib.ExitStack() as stack:
        with writing(prefix):
            paths["bin"].parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(paths["bin"], prefix))
            for path in paths.values():
                stack.callback(path.unlink, missing_ok=True)
        yield paths


def replace_both(partial: Mapping[str, Path], final: Mapping[str, Path], prefix: str) -> None:
    """Give the written files their names."""
    with writing(prefix):
        # An index never stands beside the tokens of another run, even if this is interrupted.
        final["idx"].unlink(missing_ok=True)
        partial["bin"].replace(final["bin"])
        partial["idx"].replace(final["idx"])


@contextlib.contextmanager
def alone(path: Path, prefix: str) -> Iterator[None]:
    """Hold ``path``, which is made, for this process alone; the kernel gives it back at its end.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be made, or is a symbolic link.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"--output-prefix {prefix}: another process is writing {path}; wait for it, or "
                    "choose another prefix."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            # Its owner may have finished, and renamed it, between the two calls.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                if os.fstat(file).st_size:
                    print(f"{path}, which a killed process left, is written over", file=sys.stderr)
                yield
                return
        finally:
            os.close(file)


@contextlib.contextmanager
def writing(prefix: str) -> Iterator[None]:
    """An ``OSError`` inside becomes a ``ValueError`` that names the flag."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--output-prefix {prefix} cannot be written ({error.strerror}); make room or choose "
            "another prefix."
        ) from None
