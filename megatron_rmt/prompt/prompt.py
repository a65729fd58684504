"""What a run asks the model and how it reads the answers, with the tokenizer's own token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch

from megatron_rmt.prompt.grammar import ResponseGrammar
from megatron_rmt.prompt.response import Response, read_response
from megatron_rmt.prompt.template import Template, chat_template, load_template
from megatron_rmt.prompt.token_bytes import token_bytes

# A token's text, encoded by itself in a box, may take more than one token; so many at the most.
_TOKENS_OF_A_BOXED_TOKEN = 16


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

    template: with the chat markers in place. encode: token ids of a piece of text, no special
    tokens added. bytes_of: bytes of each token id, b"" for special tokens. stop: token ids that end
    a response. end_of_document: the token id between documents. answer_tokens: most tokens of an
    answer, 0 where a response ends with its thought. force_close: the end of thought is written at
    its bound.
    """

    template: Template
    encode: Callable[[str], list[int]]
    bytes_of: list[bytes]
    stop: list[int]
    end_of_document: int
    answer_tokens: int
    force_close: bool = False
    _grammars: dict[torch.device, ResponseGrammar] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, tokenizer: Any, template: str, *, chat: bool, answer_tokens: int, force_close: bool
    ) -> Self:
        """The prompt of ``template`` (a name or a file) by Megatron's ``tokenizer``.

        chat: with the tokenizer's chat markers, where it has them.

        Raises:
            ValueError: no such template, the chat markers do not go round it, or the tokens have no
                fixed bytes.
        """
        inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)

        def encode(text: str) -> list[int]:
            if not text:
                return []
            if hasattr(inner, "add_special_tokens"):
                return list(inner.encode(text, add_special_tokens=False))
            return list(tokenizer.tokenize(text))

        ends = {tokenizer.eod, _end_of_sequence(tokenizer)} - {None}
        loaded = load_template(template)
        return cls(
            template=chat_template(loaded, inner) if chat else loaded,
            encode=encode,
            bytes_of=token_bytes(tokenizer),
            stop=sorted(map(int, ends)),
            end_of_document=tokenizer.eod,
            answer_tokens=answer_tokens,
            force_close=force_close,
        )

    @cached_property
    def preamble(self) -> list[int]:
        """Token ids of the template's head, which stand before each document."""
        return self.encode(self.template.head)

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

    def stem(self, budget: int) -> list[int]:
        """Token ids of the stem that asks for ``budget`` tokens."""
        return self.encode(self.template.stem_text(budget))

    def true_answer(self, token: int) -> list[int]:
        """The answer that the format warm-up writes: the true next token, boxed if asked for."""
        if self.template.answer == "next":
            return [token]
        return self.encode(f"\n\\boxed{{{self.text([token])}}}")

    def read(self, tokens: Sequence[int]) -> Response:
        """What the response ``tokens`` says."""
        return read_response(tokens, self.template, self.bytes_of, self.stop, self.answer_tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """``tokens`` as text; bytes that are no UTF-8 are replaced, special tokens left out."""
        return b"".join(self.bytes_of[token] for token in tokens).decode(errors="replace")

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
            truth = 1
            if self.template.answer == "boxed":
                truth = len(self.encode("\n\\boxed{}")) + _TOKENS_OF_A_BOXED_TOKEN
            bounds.append(self.bound(budget, warm_up=True, truth_tokens=truth))
        return max(bound.tokens for bound in bounds)


def _end_of_sequence(tokenizer: Any) -> int | None:
    try:
        return tokenizer.eos
    except (AttributeError, NotImplementedError):
        return None
