"""tools/json_lines.py: what users bring is read right, or refused by file and line."""

import bz2
import codecs
import gzip
import json
import lzma
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import json_lines  # noqa: E402

GOOD = b'{"text": "x"}\n'
RICH = (
    '{"text": "caf\u00e9 \U0001f642 \u2028 \\u0000 \\ud83d\\ude42", "n": [NaN, 1e999]}\n'.encode()
)
RICH_TEXT = "caf\u00e9 \U0001f642 \u2028 \0 \U0001f642"


def written(tmp_path: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def read(path: Path) -> list[tuple[int, str]]:
    return [(row.number, row.text("text")) for row in json_lines.read_rows(path)]


def refused(path: Path) -> str:
    """The refusal, which is one sentence that begins with the file."""
    with pytest.raises(ValueError, match="data") as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(str(path))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_lines_are_numbered_whatever_ends_them(tmp_path: Path, end: bytes) -> None:
    content = end.join([GOOD.strip(), b"", b" \t", RICH.strip(), GOOD.strip()])
    expected = [(1, "x"), (4, RICH_TEXT), (5, "x")]
    assert read(written(tmp_path, content)) == expected
    assert read(written(tmp_path, content + end)) == expected
    assert refused(written(tmp_path, content + end + b'{"text"')).startswith(":6: not valid JSON")


def test_a_byte_order_mark_may_stand_before_any_line(tmp_path: Path) -> None:
    mark = codecs.BOM_UTF8
    assert read(written(tmp_path, mark + GOOD + mark + RICH)) == [(1, "x"), (2, RICH_TEXT)]
    assert read(written(tmp_path, mark)) == []


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, json_lines.zstd.compress]
)
def test_compressed_lines_are_read_whatever_the_name(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = written(tmp_path, pack(GOOD * 500) + pack(RICH))
    assert read(path) == [*((number, "x") for number in range(1, 501)), (501, RICH_TEXT)]
    # The last part is cut off, or is something else.
    start = len(pack(GOOD * 500))
    said = refused(written(tmp_path, path.read_bytes()[: start - 9]))
    assert said.startswith((":", " cannot be read"))
    assert "seems to be compressed twice" in refused(written(tmp_path, pack(pack(GOOD))))
    assert "UTF-16" in refused(written(tmp_path, pack(GOOD.decode().encode("utf-16"))))
    assert refused(written(tmp_path, pack(GOOD + b"{"))).startswith(":2: not valid JSON")


def test_progress_is_counted_in_bytes_of_the_stored_file(tmp_path: Path) -> None:
    for content in (GOOD * 9000, gzip.compress(GOOD * 9000)):
        path = written(tmp_path, content)
        positions = [row.position for row in json_lines.read_rows(path)]
        assert positions == sorted(positions)
        assert 0 < positions[0] <= positions[-1] == len(content)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(__file__, "member")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("member", GOOD)


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (GOOD.decode().encode("utf-16"), "UTF-16", "iconv -f UTF-16 -t UTF-8"),
        (GOOD.decode().encode("utf-16-le"), "UTF-16 (little-endian)", "iconv -f UTF-16LE"),
        (GOOD.decode().encode("utf-16-be"), "UTF-16 (big-endian)", "iconv -f UTF-16BE"),
        (codecs.BOM_UTF16_BE + GOOD.decode().encode("utf-16-be"), "UTF-16", "iconv -f UTF-16 "),
        (GOOD.decode().encode("utf-32"), "UTF-32", "iconv -f UTF-32 -t UTF-8"),
        (GOOD.decode().encode("utf-32-le"), "UTF-32 (little-endian)", "iconv -f UTF-32LE"),
        (GOOD.decode().encode("utf-32-be"), "UTF-32 (big-endian)", "iconv -f UTF-32BE"),
        (b"\x04\x22\x4d\x18dG", "compressed by lz4", "lz4 -d"),
        (_zip, "a zip archive", "unzip"),
        (_tar, "a tar archive", "tar -x"),
        (b"PAR1\x15\x04", "a Parquet file", "to_json(orient='records', lines=True)"),
        (b"ARROW1\0\0", "an Arrow file", "to_json"),
        (b"\xff\xff\xff\xff\x10\0", "an Arrow stream", "to_json"),
        (pickle.dumps({"text": "x"}), "a pickle", "as lines of JSON"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "a NumPy array", "lines of JSON"),
        (b"MMIDIDX\0\0", "Megatron's index of tokens", "the text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs", "git lfs pull"),
        (b"<!DOCTYPE html>\n<p>Not found", "a page of HTML", "download the file itself"),
    ],
)
def test_other_formats_are_named_by_their_first_bytes(
    tmp_path: Path, content: bytes | Callable[[Path], None], kind: str, remedy: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    message = refused(path)
    assert message.startswith(" seems to be ")
    assert kind in message
    assert remedy in message


def test_zstd_is_named_where_python_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(json_lines._COMPRESSED, json_lines.ZSTD)
    message = refused(written(tmp_path, json_lines.zstd.compress(GOOD)))
    assert "seems to be compressed by zstd" in message
    assert "pip install backports.zstd" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"text": "café au lait"}'.encode("latin-1"),
            "byte 0xe9, number 14 of the line, 'é' in Lat",
        ),
        ('{"text": "“so”"}'.encode("cp1252"), "'“' in Windows-1252"),
        (b'{"text": "\xed\xa0\xbd"}', "begins half of a surrogate pair"),
        (b'{"text": "caf\xc3', "begins a character that is cut off"),
        (b'{"text": "\xff\0\xfe"}', "nor text at all"),
    ],
)
@pytest.mark.parametrize("before", [0, 899])
def test_the_first_byte_that_is_no_utf_8_is_named_on_its_line(
    tmp_path: Path, line: bytes, said: str, before: int
) -> None:
    message = refused(written(tmp_path, RICH * before + line))
    assert message.startswith(f":{before + 1}: not valid UTF-8 (byte 0x")
    assert said in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "x"', "not valid JSON (Expecting ',' delimiter at character 14)"),
        (b'{"text": "x"} {"text": "y"}', "not valid JSON (Extra data at character 15)"),
        (b'{"text": "a\tb"}', "not valid JSON (Invalid control character"),
        (b"\0\0\0\0", "holds a NUL byte"),
        (b'{"text": "x\0"}', "holds a NUL byte"),
        (b'{"meta": ' + b"[" * 100_000, "brackets are nested too deeply"),
        (b'{"text": "x", "id": ' + b"1" * 5000 + b"}", "holds a number of more than 4300 digits"),
        (b'["text"]', "a list, but each line must be a JSON object; write an array as lines with"),
        (b'[{"text": "x"},', "each line must be one JSON object; write an array as lines with jq"),
        (b"3", "a int, but each line must be a JSON object."),
        (b'{"text": "x", "text": "y"}', "a key stands twice"),
        (b'{"body": "x", "id": 3}', "no key 'text' among ['body', 'id']; name the key"),
        (b'{"\\ud83d": 3}', r"no key 'text' among ['\ud83d']"),
        (b'{"text": 3}', "'text' is a int, but must be a string"),
        (b'{"text": null}', "'text' is a NoneType"),
        (b'{"text": ["x"]}', "'text' is a list"),
        (b'{"text": "half \\ud83d of a pair"}', "'text' holds half of a surrogate pair"),
        (b'{"text": "\\ude42\\ud83d"}', "'text' holds half of a surrogate pair"),
    ],
)
def test_what_is_no_document_is_named_with_its_line(tmp_path: Path, line: bytes, said: str) -> None:
    message = refused(written(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD))
    assert message.startswith(":3: ")
    assert said in message


def test_keys_may_repeat_where_they_do_not_matter(tmp_path: Path) -> None:
    line = b'{"text": "x", "meta": {"a": 1, "a": 2}, "half": "\\ud83d"}'
    assert read(written(tmp_path, line)) == [(1, "x")]


def test_a_line_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 100)
    long = json.dumps({"text": "y" * 99}).encode()
    assert refused(written(tmp_path, GOOD + long)).startswith(":2: longer than 1 GiB; split")
    assert read(written(tmp_path, GOOD * 40)) == [(number, "x") for number in range(1, 41)]


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "data").startswith(" cannot be read: No such file")
    (tmp_path / "data").mkdir()
    assert refused(tmp_path / "data").startswith(" cannot be read: Is a directory")


def test_a_whole_file_is_one_object_or_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": [1, {"b": "é"}]}, indent=2)
    for content in (text.encode(), codecs.BOM_UTF8 + text.encode(), gzip.compress(text.encode())):
        assert json_lines.read_object(written(tmp_path, content)) == json.loads(text)
    for content, said in (
        (b"[]", "a list, but must be one JSON object"),
        (b'{"a":', "not valid JSON (Expecting value at character 6); it must be one JSON object"),
        (b'{"a": "\xe9"}', "Latin-1"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (text.encode("utf-16"), "UTF-16"),
    ):
        with pytest.raises(ValueError, match="data") as caught:
            json_lines.read_object(written(tmp_path, content))
        assert said in str(caught.value)
