"""What a run asks the model and how it reads the answers, with the tokenizer's own token ids."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch

from megatron_rmt.prompt.grammar import ResponseGrammar
from megatron_rmt.prompt.pieces import PieceEncoder, before_document
from megatron_rmt.prompt.response import Response, can_answer, read_response
from megatron_rmt.prompt.template import BOX, Template, chat_template, load_template
from megatron_rmt.prompt.token_bytes import special_texts, token_bytes
from megatron_rmt.prompt.tokenizer_files import declared_ends

_BOX_OPENING, _BOX_CLOSING = "\n" + BOX.decode(), "}"
# A token's text, encoded in a box, may take more than one token: so many, with the box's end, or
# the token itself is put there.
_TOKENS_OF_A_BOXED_TOKEN = 16
NO_END_OF_DOCUMENT = -1


@dataclass(frozen=True)
class ResponseBound:
    """The most tokens that a response may take, part by part.

    thought: 2 * B_t, beyond which nothing is rewarded; B_t in the warm-up. close: of an end of
    thought that is written by force, 0 where none is. answer: of a drawn or a written answer.
    """

    thought: int
    close: int
    answer: int

    @property
    def tokens(self) -> int:
        """Of the whole response."""
        return self.thought + self.close + self.answer


@dataclass(frozen=True)
class Prompt:
    """The pieces of a prompt in token ids, and the vocabulary in which answers are read.

    template: with the chat markers in place. encode: token ids of a piece of text inside a prompt
    (``PieceEncoder.inside``). bytes_of: bytes of each token id, b"" for special tokens other than
    the template's markers. stop: token ids that end a response. end_of_document: the token id
    between documents, ``NO_END_OF_DOCUMENT`` where the tokenizer has none. answer_tokens: most
    tokens of an answer, 0 where a response ends with its thought. force_close: the end of thought
    is written at its bound. target_tokens: how many true tokens an answer is to say. begin: what
    begins a text, in token ids; empty where nothing does. encode_first: token ids of the text that
    a prompt begins with (``PieceEncoder.first``; None: as ``encode``).
    """

    template: Template
    encode: Callable[[str], list[int]]
    bytes_of: list[bytes]
    stop: list[int]
    end_of_document: int
    answer_tokens: int
    force_close: bool = False
    target_tokens: int = 1
    begin: tuple[int, ...] = ()
    encode_first: Callable[[str], list[int]] | None = None
    _grammars: dict[torch.device, ResponseGrammar] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        template: str,
        *,
        chat: bool,
        answer_tokens: int,
        force_close: bool,
        target_tokens: int = 1,
    ) -> Self:
        """The prompt of ``template`` (a name or a file) by Megatron's ``tokenizer``.

        chat: with the tokenizer's chat markers, where it has them.

        Raises:
            ValueError: no such template, the chat markers do not go round it, the tokens have no
                fixed bytes, or those of a marker are not the marker.
        """
        inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
        loaded = load_template(template)
        bytes_of = token_bytes(tokenizer)
        pieces = PieceEncoder.of(tokenizer, bytes_of)
        stop = _ends(tokenizer, bytes_of)
        bytes_of = _with_markers(bytes_of, loaded, pieces.inside, special_texts(tokenizer), stop)
        return cls(
            template=chat_template(loaded, inner) if chat else loaded,
            encode=pieces.inside,
            bytes_of=bytes_of,
            stop=stop,
            end_of_document=tokenizer.eod if tokenizer.eod in stop else NO_END_OF_DOCUMENT,
            answer_tokens=answer_tokens,
            force_close=force_close,
            target_tokens=target_tokens,
            begin=pieces.begin,
            encode_first=pieces.first,
        )

    def rendering(self) -> dict[str, str]:
        """The texts that the model is asked with: "head", "stem" (with its budget's placeholder)
        and "close", as the tokenizer's chat template rendered them at this start.

        A chat template may write the date, and may be edited, so what was begun with one rendering
        is gone on with, or compared, under the same only.
        """
        return {name: getattr(self.template, name) for name in ("head", "stem", "close")}

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the rendering and of the token ids that it becomes."""
        stem = self.encode(self.template.stem)
        parts = [self.rendering(), self.preamble, stem, self.close]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def preamble(self) -> list[int]:
        """Token ids of the template's head, which stand before each document, with the begin token
        where the head or the tokenizer has one; a document's own is seen to by ``before``."""
        return (self.encode_first or self.encode)(self.template.head)

    def before(self, document: Sequence[int]) -> tuple[list[int], int]:
        """(token ids before ``document``, how many of its own first tokens they stand for)."""
        return before_document(self.preamble, self.begin, document)

    @cached_property
    def close(self) -> list[int]:
        """Token ids of the end of thought."""
        return self.encode(self.template.close)

    def grammar(self, device: torch.device) -> ResponseGrammar:
        """What follows responses while they are generated, on ``device``."""
        if device not in self._grammars:
            grammar = ResponseGrammar(self.template, self.bytes_of, self.stop, device)
            self._grammars[device] = grammar
        return self._grammars[device]

    @cached_property
    def has_bytes(self) -> torch.Tensor:
        """``[vocab]`` bool: the token is text, not special."""
        return torch.tensor([len(text) > 0 for text in self.bytes_of])

    @cached_property
    def answerable(self) -> torch.Tensor:
        """``[vocab]`` bool: an answer can say the token, so that it can be asked for."""
        ends = {*self.stop}
        return torch.tensor(
            [
                token not in ends and can_answer(text, self.template)
                for token, text in enumerate(self.bytes_of)
            ]
        )

    def stem(self, budget: int) -> list[int]:
        """Token ids of the stem that asks for ``budget`` tokens."""
        return self.encode(self.template.stem_text(budget))

    def target(self, following: Sequence[int]) -> list[int]:
        """Of the true tokens that follow a position, those that a right answer says."""
        wanted = following[: self.target_tokens]
        return [*itertools.takewhile(lambda token: bool(self.answerable[token]), wanted)]

    def true_answer(self, target: Sequence[int]) -> list[int]:
        """The answer that the format warm-up writes: the true next tokens, boxed if asked for.

        Its bytes are exact: tokens whose text the tokenizer would write otherwise (part of a
        character, not normalised) stand in the box themselves.
        """
        if self.template.answer == "next":
            return [*target]
        spelled = [*self._box_opening, *target, self._box_closing]
        encoded = self.encode(f"{_BOX_OPENING}{self.text(target)}{_BOX_CLOSING}")
        exact = self._bytes(encoded) == self._bytes(spelled)
        return encoded if exact and len(encoded) <= self._longest_truth else spelled

    @cached_property
    def _box_opening(self) -> list[int]:
        return self.encode(_BOX_OPENING)

    @cached_property
    def _box_closing(self) -> int:
        """The newest token for it: older ones stand for bytes that no text needs."""
        return max(i for i, text in enumerate(self.bytes_of) if text == _BOX_CLOSING.encode())

    @property
    def _longest_truth(self) -> int:
        """Most tokens of a true answer."""
        if self.template.answer == "next":
            return self.target_tokens
        return len(self._box_opening) + 1 + _TOKENS_OF_A_BOXED_TOKEN * self.target_tokens

    def read(self, tokens: Sequence[int]) -> Response:
        """What the response ``tokens`` says."""
        return read_response(tokens, self.template, self.bytes_of, self.stop, self.answer_tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """``tokens`` as text; bytes that are no UTF-8 are replaced, special tokens left out."""
        return self._bytes(tokens).decode(errors="replace")

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.bytes_of[token] for token in tokens)

    def bound(self, budget: int, *, warm_up: bool = False, truth_tokens: int = 0) -> ResponseBound:
        """How long a response may get where ``budget`` tokens of thought are asked for.

        warm_up: the thought is closed at the budget and an answer of ``truth_tokens`` is written.
        """
        return ResponseBound(
            thought=budget if warm_up else 2 * budget,
            close=len(self.close) * (self.force_close or warm_up),
            answer=max(self.answer_tokens, truth_tokens * warm_up),
        )

    def longest_response(self, budget: int, warm_up: bool) -> int:
        """The same in tokens, over a run of which ``budget`` is the largest.

        warm_up: the run begins with a format warm-up.
        """
        bounds = [self.bound(budget)]
        if warm_up:
            bounds.append(self.bound(budget, warm_up=True, truth_tokens=self._longest_truth))
        return max(bound.tokens for bound in bounds)

    def longest_tail(self, budgets: Iterable[int], warm_up: bool) -> int:
        """Most tokens of a stem and its response, likewise, where some position is asked for each
        of ``budgets``."""
        return max(len(self.stem(own)) + self.longest_response(own, warm_up) for own in budgets)


def _ends(tokenizer: Any, bytes_of: Sequence[bytes]) -> list[int]:
    """The token ids that end a text: the tokenizer's own, ascending, and those special ones that
    the files beside it declare (models of chats have several)."""
    own = {tokenizer.eod}
    # Of Hugging Face it is the same, and raises a TypeError where there is none.
    if tokenizer.eod is not None:
        own.add(_end_of_sequence(tokenizer))
    declared = {
        end for end in declared_ends(tokenizer) if end < len(bytes_of) and not bytes_of[end]
    }
    # Sentencepiece says -1 where there is none.
    return sorted(int(end) for end in (own | declared) - {None} if end >= 0)


def _end_of_sequence(tokenizer: Any) -> int | None:
    try:
        return tokenizer.eos
    except (AttributeError, NotImplementedError):
        return None


def _with_markers(
    bytes_of: Sequence[bytes],
    template: Template,
    encode: Callable[[str], list[int]],
    special: Mapping[int, str],
    stop: Sequence[int],
) -> list[bytes]:
    """``bytes_of``, where special tokens that are written for the template's markers stand for the
    marker's text, as those do that are not special.

    Raises:
        ValueError: the tokens of a marker still do not spell it, so that no response could be read.
    """
    needed = {"close": template.close}
    if template.answer == "boxed":
        needed["box"] = f"{_BOX_OPENING}x{_BOX_CLOSING}"
    written = {text: encode(text) for text in (*needed.values(), template.opening)}
    result = [*bytes_of]
    for text, tokens in written.items():
        for token in tokens:
            if token in special and special[token] in text and token not in stop:
                result[token] = special[token].encode()
    for name, text in needed.items():
        spelled = b"".join(result[token] for token in written[text])
        if text.encode() not in spelled:
            raise ValueError(
                f"the tokens of its {name}, {text!r}, spell {spelled.decode(errors='replace')!r}, "
                "so that no response could be read; use a template and a tokenizer that go "
                "together."
            )
    return result
