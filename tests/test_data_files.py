"""Damaged files, files of another vocabulary and splits without a document, by every data flag."""

import json
import os
import re
import struct
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_rmt.job import data_files
from megatron_rmt.job.data_files import (
    TokenFile,
    data_problems,
    empty_split,
    foreign_token_of_a_batch,
    token_files,
)

pytestmark = pytest.mark.faults

VOCABULARY = 258
FLAGS = (
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
    "--per-split-data-args-path with lists",
)


def _write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def _args(**given: str | list[str] | None) -> Namespace:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    names += ("data_args_path", "per_split_data_args_path")
    return Namespace(**dict.fromkeys(names) | {"split": None} | given)


def _named_by(flag: str, words: list[str], folder: Path) -> Namespace:
    """The arguments of a job whose ``flag`` names ``words``."""
    flag, *how = flag.split(" ", 1)
    value: str | list[str] = words
    if flag.endswith("args-path"):
        value = str(folder / "words")
        text = " ".join(words)
        if "split" in flag:
            text = json.dumps({"train": words if how else text, "valid": None, "test": None})
        Path(value).write_text(text, encoding="utf-8")
    return _args(**{flag[2:].replace("-", "_"): value})


def _problem(prefix: str) -> str:
    (problem,) = data_problems(_args(data_path=[prefix]), VOCABULARY)
    assert "\n" not in problem
    return problem


@pytest.mark.parametrize("flag", FLAGS)
def test_a_foreign_token_is_found_whichever_flag_names_the_corpus(flag: str, tmp_path: Path):
    good = _write(tmp_path / "good", [[1, 257, 2]])
    foreign = _write(tmp_path / "foreign", [[1, 2, 3], [], [4, 5, 1000, 6], [258]])
    assert [*data_problems(_named_by(flag, ["0.5", good], tmp_path), VOCABULARY)] == []
    args = _named_by(flag, ["0.5", good, "0.5", foreign], tmp_path)
    (problem,) = data_problems(args, VOCABULARY)
    assert problem.startswith(flag.split()[0])
    assert (
        f"{foreign}, document 2 (from 0), holds token 1000 but --tokenizer-model has 258 tokens; "
        "tokenize the corpus with the model's tokenizer."
    ) in problem


@pytest.mark.parametrize("flag", FLAGS)
def test_a_missing_file_is_named_whichever_flag_names_it(flag: str, tmp_path: Path):
    args = _named_by(flag, [str(tmp_path / "nowhere/train")], tmp_path)
    (problem,) = data_problems(args, VOCABULARY)
    assert problem.startswith(flag.split()[0])
    assert "nowhere/train.idx; pass the prefix of a .bin and .idx file." in problem


@pytest.mark.parametrize("weight", ["nan", "inf", "-0.5", "1e999"])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_weight_that_is_none_is_refused(flag: str, weight: str, tmp_path: Path):
    good = _write(tmp_path / "good", [[1, 257, 2]])
    args = _named_by(flag, ["0.5", good, weight, good], tmp_path)
    (problem,) = data_problems(args, VOCABULARY)
    assert problem.startswith(flag.split()[0])
    assert problem.endswith(f"gives a corpus the weight {weight}; pass a finite number, 0 or more.")


def test_half_a_pair_is_refused_and_what_is_something_else_is_not(tmp_path: Path):
    prefix = _write(tmp_path / "train", [[1, 2]])
    for gone, kept in (("idx", "bin"), ("bin", "idx")):
        (tmp_path / f"train.{gone}").rename(tmp_path / "aside")
        assert f"{prefix}, but {prefix}.{gone} is missing; tokenize the corpus" in _problem(prefix)
        (tmp_path / "aside").rename(tmp_path / f"train.{gone}")
        assert (tmp_path / f"train.{kept}").exists()
    # A job's own data set may be one file, whatever its name.
    (tmp_path / "corpus[1]").touch()
    assert [*data_problems(_args(data_path=[str(tmp_path / "corpus[1]")]), VOCABULARY)] == []


def test_every_flag_of_megatrons_is_read_as_megatron_reads_it(tmp_path: Path):
    for flag in FLAGS:
        args = _named_by(flag, ["30", "a/b", "70", "c"], tmp_path)
        blend, of_splits = get_blend_and_blend_per_split(args)
        prefixes = [own[0] for own in [blend, *(of_splits or ())] if own is not None]
        assert [file.prefix for file in token_files(args)] == prefixes[0] == ["a/b", "c"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[", "does not name the words of each split; pass JSON like"),
        (b"[1, 2]", "does not name the words of each split; pass JSON like"),
        (b'{"train": "1 data"}', "does not name the words of each split; pass JSON like"),
        (b'{"train": 5, "valid": null, "test": null}', "does not name the words of each split"),
        (b"[" * 100_000, "does not name the words of each split; pass JSON like"),
        (b"\xff", "cannot be read (it is not UTF-8); pass a text file."),
        (None, "cannot be read (No such file or directory); pass a text file."),
        (os.mkfifo, "cannot be read (it is a pipe or a device, not a file); pass a text file."),
    ],
)
def test_a_file_of_words_that_cannot_be_read_is_named(
    content: bytes | Callable[[Path], None] | None, said: str, tmp_path: Path
):
    path = tmp_path / "words.json"
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    (problem,) = data_problems(_args(per_split_data_args_path=str(path)), VOCABULARY)
    assert problem.startswith(f"--per-split-data-args-path {path}: ")
    assert said in problem


def _cut(ending: str, keep: float) -> Callable[[str], None]:
    def damage(prefix: str) -> None:
        path = Path(f"{prefix}.{ending}")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return damage


def _type(code: int) -> Callable[[str], None]:
    def damage(prefix: str) -> None:
        path = Path(f"{prefix}.idx")
        content = bytearray(path.read_bytes())
        content[17] = code
        path.write_bytes(content)

    return damage


def _other_index(prefix: str) -> None:
    other = _write(Path(f"{prefix}-other"), [[1, 2], [3]])
    Path(f"{other}.idx").replace(f"{prefix}.idx")


def _text(prefix: str) -> None:
    Path(f"{prefix}.idx").write_text("id\ttext\n" * 20, encoding="utf-8")


def _longer(prefix: str) -> None:
    with Path(f"{prefix}.bin").open("ab") as file:
        file.write(struct.pack("<H", 7))


def _index(sizes: list[int], firsts: list[int], documents: list[int]) -> Callable[[str], None]:
    """Writes an index of uint16 with these lengths of sequences, first bytes and documents."""

    def write(prefix: str) -> None:
        head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(documents))
        body = struct.pack(f"<{len(sizes)}i{len(firsts)}q", *sizes, *firsts)
        Path(f"{prefix}.idx").write_bytes(
            head + body + struct.pack(f"<{len(documents)}q", *documents)
        )
        Path(f"{prefix}.bin").write_bytes(bytes(14))

    return write


def _longer_index(prefix: str) -> None:
    with Path(f"{prefix}.idx").open("ab") as file:
        file.write(bytes(7))


def _swapped(prefix: str) -> None:
    """The index as a machine of the other byte order would write it."""
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", content)
    sizes = struct.unpack_from(f"<{sequences}i{sequences}q{documents}q", content, 34)
    path.write_bytes(
        struct.pack(">9sQBQQ", magic, version, code, sequences, documents)
        + struct.pack(f">{sequences}i{sequences}q{documents}q", *sizes)
    )


# Code 1 is uint8, 4 int32, 7 float32.
DAMAGES = {
    "tokens cut": (_cut("bin", 0.5), "they are cut off, or not of one corpus"),
    "tokens gone": (_cut("bin", 0), "holds no document"),
    "tokens added": (_longer, "they are cut off, or not of one corpus"),
    "index cut": (_cut("idx", 0.6), "is damaged: it has"),
    "index cut in its header": (_cut("idx", 0.2), "is no index of token files"),
    "index lengthened": (_longer_index, "is damaged: it has"),
    "no sequence": (_index([], [], [0]), "holds no document"),
    "no end of a document": (_index([3, 4], [0, 6], []), "they are cut off, or not of one corpus"),
    "another end": (_index([3, 4], [0, 6], [0, 1, 3]), "they are cut off, or not of one corpus"),
    "negative length": (
        _index([4, -1, 4], [0, 8, 6], [0, 1, 2, 3]),
        "they are cut off, or not of one corpus",
    ),
    "index gone": (_cut("idx", 0), "is no index of token files"),
    "another file": (_text, "is no index of token files"),
    "another byte order": (_swapped, "is damaged (version 72057594037927936, number 8 for the"),
    "another corpus": (_other_index, "they are cut off, or not of one corpus"),
    "int32 for uint16": (_type(4), "they are cut off, or not of one corpus"),
    "uint8 for uint16": (_type(1), "they are cut off, or not of one corpus"),
    "numbers with a fraction": (_type(7), "is damaged (version 1, number 7 for the type of"),
    "no type": (_type(99), "is damaged (version 1, number 99 for the type of tokens)"),
}


@pytest.mark.parametrize("last", [[4, 5, 6], []], ids=["text", "an empty document"])
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_found_by_their_sizes(case: str, last: list[int], tmp_path: Path):
    prefix = _write(tmp_path / "train", [[1, 2, 3], [7], last])
    assert [*data_problems(_args(data_path=[prefix]), VOCABULARY)] == []
    damage, said = DAMAGES[case]
    damage(prefix)
    problem = _problem(prefix)
    assert problem.startswith(f"--data-path {prefix}: ")
    assert said in problem
    assert problem.endswith("; tokenize the corpus again.")


def test_an_index_may_hold_a_modality_for_each_sequence(tmp_path: Path):
    prefix = _write(tmp_path / "train", [[1, 2, 3], [7]])
    with Path(f"{prefix}.idx").open("ab") as file:
        file.write(bytes(2))
    assert [*data_problems(_args(data_path=[prefix]), VOCABULARY)] == []


def test_a_corpus_without_a_document_is_refused(tmp_path: Path):
    assert "holds no document; tokenize the corpus again." in _problem(_write(tmp_path / "a", []))
    assert "holds no document; tokenize" in _problem(_write(tmp_path / "b", [[], []]))


def test_tokens_of_every_integer_type_are_compared_with_the_vocabulary(tmp_path: Path):
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        prefix = _write(tmp_path / dtype.__name__, [[1, 2], [3, 200]], dtype)
        assert [*data_problems(_args(data_path=[prefix]), 201)] == []
        (problem,) = data_problems(_args(data_path=[prefix]), 200)
        assert "document 1 (from 0), holds token 200 but" in problem
        if dtype in (np.int32, np.int64):
            below = _write(tmp_path / f"below {dtype.__name__}", [[1, -1]], dtype)
            (problem,) = data_problems(_args(data_path=[below]), 200)
            assert "document 0 (from 0), holds token -1 but" in problem
        # Larger than the type can say.
        assert [*data_problems(_args(data_path=[prefix]), 2**40)] == []


def test_tokens_are_sampled_in_all_parts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As of corpora that were joined, one of them of another tokenizer."""
    monkeypatch.setattr(data_files, "SAMPLED_TOKENS", 160)
    for part in range(20):
        documents = [[1] * 100 if number // 20 != part else [300] * 100 for number in range(400)]
        prefix = _write(tmp_path / str(part), documents)
        problem = _problem(prefix)
        number = int(re.search(r"document (\d+) \(from 0\)", problem)[1])
        assert 20 * part <= number < 20 * part + 20
        assert "holds token 300 but" in problem


def test_a_token_outside_the_sample_is_found_when_a_batch_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_files, "SAMPLED_TOKENS", 160)
    first = _write(tmp_path / "first", [[1] * 1000])
    prefix = _write(tmp_path / "train", [[1] * 9990, [2] * 15, [3, 300], [4] * 9000])
    args = _args(train_data_path=[first, prefix])
    assert [*data_problems(args, VOCABULARY)] == []
    assert foreign_token_of_a_batch(args, 300, VOCABULARY) == (
        f"--train-data-path {prefix}, document 2 (from 0), holds token 300 but --tokenizer-model "
        "has 258 tokens; tokenize the corpus with the model's tokenizer."
    )
    # A job with data of its own, or a token that is too far behind to be looked for.
    bare = (
        "a sample holds token 300 but --tokenizer-model has 258 tokens; make the samples with the "
        "model's tokenizer."
    )
    assert foreign_token_of_a_batch(_args(), 300, VOCABULARY) == bare
    for searched in (900, 1000 + 9000, 1000 + 10_000):
        monkeypatch.setattr(data_files, "SEARCHED_TOKENS", searched)
        assert foreign_token_of_a_batch(args, 300, VOCABULARY) == bare


def _builder(args: Namespace, kind: type = GPTDataset) -> BlendedMegatronDatasetBuilder:
    """Megatron's builder of the data sets of ``args``."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        tokenizer=Namespace(eod=0, vocab_size=None),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(kind, [4, 2, 2], lambda: True, config)


@pytest.mark.parametrize(
    ("split", "documents", "empty"),
    [
        ("100,0,0", 1, None),
        ("969,30,1", 200, "test"),
        # Half of a thousandth: 0.5 is rounded to the even number.
        ("969,30,1", 500, "test"),
        ("969,30,1", 501, None),
        ("969,30,1", 16, "valid"),
        ("969,30,1", 17, "test"),
        ("98,1,1", 3, "valid"),
        ("1,99,0", 3, "train"),
        ("90,10,0", 3, "valid"),
        ("90,10,0", 6, None),
        ("50,50", 2, None),
    ],
)
def test_a_split_without_a_document_is_refused_as_megatron_splits(
    split: str, documents: int, empty: str | None, tmp_path: Path
):
    prefix = _write(tmp_path / "train", [[1, 2, 3]] * documents)
    args = _args(data_path=[prefix], split=split)
    problem = empty_split(args, _builder(args))
    if empty is None:
        assert problem is None
        return
    assert problem == (
        f"--data-path {prefix}: --split {split} gives the {empty} split 0 of its {documents} "
        "documents, with no token, and Megatron would look for one for ever; pass shares that come "
        "to a document each, or 0 for a split that is not needed (--split 100,0,0)."
    )


def test_each_file_of_a_blend_and_each_split_of_its_own_is_looked_at(tmp_path: Path):
    many, few = (_write(tmp_path / n, [[1, 2, 3]] * c) for n, c in (("many", 600), ("few", 3)))
    bare = _write(tmp_path / "bare", [[1, 2, 3]] * 20 + [[]] * 20)
    void = _write(tmp_path / "void", [[], []])
    args = _args(data_path=["0.5", many, "0.5", few], split="969,30,1")
    assert f"{few}: --split" in empty_split(args, _builder(args))
    args = _args(data_path=[bare], split="50,50,0")
    assert "the valid split 20 of its 40 documents, with no token" in empty_split(
        args, _builder(args)
    )
    args = _args(train_data_path=[many], valid_data_path=[few], test_data_path=None)
    assert empty_split(args, _builder(args)) is None
    args = _args(train_data_path=[many], valid_data_path=[void], test_data_path=[few])
    assert empty_split(args, _builder(args)) == (
        f"--valid-data-path {void} holds no token; leave it out, or tokenize documents that have "
        "text."
    )
    assert get_blend_from_list(["a"]) == (["a"], None)


def test_data_sets_of_another_kind_are_not_split_by_megatrons_rule(tmp_path: Path):
    class Own(torch.utils.data.Dataset):
        pass

    prefix = _write(tmp_path / "train", [[1, 2, 3]])
    args = _args(data_path=[prefix], split="969,30,1")
    assert empty_split(args, _builder(args, Own)) is None
    assert empty_split(_args(), _builder(_args(split="1,1,1"))) is None


def test_a_file_says_which_flag_names_it():
    assert str(TokenFile("--data-path", "a/b")) == "--data-path a/b"
