"""Prompt templates as data, and how a response is read.

One prompt is `head` + document prefix + `stem`; the model answers with a thought, the marker
`close`, and the answer. Documents are shared between positions (the trunk), stems between the
rollouts of a position, so that `head` must not depend on the budget.

A response is read twice. While tokens are generated, `ResponseGrammar` follows all rows with one
table look-up a step. Afterwards `read_response` reads each response's length and prediction from
its bytes. Both obey the same rules:

- the thought ends with the first occurrence of `close`; what the closing token holds beyond the
  marker belongs to the answer;
- a "boxed" answer is the content of the first `\\boxed{...}` after the marker, its braces balanced
  and at most 8 deep (a backslash does not escape a brace); it is complete at the closing brace, or
  when it nests deeper (then it cannot be read);
- a "next" answer is the text right after the marker, as far as tokens are allowed;
- an end token ends the response in any state.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from megatron_rmt.rewards import prefix_match_reward

BUDGET = "{budget}"
BOX = b"\\boxed{"
MAXIMUM_BOX_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt template.

    Attributes:
        name: what it is called on the command line.
        head: text before the document; may be empty.
        stem: text after the document's prefix; holds `{budget}`. The token that follows it is the
            first of the thought.
        close: the text that ends a thought.
        answer: "boxed" or "next" (see the module's docstring).

    Raises:
        ValueError: a field cannot be used.
    """

    name: str
    head: str
    stem: str
    close: str
    answer: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise ValueError(f"template field {field.name} is {value!r}; pass a string")
        if BUDGET not in self.stem:
            raise ValueError(f"template {self.name!r} has no {BUDGET} in its stem; add it there")
        if BUDGET in self.head:
            raise ValueError(
                f"template {self.name!r} has {BUDGET} in its head, which all budgets share; "
                "move it to the stem"
            )
        if not self.close:
            raise ValueError(f"template {self.name!r} has an empty close; pass the end marker")
        if self.answer not in ("boxed", "next"):
            raise ValueError(
                f"template {self.name!r} has answer {self.answer!r}; pass 'boxed' or 'next'"
            )

    def stem_text(self, budget: int) -> str:
        """The stem with the budget filled in."""
        return self.stem.replace(BUDGET, str(budget))

    def match(self, prediction: bytes, continuation: bytes, boundaries: Sequence[int]) -> float:
        """`rewards.prefix_match_reward`, lenient towards white space in a box.

        A true token often starts with a space, while a model writes `\\boxed{the}`. So a boxed
        prediction that does not match as it is gets a second try, stripped of white space and
        against the continuation without the white space that opens its first token. A first token
        of nothing but white space has to be predicted as it is: the text behind it is not the next
        token.

        Args:
            prediction: `Response.prediction`.
            continuation: bytes of the true text from the predicted position on.
            boundaries: cumulative byte lengths of the continuation's tokens, ascending.

        Returns:
            1.0 or 0.0.
        """
        match = prefix_match_reward(prediction, continuation, boundaries)
        if match or self.answer != "boxed":
            return match
        stripped = continuation.lstrip()
        removed = len(continuation) - len(stripped)
        if not boundaries or removed >= boundaries[0]:
            return 0.0
        shifted = [boundary - removed for boundary in boundaries]
        return prefix_match_reward(prediction.strip(), stripped, shifted)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # RPT's form (arXiv 2506.08007): the task first, the document under a heading.
        Template(
            name="rpt",
            head=(
                'The text under "### Context" breaks off. Find out how it goes on: predict its '
                "very next token. First reason step by step between <think> and </think> about "
                "what the text says and which continuations are plausible; you are told below how "
                "long to think. Then write your prediction, and nothing but it, in \\boxed{}.\n\n"
                "### Context\n"
            ),
            stem=(
                "\n\n### Prediction\n"
                "Use exactly {budget} tokens of thought, then give the next token of the context "
                "in \\boxed{}.\n"
                "<think>\n"
            ),
            close="</think>",
            answer="boxed",
        ),
        # Nothing before the document, so that the trunk is the raw text.
        Template(
            name="raw",
            head="",
            stem=(
                "\n\n### Prediction\n"
                "The text above breaks off. Predict its very next token: reason step by step "
                "between <think> and </think>, with exactly {budget} tokens of thought, then write "
                "the token, and nothing but it, in \\boxed{}.\n"
                "<think>\n"
            ),
            close="</think>",
            answer="boxed",
        ),
        # Our deviation from the paper, for small base models: they do not follow an instruction
        # (1 % of SmolLM2-135M's answers in the paper's form are well formed), but they go on with
        # a text that a short thought interrupts. The answer is the text after the thought.
        Template(
            name="inline",
            head="",
            stem="<think budget={budget}>",
            close="</think>",
            answer="next",
        ),
    )
}


def load_template(name_or_path: str) -> Template:
    """A built-in template, or one from a JSON file with the fields of `Template`.

    Raises:
        ValueError: neither a built-in name nor a readable file with exactly these fields.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"template {name_or_path!r} is neither a file nor one of {', '.join(TEMPLATES)}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"template file {name_or_path} is not JSON in UTF-8: {error}") from None
    expected = [field.name for field in dataclasses.fields(Template)]
    if not isinstance(fields, dict) or sorted(fields) != sorted(expected):
        raise ValueError(
            f"template file {name_or_path} must be one object with exactly the fields "
            f"{', '.join(expected)}"
        )
    return Template(**fields)


def chat_template(template: Template, tokenizer: Any | None) -> Template:
    """The template with the chat markers of a Hugging Face tokenizer around it.

    The instruction becomes a user's turn and the thought opens the assistant's. With a head, head
    and document and instruction are the user's turn. Without one the document stays raw text and
    the user's turn, which then holds the instruction only, follows it (a begin-of-text token that
    merely opens the chat is dropped there). The stem's last opening tag (`<think>` for the close
    `</think>`) and what follows belong to the assistant; where the chat template opens the thought
    itself, they are not repeated.

    Returned unchanged: templates with the answer "next", whose answer continues the text, and any
    template if the tokenizer is None or has no chat template.

    Raises:
        ValueError: the tokenizer's chat template alters or repeats the user's text.
    """
    if template.answer == "next" or not getattr(tokenizer, "chat_template", None):
        return template
    tag = template.close.replace("</", "<", 1)
    cut = template.stem.rfind(tag)
    cut = len(template.stem) if cut < 0 else cut
    instruction, opening = template.stem[:cut], template.stem[cut:]

    document = "[[the document]]"
    content = template.head + document + instruction if template.head else instruction.strip()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    landmark = document if template.head else instruction.strip()
    if rendered.count(landmark) != 1:
        raise ValueError(
            f"the tokenizer's chat template does not keep the user's text as it is; use template "
            f"{template.name!r} without chat markers"
        )
    if opening and rendered.rstrip().endswith(tag):
        opening = ""
    if template.head:
        head, stem = rendered.split(document)
    else:
        head, stem = "", rendered
        begin = getattr(tokenizer, "bos_token", None)
        if begin and stem.startswith(begin) and stem.count(begin) == 1:
            stem = stem.removeprefix(begin)
    return dataclasses.replace(template, head=head, stem=stem + opening)


def _search_table(pattern: bytes) -> np.ndarray:
    """Knuth-Morris-Pratt as a table: [len(pattern), 256] -> bytes of the pattern matched so far."""
    table = np.zeros((len(pattern), 256), dtype=np.int32)
    for matched in range(len(pattern)):
        for byte in range(256):
            seen = pattern[:matched] + bytes([byte])
            table[matched, byte] = next(
                length for length in range(len(seen), -1, -1) if seen.endswith(pattern[:length])
            )
    return table


def _byte_automaton(template: Template) -> tuple[np.ndarray, int]:
    """Transitions [states, 256] over bytes, and how many states, from 0 on, are in the thought.

    States in order: progress in `close`; progress in `\\boxed{` and depth 1 to 8 in the box, or the
    one state of a "next" answer; done.
    """
    close = template.close.encode()
    answer = len(close)
    answer_states = len(BOX) + MAXIMUM_BOX_DEPTH if template.answer == "boxed" else 1
    done = answer + answer_states
    table = np.empty((done + 1, 256), dtype=np.int32)
    # A complete match of `close` leads to the state after its last, which opens the answer.
    table[:answer] = _search_table(close)
    table[done] = done
    if template.answer == "next":
        table[answer] = answer
        return table, answer
    box = answer + len(BOX)
    table[answer:box] = answer + _search_table(BOX)
    for state in range(box, done):
        table[state] = state
        # One brace deeper than the last depth is `done` as well.
        table[state, ord("{")] = state + 1
        table[state, ord("}")] = state - 1 if state > box else done
    return table, answer


class ResponseGrammar:
    """A token-level automaton that follows responses while they are generated.

    `state = grammar.next_state[state, token]` advances all rows; a row starts at `grammar.start`.
    A token without bytes leaves the state as it is.

    Attributes:
        next_state: int32 [states, vocab].
        start: the state before the first token.
        thinking: bool [states], the thought is open.
        done: bool [states], the answer is complete or an end token came. A "next" answer is only
            ended by an end token here: the caller counts its tokens.

    Args:
        template: what `close` and the answer look like.
        token_bytes: bytes of each token id, b"" for special tokens.
        end_token_ids: tokens that end a response.

    Raises:
        ValueError: an end token lies outside the vocabulary.
    """

    def __init__(
        self, template: Template, token_bytes: list[bytes], end_token_ids: Sequence[int]
    ) -> None:
        _check_end_tokens(end_token_ids, len(token_bytes))
        by_byte, answer = _byte_automaton(template)
        states = len(by_byte)
        lengths = np.array([len(token) for token in token_bytes])
        # Longest first: the tokens that have a byte in some column are the first ones.
        order = np.argsort(-lengths, kind="stable")
        ends = np.cumsum(lengths)
        starts = (ends - lengths)[order]
        text = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)
        by_token = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(token_bytes), axis=1)
        for column in range(lengths.max(initial=0)):
            longer = np.count_nonzero(lengths > column)
            byte = text[starts[:longer] + column]
            by_token[:, :longer] = by_byte[by_token[:, :longer], byte]
        next_state = np.empty_like(by_token)
        next_state[:, order] = by_token
        next_state[:, list(end_token_ids)] = states - 1

        self.start = 0
        self.next_state = torch.from_numpy(next_state)
        self.thinking = torch.arange(states) < answer
        self.done = torch.arange(states) == states - 1

    def to(self, device: torch.device | str) -> Self:
        """The same grammar with its tensors on `device`."""
        moved = copy.copy(self)
        moved.next_state = self.next_state.to(device)
        moved.thinking = self.thinking.to(device)
        moved.done = self.done.to(device)
        return moved


def _check_end_tokens(end_token_ids: Sequence[int], vocabulary: int) -> None:
    for token in end_token_ids:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"end_token_ids holds {token}, outside the vocabulary of {vocabulary} tokens"
            )


@dataclasses.dataclass(frozen=True)
class Response:
    """What was read from a response.

    Attributes:
        thought_length: tokens that begin before the first byte of `close` (one that straddles it
            counts); all tokens before the end token if the thought was never closed.
        closed: the thought was closed.
        well_formed: closed, and a prediction of at least one byte could be read.
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
        answer_tokens: tokens after the closing one that may belong to the answer.

    Raises:
        ValueError: answer_tokens is below 1.
    """
    if answer_tokens < 1:
        raise ValueError(f"answer_tokens is {answer_tokens}; pass at least 1")
    end_tokens = set(end_token_ids)
    pieces: list[bytes] = []
    for token in tokens:
        if token in end_tokens:
            break
        pieces.append(token_bytes[token])
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
    answer_end = sum(map(len, pieces[: closing + 1 + answer_tokens]))
    prediction = text[answer_start:answer_end]
    if template.answer == "boxed":
        prediction = _boxed(prediction)
    return Response(thought_length, True, len(prediction) > 0, prediction)


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
