"""The cache of how documents are cut into samples is used only if it is of these token files."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_rmt.job.index_cache import index_problem, whole_indices
from tests.tiny_run import RMT, TinyInputs, run

pytestmark = pytest.mark.faults

PARTS = ("document_index", "sample_index", "shuffle_index")


def _corpus(prefix: Path, lengths: list[int]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number, length in enumerate(lengths):
        builder.add_document(np.full(length, number), [length])
    builder.finalize(f"{prefix}.idx")


def _indices(prefix: Path, samples: int = 30, split: Split = Split.train) -> list[np.ndarray]:
    """What ``GPTDataset`` would train on."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([str(prefix)], None),
        split="90,10,0",
        tokenizer=Namespace(eod=0, vocab_size=None, unique_identifiers={"class": "tiny"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    low = IndexedDataset(str(prefix), mmap=True)
    count = len(low) * 9 // 10
    own = np.arange(count) if split is Split.train else np.arange(count, len(low))
    original = getattr(
        GPTDataset._build_document_sample_shuffle_indices,
        "megatron_rmt_original",
        GPTDataset._build_document_sample_shuffle_indices,
    )
    kind = type("GPTDataset", (GPTDataset,), {})
    kind._build_document_sample_shuffle_indices = lambda self: whole_indices(original, self)
    found = kind(low, str(prefix), own.astype(np.int32), samples, split, config)
    return [np.array(getattr(found, name)) for name in PARTS]


DOCUMENTS = np.arange(4)
SAMPLES = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
ORDER = np.array([2, 0, 1])
WRONG = {
    "a table of documents": (DOCUMENTS[None], SAMPLES, ORDER, "the shapes are wrong"),
    "three columns": (DOCUMENTS, SAMPLES[:, [0, 1, 1]], ORDER, "the shapes are wrong"),
    "no document": (DOCUMENTS[:0], SAMPLES, ORDER, "it orders 0 documents, and there are 4"),
    "half an epoch": (np.arange(6) % 4, SAMPLES, ORDER, "it orders 6 documents, and there are 4"),
    "too high": (DOCUMENTS + 1, SAMPLES, ORDER, "it reads document 4, and there are 4"),
    "negative": (DOCUMENTS - 5, SAMPLES, ORDER, "it reads document 5, and there are 4"),
    "behind the end": (
        DOCUMENTS,
        np.add(SAMPLES, [4, 0]),
        ORDER,
        "it begins samples outside of the doc",
    ),
    "before the start": (DOCUMENTS, SAMPLES - [1, 0], ORDER, "it begins samples outside of the d"),
    "too short": (
        DOCUMENTS,
        np.add(SAMPLES, [[0], [1], [0], [0]] * np.array([0, 1])),
        ORDER,
        "it cuts samples",
    ),
    "order too high": (DOCUMENTS, SAMPLES, ORDER + 1, "it orders samples that there are none of"),
    "order negative": (DOCUMENTS, SAMPLES, ORDER - 1, "it orders samples that there are none of"),
    "twice": (DOCUMENTS, SAMPLES, np.array([2, 2, 1]), "it trains a sample twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_of_these_token_files_is_told(case: str):
    dataset = Namespace(
        indices=DOCUMENTS,
        dataset=Namespace(sequence_lengths=np.full(4, 8)),
        config=Namespace(sequence_length=8),
    )
    assert index_problem(dataset, DOCUMENTS, SAMPLES, ORDER) is None
    *indices, said = WRONG[case]
    assert index_problem(dataset, *indices).startswith(said)


LENGTHS = [3, 20, 1, 7, 15, 9, 30, 2, 11, 5] * 2


@pytest.mark.parametrize("samples", [3, 30, 80])
@pytest.mark.parametrize("split", [Split.train, Split.valid])
def test_a_cache_that_is_right_is_kept(
    split: Split, samples: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    _corpus(tmp_path / "c", LENGTHS)
    first = _indices(tmp_path / "c", samples, split)
    made = {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}
    assert len(made) == 3
    for one, other in zip(first, _indices(tmp_path / "c", samples, split), strict=True):
        assert np.array_equal(one, other)
    assert made == {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}
    assert "RMT" not in capfd.readouterr().err


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(byte: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "spoil",
    [_cut, lambda path: path.write_bytes(b""), *(functools.partial(_flip, at) for at in (0, 129))],
    ids=["cut", "empty", "flipped header", "flipped entry"],
)
def test_a_damaged_cache_is_built_anew(
    spoil: Callable[[Path], object],
    part: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    _corpus(tmp_path / "c", LENGTHS)
    right = _indices(tmp_path / "c")
    (path,) = tmp_path.rglob(f"*{part}.npy")
    spoil(path)
    for one, other in zip(right, _indices(tmp_path / "c"), strict=True):
        assert np.array_equal(one, other)
    said = capfd.readouterr().err
    assert f"RMT: the cache of --data-path {tmp_path / 'c'} in {path.parent} is not of" in said
    assert said.endswith("; it is built anew.\n")
    _indices(tmp_path / "c")
    assert "RMT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "lengths",
    [LENGTHS[:-2], [*LENGTHS, 4, 4], [*LENGTHS[:3], 8, *LENGTHS[4:]], [5] * len(LENGTHS)],
    ids=["fewer", "more", "one is longer", "all are others"],
)
def test_token_files_that_were_replaced_are_read_anew(lengths: list[int], tmp_path: Path):
    _corpus(tmp_path / "c", LENGTHS)
    _indices(tmp_path / "c")
    _corpus(tmp_path / "c", lengths)
    _corpus(tmp_path / "fresh", lengths)
    found, right = _indices(tmp_path / "c"), _indices(tmp_path / "fresh")
    assert all(np.array_equal(*pair) for pair in zip(found, right, strict=True))


def test_a_cache_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _corpus(tmp_path / "c", LENGTHS)
    _indices(tmp_path / "c")
    (path,) = tmp_path.rglob("*sample_index.npy")
    _cut(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(SystemExit, match=r"cannot be removed \(Permission denied\); delete \w{32}"):
        _indices(tmp_path / "c")


@pytest.mark.multiprocess
def test_two_ranks_train_on_though_the_cache_is_cut(inputs: TinyInputs, tmp_path: Path):
    flags = [*inputs.flags(), *RMT, "--data-cache-path", str(tmp_path), "--exit-interval", "1"]
    right = run(tmp_path / "right", 2, flags)
    (path,) = tmp_path.rglob("*-train-document_index.npy")
    _cut(path)
    found = run(tmp_path / "cut", 2, flags)
    assert found.metrics == right.metrics
    assert found.log.count("it is built anew") == 1
