"""The automaton that follows responses, against a reference and against their reader."""

import random
import time

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_rmt.prompt.grammar import ResponseGrammar
from megatron_rmt.prompt.response import read_response
from megatron_rmt.prompt.template import TEMPLATES, Template
from megatron_rmt.prompt.token_bytes import token_bytes
from tests.tiny_tokenizer import PIECES, build_tokenizer

BOXED = TEMPLATES["raw"]
NEXT = TEMPLATES["inline"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def table(tokenizer) -> list[bytes]:
    return token_bytes(tokenizer)


def reference_state(text: bytes, ended: bool, template: Template) -> tuple[bool, bool]:
    """(thinking, done) of a response, byte by byte and with a stack."""
    close = template.close.encode()
    if ended:
        return False, True
    if close not in text:
        return True, False
    answer = text.split(close, 1)[1]
    if template.answer == "next" or b"\\boxed{" not in answer:
        return False, False
    stack = ["{"]
    for byte in answer.split(b"\\boxed{", 1)[1]:
        if byte == ord("{"):
            stack.append("{")
        if byte == ord("}"):
            stack.pop()
        if not stack or len(stack) > 8:
            return False, True
    return False, False


def test_the_grammar_starts_in_a_thought_and_has_states_of_each_kind(table):
    for template in TEMPLATES.values():
        grammar = ResponseGrammar(template, table, [0, 2])
        states = len(grammar.thinking)
        assert grammar.next_state.shape == (states, len(table))
        assert grammar.next_state.dtype == torch.int32
        assert grammar.next_state.min() >= 0
        assert grammar.next_state.max() < states
        assert grammar.thinking[grammar.start]
        assert grammar.thinking.sum() == len(template.close)
        assert grammar.done.sum() == 1
        assert not (grammar.thinking & grammar.done).any()
        assert grammar.done[grammar.next_state[:, [0, 2]]].all()
        assert grammar.done[grammar.next_state[grammar.done]].all()


def test_the_grammar_finds_markers_that_a_false_start_precedes():
    letters = [bytes([byte]) for byte in range(256)]
    own = Template("own", "", "{budget}", "aabaaab", "next")
    grammar = ResponseGrammar(own, letters, [])
    generator = random.Random(1)
    for _ in range(300):
        text = bytes(generator.choices(b"aab", k=40))
        state = grammar.start
        for index, byte in enumerate(text):
            state = int(grammar.next_state[state, byte])
            assert grammar.thinking[state] == (b"aabaaab" not in text[: index + 1])


@pytest.mark.parametrize("template", [BOXED, NEXT], ids=["boxed", "next"])
def test_grammar_and_reader_agree_on_tokens_of_real_text(tokenizer, table, template):
    end_tokens = [0, 2]
    grammar = ResponseGrammar(template, table, end_tokens)
    generator = random.Random(2)
    seen = {"thinking": 0, "answering": 0, "done": 0, "well_formed": 0, "straddling": 0}
    for _ in range(400):
        text = "".join(generator.choices(PIECES, k=generator.randint(1, 12)))
        if generator.random() < 0.5:
            # Pieces cut apart: tokens that the tokenizer would not choose.
            cut = generator.randrange(len(text) + 1)
            tokens = tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:])
        else:
            tokens = tokenizer.encode(text)
        if generator.random() < 0.3:
            tokens.insert(generator.randrange(len(tokens) + 1), generator.choice([0, 1, 2]))
        state = grammar.start
        for count, token in enumerate(tokens, 1):
            state = int(grammar.next_state[state, token])
            prefix = tokens[:count]
            ended = any(t in end_tokens for t in prefix)
            alive = prefix[: next((i for i, t in enumerate(prefix) if t in end_tokens), count)]
            written = b"".join(table[t] for t in alive)
            thinking, done = bool(grammar.thinking[state]), bool(grammar.done[state])
            assert (thinking, done) == reference_state(written, ended, template)
            response = read_response(prefix, template, table, end_tokens, 1000)
            assert thinking == (not response.closed and not ended)
            if template.answer == "boxed" and response.well_formed:
                assert done
            if response.closed:
                # The thought's tokens begin before the marker and the next one does not.
                start = written.index(b"</think>")
                offsets = np.cumsum([0, *(len(table[t]) for t in alive)])
                assert response.thought_length == sum(offsets[:-1] < start)
                seen["straddling"] += start not in offsets
            else:
                assert response.thought_length == len(alive)
            seen["thinking"] += thinking
            seen["done"] += done
            seen["answering"] += not thinking and not done
            seen["well_formed"] += response.well_formed
    assert min(seen.values()) > 100, seen


def test_rows_advance_together_with_one_look_up(table, tokenizer):
    grammar = ResponseGrammar(BOXED, table, [0])
    rows = [tokenizer.encode(t) for t in ("so</think>\\boxed{a}", "so</think> no", "hmm")]
    state = torch.full((3,), grammar.start)
    for step in range(max(map(len, rows))):
        token = torch.tensor([row[step] if step < len(row) else 1 for row in rows])
        state = grammar.next_state[state, token]
    assert grammar.thinking[state].tolist() == [False, False, True]
    assert grammar.done[state].tolist() == [True, False, False]


def test_a_grammars_tensors_are_on_its_device(table):
    grammar = ResponseGrammar(NEXT, table, [0], "meta")
    assert grammar.next_state.device.type == grammar.thinking.device.type == "meta"
    assert grammar.done.device.type == "meta"


def test_a_large_vocabulary_builds_in_seconds():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 14, 152_000)
    lengths[:10] = 128
    vocabulary = [generator.bytes(length) for length in lengths]
    start = time.process_time()
    grammar = ResponseGrammar(BOXED, vocabulary, [7])
    assert time.process_time() - start < 10
    assert grammar.next_state.shape == (24, 152_000)


@pytest.mark.parametrize("template", [BOXED, NEXT], ids=["boxed", "next"])
def test_an_answer_after_a_thought_that_the_prompt_has_closed_is_followed_alike(
    template, table, tokenizer
):
    grammar = ResponseGrammar(template, table, [0])
    assert not grammar.thinking[grammar.after_thought]
    assert not grammar.done[grammar.after_thought]
    generator = random.Random(5)
    ends = {False: 0, True: 0}
    for _ in range(200):
        text = "".join(generator.choices(PIECES, k=generator.randint(1, 8)))
        closed = grammar.start
        for token in tokenizer.encode("</think>"):
            closed = int(grammar.next_state[closed, token])
        assert closed == grammar.after_thought
        state = grammar.after_thought
        for token in tokenizer.encode(text):
            state = int(grammar.next_state[state, token])
        written = b"</think>" + text.encode()
        thinking, done = bool(grammar.thinking[state]), bool(grammar.done[state])
        assert (thinking, done) == reference_state(written, False, template)
        ends[done] += 1
    assert ends[False] > 20
    assert (ends[True] > 20) == (template is BOXED)
