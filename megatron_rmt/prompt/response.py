"""What a response says: the length of its thought, and its prediction, read from its bytes.

The rules, also of ``grammar.ResponseGrammar``, which follows responses while they are generated:

- the thought ends with the first occurrence of `close`; what the closing token holds beyond the
  marker belongs to the answer;
- a "boxed" answer is the content of the first `\\boxed{...}` after the marker, its braces balanced
  and at most 8 deep (a backslash does not escape a brace); it is complete at the closing brace, or
  when it nests deeper (then it cannot be read);
- a "next" answer is the text right after the marker, as far as tokens are allowed;
- an end token ends the response in any state.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from megatron_rmt.prompt.template import BOX, MAXIMUM_BOX_DEPTH, Template


@dataclasses.dataclass(frozen=True)
class Response:
    """What was read from a response.

    Attributes:
        thought_length: tokens that begin before the first byte of `close` (one that straddles it
            counts); all tokens before the end token if the thought was never closed.
        closed: the thought was closed.
        well_formed: closed, and a prediction of at least one byte could be read where an answer is
            asked for.
        prediction: the answer's bytes; b"" if not well formed.
    """

    thought_length: int
    closed: bool
    well_formed: bool
    prediction: bytes


def read_response(
    tokens: Sequence[int],
    template: Template,
    token_bytes: Sequence[bytes],
    end_token_ids: Sequence[int],
    answer_tokens: int,
) -> Response:
    """Read one response by the rules in the module's docstring.

    Args:
        tokens: generated token ids; an end token and what follows it are ignored.
        template: what `close` and the answer look like.
        token_bytes: bytes of each token id.
        end_token_ids: tokens that end a response.
        answer_tokens: tokens after the closing one that may belong to the answer; 0 if none is
            asked for.
    """
    written = itertools.takewhile(lambda token: token not in end_token_ids, tokens)
    pieces = [token_bytes[token] for token in written]
    close = template.close.encode()
    text = b"".join(pieces)
    thought_end = text.find(close)
    if thought_end < 0:
        return Response(len(pieces), closed=False, well_formed=False, prediction=b"")

    answer_start = thought_end + len(close)
    thought_length = closing = position = 0
    for index, piece in enumerate(pieces):
        if position < thought_end:
            thought_length = index + 1
        if position < answer_start:
            closing = index
        position += len(piece)
    if answer_tokens == 0:
        return Response(thought_length, closed=True, well_formed=True, prediction=b"")
    answer_end = sum(map(len, pieces[: closing + 1 + answer_tokens]))
    prediction = text[answer_start:answer_end]
    if template.answer == "boxed":
        prediction = _boxed(prediction)
    return Response(thought_length, True, len(prediction) > 0, prediction)


def can_answer(text: bytes, template: Template) -> bool:
    """Whether an answer of the template's form that says ``text`` is read as it, and is text.

    The end of thought is no answer: what writes it would close a thought, not predict. A box holds
    whole characters, its braces balanced.
    """
    if not text or template.close.encode() in text:
        return False
    if template.answer == "next":
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return _boxed(BOX + text + b"}") == text


def _boxed(text: bytes) -> bytes:
    """Content of the first `\\boxed{...}`; b"" if it is missing, incomplete or nested too deep."""
    found = text.find(BOX)
    if found < 0:
        return b""
    start = found + len(BOX)
    depth = 1
    for index in range(start, len(text)):
        depth += {ord("{"): 1, ord("}"): -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
        if depth > MAXIMUM_BOX_DEPTH:
            return b""
    return b""
