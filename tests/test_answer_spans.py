"""Spans of answers: what is refused, and which token each begins with."""

from typing import Any

import pytest

from megatron_rmt.prompt.answer_spans import answers_by_token, check_spans


def test_spans_inside_the_text_are_taken_as_they_are():
    assert check_spans([], 0) == ()
    assert check_spans([[0, 1], [3, 5], [2, 4]], 5) == ((0, 1), (3, 5), (2, 4))


@pytest.mark.parametrize(
    "value",
    [
        "0 1",
        {"first": 0},
        None,
        [0, 1],
        [(0, 1)],
        [[0, 1], [2]],
        [[0, 1, 2]],
        [[0.0, 1]],
        [[False, True]],
        [["0", "1"]],
        [[-1, 1]],
        [[1, 1]],
        [[2, 1]],
        [[0, 6]],
    ],
)
def test_everything_else_is_refused_with_the_length_of_the_text(value: Any):
    with pytest.raises(ValueError, match=r"answer_spans is .*; give .* limit <= 5, the length"):
        check_spans(value, 5)


def test_the_message_does_not_repeat_a_long_value():
    with pytest.raises(ValueError, match="answer_spans is") as refused:
        check_spans("x" * 1000, 5)
    assert len(str(refused.value)) < 250


# Bytes of the tokens of a text; letters of two and three bytes, one of them cut in two.
PIECES = [b"Gr", "ö".encode(), b"\xc3", b"\x9fe", b" 4", b"2", b"", " 数".encode(), b" =", b" 84"]
TEXT = b"".join(PIECES).decode()


def _slow_first_token(first: int) -> int:
    """The token that holds the first byte of the character at ``first``."""
    byte = len(TEXT[:first].encode())
    holders = [number for number, piece in enumerate(PIECES) for _ in piece]
    return holders[byte]


def test_a_span_begins_with_the_token_that_holds_its_first_byte():
    ids = [7 + number for number in range(len(PIECES))]
    bytes_of = [b"?"] * 7 + PIECES
    for first in range(len(TEXT)):
        found = answers_by_token(TEXT, ((first, len(TEXT)),), ids, bytes_of)
        assert found == {_slow_first_token(first): TEXT[first:].encode()}
    # A blank before the answer is part of its token.
    assert answers_by_token(TEXT, ((TEXT.index("42"), 9),), ids, bytes_of) == {4: b"42 "}


def test_first_tokens_are_ascending_and_each_has_its_longest_span():
    bytes_of, ids = PIECES, range(len(PIECES))
    last, four, two = TEXT.index("84"), TEXT.index("4"), TEXT.index("2")
    spans = ((last, last + 2), (two, two + 1), (four, two + 1), (four - 1, two))
    assert list(answers_by_token(TEXT, spans, ids, bytes_of)) == [4, 5, 9]
    assert answers_by_token(TEXT, (), ids, bytes_of) == {}
    both = ((four, two + 1), (four, two))
    assert answers_by_token(TEXT, both, ids, bytes_of) == {4: b"42"}
