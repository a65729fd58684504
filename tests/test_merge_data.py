"""tools/merge_data.py: parts give the files of the whole; what does not fit is one sentence."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import REPOSITORY
from tests.test_corpus_files import TEXTS, as_lines
from tests.test_token_bytes import byte_level_bpe

sys.path.insert(0, str(REPOSITORY / "tools"))

import merge_data
import preprocess_data


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    byte_level_bpe().save_pretrained(folder / "tokenizer")
    for name, texts in (("a", TEXTS[:70]), ("b", TEXTS[70:]), ("whole", TEXTS)):
        lines = as_lines(folder / f"{name}.jsonl", texts)
        preprocess_data.preprocess([lines], str(folder / name), str(folder / "tokenizer"))
    return folder


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


def test_merged_parts_are_the_whole(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prefix = str(tmp_path / "new" / "all")
    merge_data.main(["--input", str(parts / "a"), str(parts / "b"), "--output-prefix", prefix])
    assert contents(tmp_path / "new" / "all") == contents(parts / "whole")
    assert capsys.readouterr().out.startswith("200 documents, ")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["all.bin", "all.idx"]


def test_inputs_that_do_not_fit_leave_nothing(parts: Path, tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    wide = IndexedDatasetBuilder(str(tmp_path / "wide.bin"), dtype=np.int32)
    wide.add_document(np.array([1, 2]), [2])
    wide.finalize(str(tmp_path / "wide.idx"))
    (tmp_path / "cut.idx").write_bytes((parts / "a.idx").read_bytes())
    (tmp_path / "cut.bin").write_bytes((parts / "a.bin").read_bytes()[:-2])

    def refused(*inputs: str | Path, output: str | Path = tmp_path / "out") -> str:
        words = ["--input", *map(str, inputs), "--output-prefix", str(output)]
        with pytest.raises(SystemExit) as error:
            merge_data.main(words)
        return str(error.value)

    before = contents(parts / "b")
    assert "there is no" in refused(parts / "a", tmp_path / "absent")
    assert "as int32, but" in refused(parts / "a", tmp_path / "wide")
    assert "cut off" in refused(parts / "a", tmp_path / "cut")
    assert "choose another prefix" in refused(parts / "a", output=parts / "b")
    assert "is an --input" in refused(parts / "a", output=parts / "a")
    assert not list(tmp_path.glob("out*"))
    assert contents(parts / "b") == before
