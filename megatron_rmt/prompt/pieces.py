"""Token ids of the pieces of a prompt, which are encoded apart from each other.

A prompt is head, document, stem, thought, close and answer, and each comes as tokens of its own:
the document from the data, the thought from the model. Three things that a tokenizer does to a
whole text therefore need care. The begin token stands once, and first; the dummy space that
sentencepiece and its like put before a text is not put before a piece inside one; and no token
reaches over the end of a piece. So the ids of a prompt are those of its text encoded as a whole,
but where a token of the whole would reach over such an end, and for a document behind a head, which
keeps the dummy space of its data.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from megatron_rmt.prompt.template import rendered_turn
from megatron_rmt.prompt.token_bytes import transformers_tokenizer

# What a piece is encoded behind. The first is of the private use area: no vocabulary has a token
# that joins it to a text, so it becomes bytes or the unknown token.
_SENTINELS = ("\ue000", "\ufdd0", "|", "\n", "1")


@dataclass(frozen=True)
class PieceEncoder:
    """How the pieces of prompts become token ids.

    whole: token ids of a text as if there were no other, no special tokens added. bytes_of: bytes
    of each token id. begin: ids of what begins a text (one token in most vocabularies), empty where
    nothing does. opens_texts: the tokenizer puts ``begin`` before each text. marks_turns: the chat
    template opens its turns with it, too, so that only the first of a prompt is the begin token.
    """

    whole: Callable[[str], list[int]]
    bytes_of: Sequence[bytes]
    begin: tuple[int, ...] = ()
    opens_texts: bool = False
    marks_turns: bool = False

    @classmethod
    def of(cls, tokenizer: Any, bytes_of: Sequence[bytes]) -> Self:
        """That of Megatron's ``tokenizer``."""
        inner = transformers_tokenizer(tokenizer)

        def whole(text: str) -> list[int]:
            if not text:
                return []
            if inner is not None:
                return list(inner.encode(text, add_special_tokens=False))
            return list(tokenizer.tokenize(text))

        added, own = list(tokenizer.tokenize("x")), whole("x")
        places = range(len(added) - len(own) + 1)
        first = next((at for at in places if added[at : at + len(own)] == own), 0)
        begin = tuple(added[:first])
        opens_texts = bool(begin) and not any(bytes_of[token] for token in begin)
        if not opens_texts:
            begin = _named_begin(tokenizer, bytes_of)
        marks_turns = bool(begin) and whole(_turn(inner)).count(begin[-1]) > 1
        if marks_turns and not opens_texts:
            begin, marks_turns = (), False
        return cls(whole, bytes_of, begin, opens_texts, marks_turns)

    def first(self, text: str) -> list[int]:
        """Token ids of the text that a prompt begins with, the begin token before it if the
        tokenizer puts one before a text or ``text`` has one."""
        ids = self.whole(text)
        bare = self._without_begin(ids[leading(self.begin, ids) :])
        return [*self.begin, *bare] if ids and (self.opens_texts or bare != ids) else ids

    def inside(self, text: str) -> list[int]:
        """Token ids of a text that other text stands before: no begin token, no dummy space."""
        return self._without_begin(self._without_dummy_space(text))

    def _without_begin(self, ids: list[int]) -> list[int]:
        return ids if self.marks_turns else [token for token in ids if token not in self.begin]

    def _without_dummy_space(self, text: str) -> list[int]:
        alone = self.whole(text)
        if self._bytes(self.whole("x")) == b"x":
            return alone
        expected = self._bytes(alone)
        for sentinel in _SENTINELS:
            before, both = self.whole(sentinel), self.whole(sentinel + text)
            behind = both[len(before) :]
            if (
                before
                and both[: len(before)] == before
                and self._bytes(behind) in (expected, expected.removeprefix(b" "))
            ):
                return behind
        return alone

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes_of[token] for token in ids)


def leading(begin: Sequence[int], ids: Sequence[int]) -> int:
    """How many of the first ``ids`` are begin tokens."""
    return len(list(itertools.takewhile(lambda token: token in begin, ids)))


def before_document(
    preamble: Sequence[int], begin: Sequence[int], document: Sequence[int]
) -> tuple[list[int], int]:
    """(token ids before ``document``, how many of its own first tokens they stand for).

    A document may bring its begin token: behind a preamble that has one it is left out, and it
    moves before one that has none; where there is no preamble, one of several stays. All together
    there are at most ``len(preamble) + len(document)`` tokens, and the document keeps one at least.
    """
    own = leading(begin, document)
    if own == len(document):
        own = max(0, own - len(begin))
    if not preamble:
        return [], max(0, own - len(begin))
    if own and not leading(begin, preamble):
        return [*begin, *preamble], own
    return list(preamble), own


def _turn(inner: Any) -> str:
    try:
        return rendered_turn(inner, "x")
    except ValueError:
        # Whoever asks for chat markers is told so; without them it does not matter.
        return ""


def _named_begin(tokenizer: Any, bytes_of: Sequence[bytes]) -> tuple[int, ...]:
    """The begin token that data may have been written with although the tokenizer adds none."""
    try:
        token = tokenizer.bos
    except (AttributeError, NotImplementedError, TypeError):
        return ()
    # Where it is the end of a document, too, it stands at the first place for that reason.
    if token is None or token == tokenizer.eod or not 0 <= token < len(bytes_of):
        return ()
    return () if bytes_of[token] else (int(token),)
