"""How responses are read, against readings by hand."""

import pytest

from megatron_rmt.prompt.response import Response, can_answer, read_response
from megatron_rmt.prompt.template import TEMPLATES, Template

BOXED = TEMPLATES["raw"]
NEXT = TEMPLATES["inline"]


def read(pieces: list[bytes], template: Template, answer_tokens: int = 4) -> Response:
    """`read_response` of a response cut into these tokens; None is the end token."""
    vocabulary = [*dict.fromkeys(p for p in pieces if p is not None), b"<end>"]
    tokens = [vocabulary.index(b"<end>" if p is None else p) for p in pieces]
    return read_response(tokens, template, vocabulary, [len(vocabulary) - 1], answer_tokens)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"a", b"b", b"</think>", b"\\boxed{", b"x", b"}"], (2, True, True, b"x")),
        # The token that holds the marker's first byte counts if it begins before it.
        ([b"a", b"b</", b"think>", b"\\boxed{x}"], (2, True, True, b"x")),
        ([b"a", b"b", b"</", b"think>", b"\\boxed{x}"], (2, True, True, b"x")),
        ([b"</think>", b"\\boxed{x}"], (0, True, True, b"x")),
        # Bytes behind the marker in its token are the answer's.
        ([b"a</think>\\boxed{x} and", b"so"], (1, True, True, b"x")),
        ([b"a", b"</think>\\box", b"ed{x}"], (1, True, True, b"x")),
        # The first box after the marker; one in the thought does not count.
        ([b"\\boxed{no}", b"</think>", b"\\boxed{x}", b"\\boxed{y}"], (1, True, True, b"x")),
        ([b"\\boxed{", b"</think>", b"}"], (1, True, False, b"")),
        ([b"</think>", b"\\boxed{\\frac{1}{2}}"], (0, True, True, b"\\frac{1}{2}")),
        ([b"</think>", b"\\boxed{ the}"], (0, True, True, b" the")),
        ([b"</think>", b"\\boxed{</think>}"], (0, True, True, b"</think>")),
        ([b"</think>", b"\\boxed{}", b"\\boxed{x}"], (0, True, False, b"")),
        ([b"</think>", b"\\boxed{", b"x"], (0, True, False, b"")),
        ([b"</think>", b"the"], (0, True, False, b"")),
        ([b"</think>"], (0, True, False, b"")),
        # Never closed.
        ([b"a", b"b", b"</think"], (3, False, False, b"")),
        ([b"a", b"b", None], (2, False, False, b"")),
        ([], (0, False, False, b"")),
        # What follows an end token is padding.
        ([b"a", None, b"</think>", b"\\boxed{x}"], (1, False, False, b"")),
        ([b"</think>", b"\\boxed{x", None, b"}"], (0, True, False, b"")),
        # Tokens without bytes count where more of the thought follows them.
        ([b"a", b"", b"b", b"", b"</thi", b"", b"nk>", b"", b"\\boxed{x}"], (3, True, True, b"x")),
    ],
)
def test_boxed_responses_by_hand(pieces, expected):
    assert read(pieces, BOXED) == Response(*expected)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"a", b"</think>", b" the"], (1, True, True, b" the")),
        ([b"a", b"</think>", b" the", b" cat", b" sat"], (1, True, True, b" the cat")),
        ([b"a", b"</think> t", b"he", b" cat", b" sat"], (1, True, True, b" the cat")),
        ([b"a", b"</think> the", None], (1, True, True, b" the")),
        ([b"a", b"</think>", b" the", None, b" cat"], (1, True, True, b" the")),
        ([b"a", b"</think>"], (1, True, False, b"")),
        ([b"a", b"</think>", None], (1, True, False, b"")),
        ([b"a", b"</think>", b"</think>"], (1, True, True, b"</think>")),
        ([b"a", b" the"], (2, False, False, b"")),
    ],
)
def test_next_responses_by_hand(pieces, expected):
    assert read(pieces, NEXT, answer_tokens=2) == Response(*expected)


@pytest.mark.parametrize("template", [NEXT, BOXED])
def test_where_no_answer_is_asked_for_a_closed_thought_is_well_formed(template: Template):
    assert read([b"a", b"</think>the"], template, answer_tokens=0) == Response(1, True, True, b"")
    assert read([b"a", b"the"], template, answer_tokens=0) == Response(2, False, False, b"")


def test_a_box_must_fit_into_the_answer_tokens():
    pieces = [b"a", b"</think>", b"\\boxed{", b"x", b"}"]
    assert read(pieces, BOXED, answer_tokens=3).prediction == b"x"
    assert not read(pieces, BOXED, answer_tokens=2).well_formed


def test_boxes_nest_up_to_depth_8():
    def nested(depth: int) -> bytes:
        return b"{" * (depth - 1) + b"x" + b"}" * (depth - 1)

    for depth in range(1, 9):
        text = b"</think>\\boxed{" + nested(depth) + b"}"
        assert read([text], BOXED) == Response(0, True, True, nested(depth))
    assert read([b"</think>\\boxed{" + nested(9) + b"}"], BOXED) == Response(0, True, False, b"")


@pytest.mark.parametrize(
    ("text", "boxed", "following"),
    [
        (b" the", True, True),
        (b" ", True, True),
        ("é".encode(), True, True),
        (b"{x}", True, True),
        (b"{" * 7 + b"}" * 7, True, True),
        (b"{" * 8 + b"}" * 8, False, True),
        (b"{", False, True),
        (b"}", False, True),
        (b"}{", False, True),
        (b"\\}", False, True),
        ("é".encode()[:1], False, True),
        (b"</", True, True),
        (b"", False, False),
        (b"</think>", False, False),
        (b"so</think>", False, False),
    ],
)
def test_what_an_answer_can_say(text: bytes, boxed: bool, following: bool):
    assert can_answer(text, BOXED) is boxed
    assert can_answer(text, NEXT) is following
    if boxed:
        assert read([b"a", b"</think>", b"\\boxed{", text, b"}"], BOXED).prediction == text
