"""Held-out documents of an evaluation: read, tokenized, and the positions in them drawn."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from corpus_files import read_corpus
from document_tokens import DocumentTokenizer
from evaluation import Measured, Record
from json_lines import Row
from megatron_rmt.prompt.answer_spans import answers_by_token, check_spans


@dataclass(frozen=True)
class Text:
    """A document as the data has it.

    line: from 1. place: ``file:line``, for messages. problem: its first characters that do not
    count (--solution-only). spans: [first, limit) characters of its answers (--positions answers).
    file: the name of the file.
    """

    line: int
    place: str
    text: str
    problem: int
    spans: tuple[tuple[int, int], ...] = ()
    file: str = ""


@dataclass(frozen=True)
class Document:
    """One line of the data.

    line: from 1. ids: all its tokens. first: the first token that counts (--solution-only).
    answers: what its answers say, by the token that begins each, ascending. file: the name of the
    file.
    """

    line: int
    ids: list[int]
    first: int
    answers: Mapping[int, bytes] = field(default_factory=dict)
    file: str = ""

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell documents (and tokenizers) apart."""
        return hashlib.sha256(np.array(self.ids, dtype=np.int64).tobytes()).hexdigest()[:16]


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """The files of ``--data`` by the names of their rows in the table: what they are called without
    the ending, or, where two are called alike, the whole path.

    Raises:
        ValueError: a file is given twice.
    """
    stems = [path.name.split(".")[0] or path.name for path in paths]
    names = stems if len(set(stems)) == len(stems) else list(map(str, paths))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--data {twice} is given twice; name each file once.")
    return dict(zip(names, paths, strict=True))


def read_texts(
    path: Path,
    json_key: str,
    solution_only: bool,
    limit: int | None,
    *,
    answers: bool = False,
    name: str = "",
) -> list[Text]:
    """The first ``limit`` documents of a file called ``name``; answers: with their spans.

    Raises:
        ValueError: the file cannot be read, a line is no such object, or there is no document, or
            no answer.
    """
    try:
        keys = [json_key, "problem_chars", "answer_spans"]
        rows = itertools.islice(read_corpus(path, keys), limit)
        texts = [_text(row, json_key, solution_only, answers, name) for row in rows]
    except ValueError as error:
        raise ValueError(f"--data {error}") from None
    if not texts:
        raise ValueError(f"--data {path} holds no document; name a JSONL file with one per line.")
    if answers and not any(text.spans for text in texts):
        raise ValueError(
            f"--data {path} marks no answer, which --positions answers needs; give its lines "
            'answer_spans, such as "answer_spans": [[10, 12]] (characters of the text).'
        )
    return texts


def _text(row: Row, json_key: str, solution_only: bool, answers: bool, name: str) -> Text:
    text = row.text(json_key)
    problem = row.values.get("problem_chars")
    if solution_only and not isinstance(problem, int):
        raise ValueError(f"{row.place}: no number problem_chars, which --solution-only needs.")
    try:
        spans = check_spans(row.values.get("answer_spans", []), len(text)) if answers else ()
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None
    return Text(row.number, row.place, text, problem if solution_only else 0, spans, name)


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
        answers = answers_by_token(text.text, text.spans, ids, bytes_of)
        if len(ids) > 1:
            documents.append(Document(text.line, ids, first, answers, text.file))
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
    by_place = {(document.file, document.line): document for document in documents}
    for record in earlier.records:
        document = by_place.get((record.file, record.line))
        if document is None or document.digest != record.id:
            raise ValueError(
                f"--data {record.file}, line {record.line}, is not the document that {path} was "
                "measured on; pass the same --data (and a checkpoint with the same tokenizer)."
            )
    return [(by_place[record.file, record.line], record) for record in earlier.records]
