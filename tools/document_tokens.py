"""The token ids of documents, as preprocessing stores them and evaluation reads them.

Special tokens that are written out in a text (``<|endoftext|>`` in a web page, ``<s>`` in HTML) are
plain text unless asked for otherwise: as tokens they would end documents that go on. Long texts are
encoded piece by piece, with the ids of the whole.
"""

import copy
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
    """Encodes documents by Megatron's ``tokenizer``, which stays as it is: prompts of the same
    tokenizer go on reading chat markers as the special tokens that they are.

    special_tokens: how special tokens that a text spells out are read: "plain": as the text that
    they are; "special": as the tokens, which end documents, mark turns, ...; "refuse": not at all.
    written: how many such tokens have been found so far; first_written: the first, and its place.
    """

    def __init__(self, tokenizer: Any, special_tokens: SpecialTokens = "plain") -> None:
        if _backend_of(tokenizer) is not None:
            # How special tokens are read is a setting of the whole tokenizer.
            tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.written = 0
        self.first_written: tuple[str, str] | None = None
        # A transformers tokenizer; sentencepiece and others never read text as special tokens.
        self._inner = _inner_of(tokenizer)
        if not hasattr(self._inner, "added_tokens_decoder"):
            self._inner = None
        self._backend = _backend_of(tokenizer)
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
        before, after = self._frame()
        yield before
        piece = _Piece([], 0, [])
        while piece.end < len(text):
            piece = self._next_piece(text, piece, place)
            yield piece.ids
        yield after

    def _next_piece(self, text: str, last: "_Piece", place: str) -> "_Piece":
        length = LONGEST_WHOLE if self._cuts_at else LONGEST_UNCUT
        while last.end + length < len(text) and length <= LONGEST_UNCUT and self._cuts_at:
            for cut in _places(text, last.end + length, between_tokens=self._cuts_at == "tokens"):
                piece = self._piece_to(cut, text, last)
                if piece is not None:
                    return piece
            length *= 2
        if last.end + length < len(text):
            raise ValueError(
                f"{place}: a text of {len(text)} characters, {LONGEST_UNCUT} of them in a row "
                "without a place where this tokenizer is sure to split; split the document."
            )
        ids = self._bare(text[last.context :])
        if ids[: len(last.tail)] != last.tail:
            raise ValueError(
                f"{place}: a text of {len(text)} characters, a part of which this tokenizer reads "
                "by what follows far behind it; split the document."
            )
        return _Piece(ids[len(last.tail) :], len(text), [])

    def _piece_to(self, cut: int, text: str, last: "_Piece") -> "_Piece | None":
        """The piece that ends at ``cut``, if both sides of the cut keep their tokens."""
        before, around = text[cut - CONTEXT : cut], text[cut - CONTEXT : cut + CONTEXT]
        tail = self._bare(before)
        if not tail or self._bare(around)[: len(tail)] != tail:
            return None
        if self._cuts_at == "words" and not self._splits_after(before, around):
            return None
        whole = text[last.context : cut]
        ids = self._bare(whole)
        # The first half may differ, as it begins anywhere in a word.
        kept = max(1, len(tail) // 2)
        if ids[: len(last.tail)] != last.tail or ids[-kept:] != tail[-kept:]:
            return None
        # Where digits go in threes, equal ids do not say that the threes begin at the same digits.
        if not _BETWEEN_WORDS.match(text, cut) and self._splits(whole) != self._splits(before):
            return None
        return _Piece(ids[len(last.tail) :], cut, tail)

    def _splits(self, text: str) -> set[int]:
        """Where the pre-tokenizer splits the last characters of ``text``, counted from its end."""
        if self._backend is None or self._backend.pre_tokenizer is None:
            return set()
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = self._backend.pre_tokenizer.pre_tokenize_str(text)
        return {len(text) - begin for _, (begin, _) in words if len(text) - begin < CONTEXT // 2}

    def _splits_after(self, before: str, around: str) -> bool:
        """Whether no pre-token of ``around`` has characters both in ``before`` and behind it."""
        normalizer = self._backend.normalizer
        if normalizer is not None:
            before, around = normalizer.normalize_str(before), normalizer.normalize_str(around)
        words = self._backend.pre_tokenizer.pre_tokenize_str(around)
        return around.startswith(before) and not any(
            begin < len(before) < end for _, (begin, end) in words
        )

    def _bare(self, text: str) -> list[int]:
        """Token ids without the special tokens that the tokenizer adds."""
        if self._inner is None:
            return list(self.tokenizer.tokenize(text))
        return self._inner(text, add_special_tokens=False).input_ids

    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after any text."""
        whole, bare = list(self.tokenizer.tokenize("a")), self._bare("a")
        starts = range(len(whole) - len(bare) + 1)
        first = next(i for i in starts if whole[i : i + len(bare)] == bare)
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

    @property
    def context(self) -> int:
        """The character where ``tail`` begins."""
        return max(0, self.end - CONTEXT)


def _inner_of(tokenizer: Any) -> Any | None:
    return getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)


def _backend_of(tokenizer: Any) -> Any | None:
    """The ``tokenizers`` object in Megatron's ``tokenizer``, where it has one."""
    return getattr(_inner_of(tokenizer), "backend_tokenizer", None)


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
