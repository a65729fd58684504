"""Held-out documents of an evaluation: read, tokenized, and the positions in them drawn."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from document_tokens import DocumentTokenizer
from evaluation import NOT_COUNTED, Measured, Record
from json_lines import Row, read_rows


@dataclass(frozen=True)
class Text:
    """A document as the data has it.

    line: from 1. place: ``file:line``, for messages. problem: its first characters that do not
    count (--solution-only).
    """

    line: int
    place: str
    text: str
    problem: int


@dataclass(frozen=True)
class Document:
    """One line of the data.

    line: from 1. ids: all its tokens. first: the first token that counts (--solution-only).
    """

    line: int
    ids: list[int]
    first: int

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell documents (and tokenizers) apart."""
        return hashlib.sha256(np.array(self.ids, dtype=np.int64).tobytes()).hexdigest()[:16]


def read_texts(path: Path, json_key: str, solution_only: bool, limit: int | None) -> list[Text]:
    """The first ``limit`` documents.

    Raises:
        ValueError: the file cannot be read, a line is no such object, or there is no document.
    """
    try:
        rows = itertools.islice(read_rows(path), limit)
        texts = [_text(row, json_key, solution_only) for row in rows]
    except ValueError as error:
        raise ValueError(f"--data {error}") from None
    if not texts:
        raise ValueError(f"--data {path} holds no document; name a JSONL file with one per line.")
    return texts


def _text(row: Row, json_key: str, solution_only: bool) -> Text:
    text = row.text(json_key)
    problem = row.values.get("problem_chars")
    if solution_only and not isinstance(problem, int):
        raise ValueError(f"{row.place}: no number problem_chars, which --solution-only needs.")
    return Text(row.number, row.place, text, problem if solution_only else 0)


def tokenize(
    texts: Sequence[Text], tokenizer: DocumentTokenizer, bytes_of: Sequence[bytes]
) -> list[Document]:
    """Documents as preprocessing tokenizes them, without the end-of-document token.

    Raises:
        ValueError: a text spells out special tokens that ``tokenizer`` refuses, or not one of the
            texts has two tokens.
    """
    documents = []
    for text in texts:
        tokenizer.note_special_tokens(text.text, text.place)
        ids = [*itertools.chain.from_iterable(tokenizer.encode(text.text, text.place))]
        # In bytes, because a token may be part of a character.
        starts = np.cumsum([0, *(len(bytes_of[token]) for token in ids)])[:-1]
        first = int(np.searchsorted(starts, len(text.text[: text.problem].encode())))
        if len(ids) > 1:
            documents.append(Document(text.line, ids, first))
    if not documents:
        raise ValueError("--data holds no document of two or more tokens; pass longer texts.")
    return documents


def documents_of(
    earlier: Measured, path: Path, documents: Sequence[Document]
) -> list[tuple[Document, Record]]:
    """The documents of an earlier output, with what it says of them.

    Raises:
        ValueError: a document has changed, or the tokenizer has.
    """
    by_line = {document.line: document for document in documents}
    for record in earlier.records:
        document = by_line.get(record.line)
        if document is None or document.digest != record.id:
            raise ValueError(
                f"--data, line {record.line}, is not the document that {path} was measured on; "
                "pass the same --data (and a checkpoint with the same tokenizer)."
            )
    return [(by_line[record.line], record) for record in earlier.records]


def draw_positions(difficulty: str, count: int, seed: int, line: int) -> list[int]:
    """Up to ``count`` tokens above the lowest threshold, uniformly drawn, ascending.

    A pure function of its arguments, so independent of the other documents and of the layout.
    """
    above = [token for token, digit in enumerate(difficulty) if digit not in (NOT_COUNTED, "0")]
    generator = np.random.default_rng([seed, line])
    drawn = generator.choice(above, size=min(count, len(above)), replace=False)
    return sorted(map(int, drawn))
