"""Held-out documents of an evaluation: read, tokenized, and the positions in them drawn."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import NOT_COUNTED, Measured, Record


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


def read_texts(
    path: Path, json_key: str, solution_only: bool, limit: int | None
) -> list[tuple[int, str, int]]:
    """(line from 1, text, characters that do not count) of the first ``limit`` documents.

    Raises:
        ValueError: the file is missing, a line is no such object, or there is no document.
    """
    texts: list[tuple[int, str, int]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(texts) == limit:
                    break
                if line.strip():
                    texts.append((number, *_text(line, json_key, solution_only)))
    except OSError as error:
        raise ValueError(f"--data {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"--data {path}, line {number}: {error}.") from None
    if not texts:
        raise ValueError(f"--data {path} holds no document; name a JSONL file with one per line.")
    return texts


def _text(line: str, json_key: str, solution_only: bool) -> tuple[str, int]:
    content = json.loads(line)
    if not isinstance(content, dict) or not isinstance(content.get(json_key), str):
        raise ValueError(f"it is not a JSON object with a string {json_key!r}; see --json-key")
    problem = content.get("problem_chars", 0)
    if solution_only and not ("problem_chars" in content and isinstance(problem, int)):
        raise ValueError("it has no number problem_chars, which --solution-only needs")
    return content[json_key], problem if solution_only else 0


def tokenize(
    texts: Sequence[tuple[int, str, int]],
    encode: Callable[[str], Sequence[int]],
    bytes_of: Sequence[bytes],
) -> list[Document]:
    """Documents as training would tokenize them, without the end-of-document token.

    Raises:
        ValueError: not one of them has two tokens.
    """
    documents = []
    for line, text, problem_chars in texts:
        ids = list(encode(text))
        # In bytes, because a token may be part of a character.
        starts = np.cumsum([0, *(len(bytes_of[token]) for token in ids)])[:-1]
        first = int(np.searchsorted(starts, len(text[:problem_chars].encode())))
        if len(ids) > 1:
            documents.append(Document(line, ids, first))
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
