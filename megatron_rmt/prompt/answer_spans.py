"""Answers that a document marks: ``"answer_spans": [[first, limit], ...]``, in characters."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Spans = tuple[tuple[int, int], ...]


def check_spans(value: Any, length: int) -> Spans:
    """What a line of data has as answer_spans, for a text of ``length`` characters.

    Raises:
        ValueError: it is something else.
    """

    def is_span(span: Any) -> bool:
        whole = isinstance(span, list) and [type(end) for end in span] == [int, int]
        return whole and 0 <= span[0] < span[1] <= length

    if not isinstance(value, list) or not all(map(is_span, value)):
        raise ValueError(
            f"answer_spans is {str(value)[:80]}; give a list of [first, limit] characters with "
            f"0 <= first < limit <= {length}, the length of the text."
        )
    return tuple((first, limit) for first, limit in value)


def answers_by_token(
    text: str, spans: Spans, ids: Sequence[int], bytes_of: Sequence[bytes]
) -> dict[int, bytes]:
    """What each span says, by its first token, ascending: an index of ``ids``, the tokens of
    ``text``. Of spans that begin with one token it is the longest.

    The first token is the first that holds a byte of the span: a blank before an answer may be part
    of it.
    """
    ends = np.cumsum([len(bytes_of[token]) for token in ids])
    opening = [len(text[:first].encode()) for first, _ in spans]
    tokens = np.searchsorted(ends, opening, side="right").tolist()
    said = [text[first:limit].encode() for first, limit in spans]
    return dict(sorted(zip(tokens, said, strict=True), key=lambda own: (own[0], len(own[1]))))
