"""Reading what a person has written, without ever waiting for it."""

import errno
from pathlib import Path


def read_text_file(path: Path) -> str:
    """The text of a regular file, UTF-8.

    Raises:
        OSError: it cannot be read; also for a pipe or a device, at which a read could wait forever.
        UnicodeDecodeError: it is not UTF-8.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path.read_text(encoding="utf-8")
