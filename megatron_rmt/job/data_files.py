"""The token files that a job's data flags name: are they whole, and of the model's vocabulary?

A job may give the flags another meaning, so only what is certainly wrong is found here: a pair of
``.bin`` and ``.idx`` that do not belong together, a file that is not there, a token that the
model's tokenizer does not know. Nothing but sizes, the index and a sample of the tokens is read.
What a split of them holds is checked where Megatron builds its own data sets (``empty_split``).
"""

import json
import math
import struct
import zlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType
from megatron.core.datasets.utils import Split

from megatron_rmt.job.text_files import read_text_file

# Tokens of each file that are compared with the vocabulary before the run, in so many places, and
# the most of all files that are searched for a token which a batch turned out to hold.
SAMPLED_TOKENS = 1_000_000
PLACES = 16
SEARCHED_TOKENS = 1_000_000_000
_HEADER = struct.Struct(f"<{len(_INDEX_HEADER)}sQBQQ")
_MARKED_BYTES = 1 << 16
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class TokenFile:
    """A pair of files. flag: the data flag that names them, with its file if it reads one. prefix:
    of the two paths."""

    flag: str
    prefix: str

    @property
    def index(self) -> Path:
        return Path(f"{self.prefix}.idx")

    @property
    def tokens(self) -> Path:
        return Path(f"{self.prefix}.bin")

    def __str__(self) -> str:
        return f"{self.flag} {self.prefix}"


def token_files(args: Namespace) -> list[TokenFile]:
    """All files that ``--data-path``, its likes for each split, and files of their words name.

    Left out: weights of a blend, and what lies in object storage.

    Raises:
        ValueError: a file of such words cannot be read.
    """
    found = [own for own in _words(args) if _weight(own[1]) is None and "://" not in own[1]]
    return [TokenFile(*own) for own in dict.fromkeys(found)]


def _words(args: Namespace) -> list[tuple[str, str]]:
    """(flag, word) of all that the data flags say, weights of a blend among them.

    Raises:
        ValueError: see ``token_files``.
    """
    named = [
        (flag, word)
        for name in ("data_path", *(f"{split}_data_path" for split in _SPLITS))
        for flag in ["--" + name.replace("_", "-")]
        for word in getattr(args, name, None) or []
    ]
    if path := getattr(args, "data_args_path", None):
        flag = f"--data-args-path {path}:"
        named += [(flag, word) for word in _read(flag, path).split()]
    if path := getattr(args, "per_split_data_args_path", None):
        flag = f"--per-split-data-args-path {path}:"
        named += [(flag, word) for word in _words_of_splits(flag, _read(flag, path))]
    return named


def _read(flag: str, path: str) -> str:
    if "://" in path:
        return ""
    try:
        return read_text_file(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"{flag} cannot be read ({reason}); pass a text file.") from None


def _words_of_splits(flag: str, text: str) -> list[str]:
    remedy = 'pass JSON like {"train": "1 DATA", "valid": "1 DATA", "test": null}'
    if not text:
        return []
    try:
        content = json.loads(text)
        of_splits = [content[split] for split in _SPLITS]
        return [
            str(word)
            for own in of_splits
            for word in (own.split() if isinstance(own, str) else own or [])
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{flag} does not name the words of each split; {remedy}.") from None


def _weight(word: str) -> float | None:
    """The weight that a word is, in a blend; None for a path."""
    try:
        return float(word)
    except ValueError:
        return None


def data_problems(args: Namespace, vocabulary: int) -> Iterator[str]:
    """One sentence for each file that is missing, damaged or of another vocabulary, and for each
    weight of a blend that is none."""
    try:
        files, words = token_files(args), _words(args)
    except ValueError as error:
        yield str(error)
        return
    for flag, word in words:
        weight = _weight(word)
        if weight is not None and not 0 <= weight < math.inf:
            yield f"{flag} gives a corpus the weight {word}; pass a finite number, 0 or more."
    for file in files:
        path = Path(file.prefix)
        if file.index.is_file() and file.tokens.is_file():
            problem = damage(file)
            if problem is None:
                problem = foreign_token(file, vocabulary, SAMPLED_TOKENS, places=PLACES)
            if problem is not None:
                yield problem
        elif file.index.is_file() or file.tokens.is_file():
            missing = file.tokens if file.index.is_file() else file.index
            yield f"{file.flag} is {path}, but {missing} is missing; tokenize the corpus again."
        elif not path.exists() and not any(path.parent.glob(f"{path.name}*")):
            yield (
                f"{file.flag} is {path}, but there is no {file.index}; pass the prefix of a .bin "
                "and .idx file."
            )


def damage(file: TokenFile) -> str | None:
    """One sentence if the two files are not whole, or not a pair, by their sizes."""
    try:
        reason = _wrong_sizes(file)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    return reason and f"{file}: {reason}; tokenize the corpus again."


def _wrong_sizes(file: TokenFile) -> str | None:
    with file.index.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_INDEX_HEADER):
        return f"{file.index} is no index of token files"
    _, version, code, sequences, documents = _HEADER.unpack(head)
    integers = {kind.value: kind.name for kind in DType if not kind.name.startswith("float")}
    if version != 1 or code not in integers:
        return f"{file.index} is damaged (version {version}, number {code} for the type of tokens)"
    size = file.index.stat().st_size
    expected = _HEADER.size + sequences * 12 + documents * 8
    # A modality for each sequence may follow.
    if size not in (expected, expected + sequences):
        return (
            f"{file.index} is damaged: it has {size} bytes, but {sequences} sequences and "
            f"{documents} ends of documents take {expected}"
        )
    held = file.tokens.stat().st_size
    if sequences == 0 or held == 0:
        return f"{file.tokens} holds no document"
    index = Index.of(file)
    if index.bytes_of_tokens != held or not index.is_consistent():
        return (
            f"{file.tokens} has {held} bytes, but {file.index} speaks of {index.bytes_of_tokens} "
            f"({integers[code]}): they are cut off, or not of one corpus"
        )
    return None


@dataclass(frozen=True)
class Index:
    """What an ``.idx`` file says, mapped. dtype: of the tokens. lengths: int32 ``[sequences]``.
    pointers: int64 ``[sequences]``, first bytes. documents: int64 ``[documents + 1]``, first
    sequences."""

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, file: TokenFile) -> "Index":
        """The index of files whose sizes are right."""
        content = np.memmap(file.index, mode="r")
        _, _, code, sequences, documents = _HEADER.unpack(bytes(content[: _HEADER.size]))
        first, second = _HEADER.size + sequences * 4, _HEADER.size + sequences * 12
        return cls(
            dtype=np.dtype(DType.dtype_from_code(code)),
            lengths=np.frombuffer(content, np.int32, sequences, _HEADER.size),
            pointers=np.frombuffer(content, np.int64, sequences, first),
            documents=np.frombuffer(content, np.int64, documents, second),
        )

    @property
    def bytes_of_tokens(self) -> int:
        """How large the ``.bin`` file is."""
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize

    def is_consistent(self) -> bool:
        """Whether the first sequences follow each other, and the documents end with the last."""
        lengths = self.lengths[:SAMPLED_TOKENS].astype(np.int64)
        steps = np.diff(self.pointers[:SAMPLED_TOKENS])
        return bool(
            (lengths >= 0).all()
            and (steps == lengths[: len(steps)] * self.dtype.itemsize).all()
            and len(self.documents) > 0
            and self.documents[-1] == len(self.lengths)
        )

    def document_of(self, token: int) -> int:
        """Number of the document in which the ``token`` th token of the file stands, from 0."""
        sequence = np.searchsorted(self.pointers, token * self.dtype.itemsize, side="right") - 1
        return int(np.searchsorted(self.documents, sequence, side="right")) - 1


def foreign_token(file: TokenFile, vocabulary: int, most: int, *, places: int = 1) -> str | None:
    """One sentence if one of ``most`` tokens, evenly from ``places`` of the file, is none of the
    vocabulary."""
    index = Index.of(file)
    content = np.memmap(file.tokens, mode="r", dtype=index.dtype)
    size = -(-min(most, len(content)) // places)
    for place in range(places):
        start = (len(content) - size) * place // max(1, places - 1)
        for first in range(start, start + size, SAMPLED_TOKENS):
            part = content[first : min(first + SAMPLED_TOKENS, start + size)]
            foreign = np.flatnonzero((part < 0) | (part >= vocabulary))
            if len(foreign):
                document = index.document_of(first + int(foreign[0]))
                return (
                    f"{file}, document {document} (from 0), holds token {part[foreign[0]]} but "
                    f"--tokenizer-model has {vocabulary} tokens; tokenize the corpus with the "
                    "model's tokenizer."
                )
    return None


def marks_of_data(args: Namespace) -> dict[str, str]:
    """A short text for each pair of token files, by prefix, which another corpus would not have: of
    its sizes, the beginning of the index, and both ends of the tokens.

    Raises:
        ValueError: a file of the data flags' words cannot be read.
    """
    files = [file for file in token_files(args) if file.index.is_file() and file.tokens.is_file()]
    return {file.prefix: f"{_mark(file.index)}-{_mark(file.tokens)}" for file in files}


def _mark(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        crc = zlib.crc32(stream.read(_MARKED_BYTES))
        stream.seek(max(0, size - _MARKED_BYTES))
        crc = zlib.crc32(stream.read(), crc)
    return f"{size:x}.{crc:08x}"


def foreign_token_of_a_batch(args: Namespace, token: int, vocabulary: int) -> str:
    """One sentence on a ``token`` that a batch holds, with file and document if they are found."""
    left = SEARCHED_TOKENS
    for file in token_files(args):
        if file.index.is_file() and file.tokens.is_file():
            found = foreign_token(file, vocabulary, left)
            if found is not None:
                return found
            left -= file.tokens.stat().st_size // Index.of(file).dtype.itemsize
    return (
        f"a sample holds token {token} but --tokenizer-model has {vocabulary} tokens; make the "
        "samples with the model's tokenizer."
    )


def empty_split(args: Namespace, builder: BlendedMegatronDatasetBuilder) -> str | None:
    """One sentence if a split that ``builder`` is to build holds no token.

    ``GPTDataset`` counts epochs until a split has enough tokens, if only the one that it asks for
    where none is wanted, so of an empty one it would count for ever.
    """
    config = builder.config
    if config.mock or not (isinstance(builder.cls, type) and issubclass(builder.cls, GPTDataset)):
        return None
    known = {file.prefix: file for file in token_files(args)}
    for split in Split:
        if config.blend is not None:
            (prefixes, _), share = config.blend, config.split_matrix[split.value]
        else:
            prefixes, _ = config.blend_per_split[split.value] or ((), None)
            share = (0.0, 1.0)
        for prefix in prefixes if share is not None else ():
            file = known.get(prefix, TokenFile("the data set", prefix))
            if not file.index.is_file():
                continue
            lengths = Index.of(file).lengths
            first, limit = (round(bound * float(len(lengths))) for bound in share)
            if lengths[first:limit].any():
                continue
            if config.blend is None:
                return f"{file} holds no token; leave it out, or tokenize documents that have text."
            return (
                f"{file}: --split {config.split} gives the {split.name} split {limit - first} of "
                f"its {len(lengths)} documents, with no token, and Megatron would look for one for "
                "ever; pass shares that come to a document each, or 0 for a split that is not "
                "needed (--split 100,0,0)."
            )
    return None
