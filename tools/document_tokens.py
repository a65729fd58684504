"""The token ids of documents, as preprocessing stores them and evaluation reads them.

Special tokens that are written out in a text (``<|endoftext|>`` in a web page, ``<s>`` in HTML) are
plain text unless asked for otherwise: as tokens they would end documents that go on. Long texts are
encoded piece by piece, with the ids of the whole.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokenizers import models

SpecialTokens = Literal["plain", "special", "refuse"]
SPECIAL_TOKENS = get_args(SpecialTokens)

# In characters. An encoding takes some 250 bytes of memory for a byte of text while it is made.
LONGEST_WHOLE = 2**18
LONGEST_UNCUT = 2**22
CONTEXT = 256
CUTS_TRIED = 32
_BETWEEN_WORDS = re.compile(r"(?<=\S)[ \n](?=\S)")


class DocumentTokenizer:
    """Encodes documents by Megatron's ``tokenizer``.

    special_tokens: how special tokens that a text spells out are read: "plain": as the text that
    they are; "special": as the tokens, which end documents, mark turns, ...; "refuse": not at all.
    written: how many such tokens have been found so far; first_written: the first, and its place.
    """

    def __init__(self, tokenizer: Any, special_tokens: SpecialTokens = "plain") -> None:
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.written = 0
        self.first_written: tuple[str, str] | None = None
        # A transformers tokenizer; sentencepiece and others never read text as special tokens.
        self._inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
        if not hasattr(self._inner, "added_tokens_decoder"):
            self._inner = None
        self._backend = getattr(self._inner, "backend_tokenizer", None)
        if self._backend is not None:
            self._inner.split_special_tokens = special_tokens == "plain"
        self._cuts_at = _where_it_cuts(tokenizer, self._backend)
        self._special = _special_tokens(self._inner)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._find_special = re.compile("|".join(map(re.escape, longest_first))).finditer

    def note_special_tokens(self, text: str, place: str) -> None:
        """Count the special tokens that the text at ``place`` (``file:line``) spells out.

        Raises:
            ValueError: there are some, and they are to be refused or cannot be kept as text.
        """
        found = [match[0] for match in self._find_special(text)] if self._special else []
        if not found:
            return
        if self.special_tokens == "refuse":
            raise ValueError(
                f"{place}: the special token {found[0]!r} is written in the text; take it out, or "
                "pass --special-tokens plain (it is text) or special (it is the token)."
            )
        for token in set(found) if self.special_tokens == "plain" else ():
            if self._special[token] in self._bare(token):
                raise ValueError(
                    f"{place}: the special token {token!r} is written in the text, and the "
                    f"{type(self._inner).__name__} at hand cannot read it as plain text; take it "
                    "out, or pass --special-tokens special."
                )
        self.written += len(found)
        self.first_written = self.first_written or (found[0], place)

    def report(self) -> str:
        """One line on the special tokens found in texts; empty if there were none."""
        if self.first_written is None:
            return ""
        token, place = self.first_written
        read, other = {
            "plain": ("plain text", "--special-tokens special reads them as tokens"),
            "special": ("tokens", "--special-tokens plain reads them as text"),
        }[self.special_tokens]
        return (
            f"{self.written} special tokens are written in the texts, the first, {token!r}, at "
            f"{place}: they are {read} here; {other}"
        )

    def encode(self, text: str, place: str) -> Iterator[list[int]]:
        """Token ids of a text with the special tokens that the tokenizer adds, in pieces.

        place: ``file:line``, for messages. A text of up to ``LONGEST_WHOLE`` characters is one
        piece. The ids are those of the text encoded as a whole. A longer text is cut where both
        sides keep their tokens, seen by encoding the surroundings with and without the cut. For BPE
        (which never undoes a merge) that is a proof: ids are right when any two neighbours are.
        Other models are cut where their pre-tokenizer splits anyway, or not at all.

        Raises:
            ValueError: a text of more than ``LONGEST_UNCUT`` characters has no such place.
        """
        if len(text) <= LONGEST_WHOLE:
            yield list(self.tokenizer.tokenize(text)) if text else []
            return
        before, after = self._frame(text[:CONTEXT])
        yield before
        piece = _Piece([], 0, [])
        while piece.end < len(text):
            piece = self._next_piece(text, piece, place)
            yield piece.ids
        yield after

    def _next_piece(self, text: str, last: "_Piece", place: str) -> "_Piece":
        origin = max(0, last.end - CONTEXT)
        length = LONGEST_WHOLE if self._cuts_at else LONGEST_UNCUT
        while last.end + length < len(text) and length <= LONGEST_UNCUT and self._cuts_at:
            for cut in _places(text, last.end + length, between_tokens=self._cuts_at == "tokens"):
                left, right = text[cut - CONTEXT : cut], text[cut : cut + CONTEXT]
                tail = self._bare(left)
                if tail and self._is_seam(left, right, tail):
                    ids = self._bare(text[origin:cut])
                    if _joins(last.tail, ids, tail):
                        return _Piece(ids[len(last.tail) :], cut, tail)
            length *= 2
        if last.end + length < len(text):
            raise ValueError(
                f"{place}: a text of {len(text)} characters, {LONGEST_UNCUT} of them in a row "
                "without a place where this tokenizer is sure to split; split the document."
            )
        ids = self._bare(text[origin:])
        if ids[: len(last.tail)] != last.tail:
            raise ValueError(
                f"{place}: a text of {len(text)} characters, of which this tokenizer reads an "
                f"earlier part by what follows far behind it; split the document."
            )
        return _Piece(ids[len(last.tail) :], len(text), [])

    def _is_seam(self, left: str, right: str, left_ids: list[int]) -> bool:
        """Whether ``left`` keeps its ids before ``right``, which then has ids of its own."""
        if self._bare(left + right)[: len(left_ids)] != left_ids:
            return False
        if self._cuts_at == "tokens":
            return True
        normalizer = self._backend.normalizer
        if normalizer is not None:
            left, right = normalizer.normalize_str(left), normalizer.normalize_str(left + right)
            if not right.startswith(left):
                return False
            right = right.removeprefix(left)
        words = self._backend.pre_tokenizer.pre_tokenize_str(left + right)
        return all(not begin < len(left) < end for _, (begin, end) in words)

    def _bare(self, text: str) -> list[int]:
        """Token ids without the special tokens that the tokenizer adds."""
        if self._inner is None:
            return list(self.tokenizer.tokenize(text))
        return self._inner(text, add_special_tokens=False).input_ids

    def _frame(self, text: str) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after a text, here ``text``."""
        whole, bare = list(self.tokenizer.tokenize(text)), self._bare(text)
        first = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:first], whole[first + len(bare) :]


@dataclass(frozen=True)
class _Piece:
    """A part of a long text.

    ids: its tokens. end: the character where it ends. tail: ids of the ``CONTEXT`` characters
    before the end, encoded by themselves.
    """

    ids: list[int]
    end: int
    tail: list[int]


def _joins(head: list[int], ids: list[int], tail: list[int]) -> bool:
    """Whether ``ids`` go on from ``head`` and end as ``tail`` does.

    The first half of ``tail`` may differ, as it begins anywhere in a word.
    """
    kept = max(1, len(tail) // 2)
    return ids[: len(head)] == head and ids[-kept:] == tail[-kept:]


def _places(text: str, limit: int, between_tokens: bool) -> Iterator[int]:
    """Where a piece may end, from ``limit`` characters down: before words, then anywhere."""
    words = _BETWEEN_WORDS.finditer(text, limit - LONGEST_WHOLE // 2, limit)
    yield from [match.start() for match in words][: -CUTS_TRIED - 1 : -1]
    if between_tokens:
        yield from range(limit, limit - CUTS_TRIED, -1)


def _where_it_cuts(tokenizer: Any, backend: Any) -> Literal["tokens", "words"] | None:
    """Where a text can be cut without a change of ids: between tokens, pre-tokens, or nowhere."""
    if backend is not None:
        if isinstance(backend.model, models.BPE):
            return None if backend.model.dropout else "tokens"
        return "words" if backend.pre_tokenizer is not None else None
    library = getattr(tokenizer, "library", None)
    if library == "sentencepiece":
        try:
            # Only a unigram model has several encodings. It adds up scores over a whole text in
            # float32, so that rounding, and with it the ids, depend on where the text begins.
            tokenizer._tokenizer.tokenizer.nbest_encode_as_ids("a", 1)
        except RuntimeError:
            return "tokens"
        return None
    return "tokens" if library == "tiktoken" else None


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a transformers tokenizer that it finds in text; none for others."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: token_id for token_id, token in added.items() if token.special}
