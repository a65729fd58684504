"""Digests of a checkpoint's files: bits that flip while it lies on disk are seen before a load.

Each process that writes files of a checkpoint writes ``rmt_digest_<its rank>.json`` beside them,
with their CRC-32, which finds any flipped bit and any damage of up to 32 bits in a row, and misses
other damage once in 4e9 times. CRC-32 as it meets accidents, not forgers, and is several times as
fast as a cryptographic hash. The files are read for it once they are written and flushed, by the
process that wrote them: what is saved beside training is digested beside training.

The old digest goes before the first of its files is written and the new one comes after the last,
so one that a killed job leaves behind never speaks of other files than those that lie there. Files
without a digest are taken as they are.
"""

import contextlib
import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_PREFIX = "rmt_digest_"
# What is in the place of a rank where the index is concerned.
_INDEX = "index"
_CHUNK = 1 << 24


def file_digest(path: Path) -> str:
    """CRC-32 of a file's bytes, as 8 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    total, buffer = 0, bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            total = zlib.crc32(view[:length], total)
    return f"{total:08x}"


@contextlib.contextmanager
def digested(folder: Path, writer: int | str, names: Sequence[str]) -> Iterator[None]:
    """What is done inside writes the files ``names`` of ``folder``, whose digest is then written;
    none for no names, and an older one is gone.

    A digest that cannot be written is named on stderr and left out: the checkpoint is whole.
    """
    place = folder / f"{_PREFIX}{writer}.json"
    with contextlib.suppress(OSError):
        place.unlink()
    yield
    if not names:
        return
    partial = place.with_suffix(".partial")
    try:
        found = {name: file_digest(folder / name) for name in names}
        with partial.open("w", encoding="ascii") as file:
            json.dump({"crc32": found}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
    except OSError as error:
        print(f"RMT: {place} cannot be written ({error.strerror}).", file=sys.stderr, flush=True)


def recorded_digests(folder: Path) -> dict[str, str]:
    """The digest of each file of ``folder`` that has one, by its name.

    Raises:
        ValueError: what holds them is damaged.
    """
    found: dict[str, str] = {}
    for place in sorted(folder.glob(f"{_PREFIX}*.json")):
        try:
            found |= {str(name): str(crc) for name, crc in _read(place)["crc32"].items()}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{place.name} holds no digests; delete it if it is damaged") from None
    return found


def _read(place: Path) -> Any:
    return json.loads(place.read_text(encoding="ascii"))


def damage(folder: Path, names: Iterable[str], recorded: dict[str, str]) -> list[str]:
    """What is wrong with each of the files ``names``, of those that are not as they were written;
    reads each of them once."""
    problems = []
    for name in names:
        try:
            now = file_digest(folder / name)
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
            continue
        if now != recorded[name]:
            problems.append(
                f"{name} is not as it was written (CRC-32 {now}, and was {recorded[name]})"
            )
    return problems


def check_digests(folder: Path) -> None:
    """Collective over all ranks, each of which reads its share of the files; one exchange of text.

    Raises:
        SystemExit: a file is damaged; on every rank.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        recorded = recorded_digests(folder)
        problems = damage(folder, sorted(recorded)[rank::ranks], recorded)
    except ValueError as error:
        problems = [str(error)]
    found = [problems] * ranks
    if ranks > 1:
        dist.all_gather_object(found, problems)
    every = sorted({problem for of_rank in found for problem in of_rank})
    if every:
        more = f" (and {len(every) - 1} more)" if len(every) > 1 else ""
        raise SystemExit(
            f"RMT: the checkpoint {folder} is not loaded: {every[0]}{more}; copy it again, name "
            "another one with --ckpt-step, or pass --rmt-no-digests to load it as it is."
        )


def with_digests(original: Callable[..., Any], writer: Any, wanted: bool) -> Any:
    """How a rank writes its files of a checkpoint, in whichever process: with their digest, or
    with none where it is not ``wanted``."""
    write, preload, arguments = original(writer)
    if write is not None and not writer.use_msc:
        write = functools.partial(_write, write, wanted)
    return write, preload, arguments


def _write(
    write: Callable[..., Any], wanted: bool, rank: int, buckets: list[Any], results: Any
) -> None:
    """``write`` puts what it wrote, or its failure, into ``results``."""
    names = [name for _, name, _ in buckets]
    with digested(Path(buckets[0][0]).parent, rank, names if wanted else []):
        write(rank, buckets, results)


def index_with_digest(write: Callable[[], None], writer: Any, wanted: bool) -> None:
    """Writes the index of a checkpoint, which says what lies where in its files."""
    if writer.use_msc:
        write()
        return
    with digested(Path(writer.checkpoint_dir), _INDEX, [".metadata"] if wanted else []):
        write()
