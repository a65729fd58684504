"""Files with one JSON object a line, read the same way by all tools.

Lines are UTF-8, with or without a byte order mark at the front of any of them, and end in LF, CRLF
or CR alone, all of which count as one line. Blank lines hold no object. Files compressed by gzip,
bzip2, xz or zstd are read as they are, and known by their first bytes, whatever their names; other
formats are refused by what their first bytes say. Every refusal is a ``ValueError`` of one sentence
that begins with the file and, where there is one, the line (from 1): ``train.jsonl:3: ...``.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    zstd = None

# A longer line would not fit the memory that is promised, nor its tokens Megatron's index (int32).
LONGEST_LINE = 2**30

ZSTD = b"\x28\xb5\x2f\xfd"
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
if zstd is not None:
    _COMPRESSED[ZSTD] = zstd.open
    _UNREADABLE += (zstd.ZstdError,)

_UTF_8 = "convert it to UTF-8 with iconv -f {} -t UTF-8"
_TABLE = "write its rows as lines of JSON (pandas: to_json(orient='records', lines=True))"
# What a file is by how it begins, and what to do about it; the first that fits.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (codecs.BOM_UTF32_LE, "UTF-32", _UTF_8.format("UTF-32")),
    (codecs.BOM_UTF32_BE, "UTF-32", _UTF_8.format("UTF-32")),
    (b"{\0\0\0", "UTF-32 (little-endian)", _UTF_8.format("UTF-32LE")),
    (b"\0\0\0{", "UTF-32 (big-endian)", _UTF_8.format("UTF-32BE")),
    (codecs.BOM_UTF16_LE, "UTF-16", _UTF_8.format("UTF-16")),
    (codecs.BOM_UTF16_BE, "UTF-16", _UTF_8.format("UTF-16")),
    (b"{\0", "UTF-16 (little-endian)", _UTF_8.format("UTF-16LE")),
    (b"\0{", "UTF-16 (big-endian)", _UTF_8.format("UTF-16BE")),
    (ZSTD, "compressed by zstd", "pip install backports.zstd, or zstd -d"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it with lz4 -d"),
    (b"PK\x03\x04", "a zip archive", "unpack it with unzip"),
    (b"PK\x05\x06", "an empty zip archive", "give a file of JSON lines"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with 7z x"),
    (b"Rar!", "a rar archive", "unpack it with unrar x"),
    (b"PAR1", "a Parquet file", _TABLE),
    (b"ARROW1", "an Arrow file", _TABLE),
    (b"\xff\xff\xff\xff", "an Arrow stream", _TABLE),
    (b"ORC", "an ORC file", _TABLE),
    (b"Obj\x01", "an Avro file", _TABLE),
    (b"\x89HDF", "an HDF5 file", _TABLE),
    (b"SQLite format 3\0", "an SQLite database", _TABLE),
    (b"\x93NUMPY", "a NumPy array", "write its texts as lines of JSON"),
    (b"MMIDIDX", "Megatron's index of tokens", "give the text that the tokens were made of"),
    (b"%PDF", "a PDF", "extract its text as lines of JSON"),
    (b"version https://git-lfs", "a pointer of git-lfs", "fetch the file with git lfs pull"),
    (b"<", "a page of HTML or XML", "look at it, and download the file itself"),
)
_ARRAY = "; write an array as lines with jq -c '.[]'"
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


@dataclass(frozen=True)
class Row:
    """The object of one line.

    number: of the line, from 1. place: ``file:line``, for messages. position: bytes of the file, as
    it is stored, that have been read so far (a buffer ahead of the line).
    """

    number: int
    place: str
    position: int
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """What ``key`` (``--json-key``) holds.

        Raises:
            ValueError: with file and line: there is no such key, or no Unicode text under it.
        """
        if key not in self.values:
            names = ", ".join(repr(name)[:40] for name in sorted(self.values)[:9])
            raise ValueError(
                f"{self.place}: no key {key!r} among [{names}]; name the key of the text with "
                "--json-key."
            )
        text = self.values[key]
        if not isinstance(text, str):
            raise ValueError(
                f"{self.place}: {key!r} is a {type(text).__name__}, but must be a string; "
                "fix the line or choose another --json-key."
            )
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"{self.place}: {key!r} holds half of a surrogate pair, which is no text; "
                "fix the line."
            )
        return text


class _RepeatedKeys(dict[str, Any]):
    """An object that has a key twice, of which JSON does not say which counts."""


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a file in order, one line in memory at a time.

    Raises:
        ValueError: the file cannot be read or is of another format, or, with file and line, a line
            is no JSON object, has a key twice, or is longer than 1 GiB.
    """
    with _opened(path) as (stream, stored):
        for number, text in _lines(stream, path):
            if text and not text.isspace():
                place = f"{path}:{number}"
                values = _parse(text, place)
                # Of a line of 200 MB not everything is kept twice.
                del text
                if not isinstance(values, dict):
                    remedy = _ARRAY if isinstance(values, list) else ""
                    raise ValueError(
                        f"{place}: a {type(values).__name__}, but each line must be a JSON object"
                        f"{remedy}."
                    )
                if isinstance(values, _RepeatedKeys):
                    raise ValueError(f"{place}: a key stands twice in the object; fix the line.")
                yield Row(number, place, stored.tell() if stored.seekable() else 0, values)
                # Nor are two such lines.
                del values


def read_object(path: Path) -> dict[str, Any]:
    """The one JSON object that a whole file is.

    Raises:
        ValueError: the file cannot be read, is of another format, or holds something else.
    """
    with _opened(path) as (stream, _):
        try:
            content = stream.read()
        except _UNREADABLE as error:
            raise ValueError(f"{path} cannot be read: {_reason(error)}.") from None
    values = _parse(_decoded(content, str(path)), str(path), "it must be one JSON object")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a {type(values).__name__}, but must be one JSON object.")
    return values


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed bytes of a file, and the file as it is stored."""
    try:
        stored = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {_reason(error)}; name a readable file."
        ) from None
    with stored:
        stream: Any = io.BufferedReader(stored, 2**16)
        try:
            head = stream.peek(512)[:512]
            for magic, decompressed in _COMPRESSED.items():
                if head.startswith(magic):
                    stream = decompressed(stream)
                    head = stream.peek(512)[:512]
                    break
        except _UNREADABLE as error:
            raise ValueError(
                f"{path} cannot be read: {_reason(error)}; make or download it again."
            ) from None
        kind = _foreign(head)
        if kind is not None:
            raise ValueError(f"{path} seems to be {kind[0]}, not lines of JSON; {kind[1]}.")
        yield stream, stored


def _foreign(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins with ``head`` and cannot be lines of JSON, and the remedy."""
    if any(head.startswith(magic) for magic in _COMPRESSED):
        return "compressed twice", "decompress it once"
    for magic, kind, remedy in _FOREIGN:
        if head.startswith(magic):
            return kind, remedy
    if _PICKLE.match(head):
        return "a pickle, which is never loaded here", "write its texts as lines of JSON"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it with tar -x"
    return None


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Lines and their numbers from 1."""
    number = 0
    while True:
        try:
            line = stream.readline(LONGEST_LINE)
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}:{number + 1}: cannot be read ({_reason(error)}); make or download the "
                "file again."
            ) from None
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{path}:{number + 1}: longer than 1 GiB; split the document.")
        # Only a CR needs the copy that splitting makes.
        parts = line.splitlines()[::-1] if b"\r" in line else [line]
        del line
        while parts:
            number += 1
            yield number, _decoded(parts.pop(), f"{path}:{number}")


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: {_not_utf_8(error)}") from None


def _not_utf_8(error: UnicodeDecodeError) -> str:
    """What the first byte that is no UTF-8 tells of the file."""
    byte = error.object[error.start]
    where = f"not valid UTF-8 (byte 0x{byte:02x}, number {error.start + 1} of the line"
    if b"\0" in error.object:
        return f"{where}), nor text at all; give a file of JSON lines."
    if byte == 0xED and error.object[error.start + 1 : error.start + 2] >= b"\xa0":
        return f"{where}, begins half of a surrogate pair); write the file again in UTF-8."
    if error.reason == "unexpected end of data":
        return f"{where}, begins a character that is cut off); make or download the file again."
    encoding = "Windows-1252" if 0x80 <= byte < 0xA0 else "Latin-1"
    character = bytes([byte]).decode("cp1252", "replace")
    return (
        f"{where}, {character!r} in {encoding}, which the file seems to be); convert it to UTF-8 "
        f"with iconv -f {encoding.upper().replace('LATIN-', 'LATIN')} -t UTF-8, or from the "
        "encoding that it has."
    )


def _parse(text: str, place: str, wanted: str = "each line must be one JSON object") -> Any:
    """The value of a JSON text, of which a message says what is ``wanted``.

    Raises:
        ValueError: there is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if "\0" in text:
            raise ValueError(
                f"{place}: holds a NUL byte, as a file that a crash cut off does; remove the line."
            ) from None
        remedy = _ARRAY if text[:99].lstrip().startswith("[") else ""
        raise ValueError(
            f"{place}: not valid JSON ({error.msg} at character {error.pos + 1}); {wanted}{remedy}."
        ) from None
    except RecursionError:
        raise ValueError(
            f"{place}: brackets are nested too deeply to be read; flatten or remove the line."
        ) from None
    except ValueError:
        raise ValueError(
            f"{place}: holds a number of more than 4300 digits; write it as a string."
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _RepeatedKeys(values)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
