"""Parquet and folders of shards are read as JSON lines are; what is wrong is one sentence."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.distributed import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

import corpus_files
from corpus_files import files_of, read_corpus

TEXTS = [f"Half of {2 * n} is {n}: naïve 数学" for n in range(200)]


def as_parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=70)
    return path


def as_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_parquet_gives_the_rows_of_json_lines_whatever_its_name(tmp_path: Path):
    path = as_parquet(tmp_path / "corpus.jsonl", text=TEXTS, id=list(range(200)))
    lines = as_lines(tmp_path / "lines", TEXTS)
    found = list(read_corpus(path, ["text"]))
    assert [row.values for row in found] == [row.values for row in read_corpus(lines, ["text"])]
    assert [(row.number, row.place) for row in found[:2]] == [(1, f"{path}:1"), (2, f"{path}:2")]
    positions = [row.position for row in found]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


def test_only_columns_that_are_wanted_are_read(tmp_path: Path):
    path = as_parquet(tmp_path / "a.parquet", text=["x"], spans=[[[0, 1]]], image=[b"\0" * 99])
    (row,) = read_corpus(path, ["text", "spans", "absent"])
    assert row.values == {"text": "x", "spans": [[0, 1]]}


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path):
    path = as_parquet(tmp_path / "a.parquet", body=["x"], id=[3])
    (row,) = read_corpus(path, ["text"])
    with pytest.raises(ValueError, match=r"a.parquet:1: no key 'text' among \['body', 'id'\]"):
        row.text("text")


@pytest.mark.parametrize("cut", [6, 700, -1])
def test_a_parquet_file_that_is_cut_off_is_one_sentence(tmp_path: Path, cut: int):
    path = as_parquet(tmp_path / "a.parquet", text=TEXTS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a.parquet:1 cannot be read \(.*\); make or download"):
        list(read_corpus(path, ["text"]))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = as_parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="for which pyarrow is missing; pip install pyarrow"):
        list(read_corpus(path, ["text"]))


def test_a_folder_is_its_shards_in_the_order_of_their_numbers(tmp_path: Path):
    names = (
        "part-10.jsonl",
        "part-2.jsonl.gz",
        "b/part-1.parquet",
        "_SUCCESS",
        ".a.crc",
        "note.md",
    )
    names += ("_temporary/part-3.jsonl",)
    for name in names:
        (tmp_path / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shards" / name).write_text("")
    single = tmp_path / "whatever"
    found, others = files_of([single, tmp_path / "shards"])
    inside = [path.relative_to(tmp_path / "shards") for path in found[1:]]
    assert found[0] == single
    assert list(map(str, inside)) == ["b/part-1.parquet", "part-2.jsonl.gz", "part-10.jsonl"]
    assert [path.name for path in others] == ["note.md"]


def test_a_folder_without_shards_is_one_sentence(tmp_path: Path):
    (tmp_path / "note.md").write_text("")
    with pytest.raises(ValueError, match=r"is a folder without files called \*\.jsonl"):
        files_of([tmp_path])


def test_shards_give_the_tokens_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import preprocess_data
    from tests.test_token_bytes import byte_level_bpe

    byte_level_bpe().save_pretrained(tmp_path / "tokenizer")
    shards = tmp_path / "shards"
    shards.mkdir()
    as_parquet(shards / "2.parquet", text=TEXTS[50:90])
    as_lines(shards / "10.jsonl", TEXTS[90:])
    with gzip.open(shards / "1.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[:50])
    (shards / "NOTICE.md").write_text("a licence")
    whole = as_lines(tmp_path / "whole.jsonl", TEXTS)
    for name, source in (("a", shards), ("b", whole)):
        preprocess_data.preprocess([source], str(tmp_path / name), str(tmp_path / "tokenizer"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert f"--input leaves out: {shards / 'NOTICE.md'}" in capsys.readouterr().err
    assert (shards / "2.parquet").read_bytes()[:4] == corpus_files.PARQUET
