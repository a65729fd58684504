"""Files of a corpus as people have them: JSON lines, compressed or not, Parquet, folders of shards.

What a file is its first bytes say. Parquet is read through pyarrow, one row group at a time.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from json_lines import Row, read_rows

PARQUET = b"PAR1"
ROWS_AT_ONCE = 64
_SHARD = re.compile(r".*\.(jsonl?|ndjson|parquet)(\.(gz|bz2|xz|zst))?", re.IGNORECASE)


def files_of(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """``paths`` with each folder replaced by the shards in it, and the files left out of folders.

    Shards are files called ``*.jsonl``, ``.json``, ``.ndjson`` or ``.parquet``, and ``.gz``,
    ``.bz2``, ``.xz`` or ``.zst`` after it, in the folder and those below it, ``part-2`` before
    ``part-10``. Hidden files, and those that begin with ``_``, as other programs leave them, are
    neither.

    Raises:
        ValueError: a folder has no shard.
    """
    found, others = list[Path](), list[Path]()
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        own = [one for one in inside if not re.search(r"/[._]", f"/{one.relative_to(path)}")]
        shards = [one for one in own if _SHARD.fullmatch(one.name)]
        if not shards:
            raise ValueError(
                f"{path} is a folder without files called *.jsonl, .json, .ndjson or .parquet, or "
                "one of these and .gz, .bz2, .xz or .zst; name files."
            )
        found += sorted(shards, key=_natural)
        others += sorted(set(own) - set(shards), key=_natural)
    return found, others


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d+)|(\D+)", str(path))]


def read_corpus(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of a file in order; of a Parquet file with the columns ``keys`` alone, if it has the
    first of them.

    Raises:
        ValueError: see ``read_rows``; a Parquet file cannot be read, or pyarrow is missing.
    """
    try:
        with open(path, "rb") as file:
            is_parquet = file.read(len(PARQUET)) == PARQUET
    except OSError:
        is_parquet = False  # read_rows says what is wrong
    return _parquet_rows(path, keys) if is_parquet else read_rows(path)


def _parquet_rows(path: Path, keys: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path} is a Parquet file, for which pyarrow is missing; pip install pyarrow."
        ) from None
    number, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            columns = [key for key in keys if key in names] if keys[0] in names else names
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{path}:{number}", size * number // rows, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path}:{number + 1} cannot be read ({reason}); make or download the file again."
        ) from None
