"""Templates, the automaton that follows responses, and how responses are read."""

import dataclasses
import json
import random
import time

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_rmt.prompt.grammar import ResponseGrammar
from megatron_rmt.prompt.response import Response, read_response
from megatron_rmt.prompt.template import TEMPLATES, Template, chat_template, load_template
from megatron_rmt.prompt.token_bytes import token_bytes

BOXED = TEMPLATES["raw"]
NEXT = TEMPLATES["inline"]

# Pieces of responses, right and wrong, as a model may write them.
PIECES = [
    "Let us see. The sum is 42",
    " so the text goes on with é",
    "</think>",
    "</thi",
    "<</think>",
    "nk>",
    "<",
    "</",
    "\\boxed{",
    "\\boxed{the}",
    "\\boxed{}",
    "\\boxed{ the}",
    "\\boxed{\\frac{1}{2}}",
    "\\boxed{" + "{" * 7 + "x" + "}" * 8,
    "\\boxed{" + "{" * 8 + "x" + "}" * 9,
    "\\bo",
    "\\\\boxed{a}",
    "{",
    "}",
    "}}",
    "\n",
    " the",
]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OPENS_THE_THOUGHT = TRIMMING.replace("<|assistant|>\n", "<|assistant|><think>\n")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross the markers' ends (no splitting before training)."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    generator = random.Random(0)
    lines = ["".join(generator.choices(PIECES, k=6)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.fixture(scope="module")
def table(tokenizer) -> list[bytes]:
    return token_bytes(tokenizer)


def read(pieces: list[bytes], template: Template, answer_tokens: int = 4) -> Response:
    """`read_response` of a response cut into these tokens; None is the end token."""
    vocabulary = [*dict.fromkeys(p for p in pieces if p is not None), b"<end>"]
    tokens = [vocabulary.index(b"<end>" if p is None else p) for p in pieces]
    return read_response(tokens, template, vocabulary, [len(vocabulary) - 1], answer_tokens)


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


# Templates as data


def test_built_in_templates_hold_what_they_must():
    assert set(TEMPLATES) == {"rpt", "raw", "inline"}
    for name, template in TEMPLATES.items():
        assert template.name == name
        assert template.close == "</think>"
        assert "<think" in template.stem
        assert "800" in template.stem_text(800)
        assert "{budget}" not in template.stem_text(800)
    assert TEMPLATES["rpt"].head.endswith("### Context\n")
    assert TEMPLATES["raw"].head == TEMPLATES["inline"].head == ""
    assert [t.answer for t in TEMPLATES.values()] == ["boxed", "boxed", "next"]
    assert NEXT.stem_text(7) == "<think budget=7>"
    # Filling in the budget leaves other braces alone.
    assert "\\boxed{}" in TEMPLATES["rpt"].stem_text(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": "<think>"}, "has no {budget} in its stem"),
        ({"head": "{budget} tokens: "}, "has {budget} in its head"),
        ({"close": ""}, "empty close"),
        ({"answer": "json"}, "answer 'json'; pass 'boxed' or 'next'"),
        ({"head": None}, "field head is None; pass a string"),
    ],
)
def test_unusable_templates_are_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        dataclasses.replace(BOXED, **change)


def test_templates_load_by_name_and_from_a_file(tmp_path):
    assert load_template("rpt") is TEMPLATES["rpt"]
    own = Template("own", "Text: ", " ({budget}) <t>", "</t>", "boxed")
    path = tmp_path / "own.json"
    path.write_text(json.dumps(dataclasses.asdict(own)))
    assert load_template(str(path)) == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "exactly the fields name, head, stem, close, answer"),
        ('{"name": "x"}', "exactly the fields"),
        (json.dumps({**dataclasses.asdict(BOXED), "extra": ""}), "exactly the fields"),
        (json.dumps({**dataclasses.asdict(BOXED), "close": ""}), "empty close"),
    ],
)
def test_bad_template_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_template(str(path))


def test_unknown_template_names_are_refused():
    with pytest.raises(ValueError, match="neither a file nor one of rpt, raw, inline"):
        load_template("rtp")


# Chat markers


def test_chat_markers_surround_head_document_and_instruction(tokenizer):
    tokenizer.chat_template = CHATML
    rpt = TEMPLATES["rpt"]
    chat = chat_template(rpt, tokenizer)
    begin = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    instruction = rpt.stem.removesuffix("<think>\n")
    assert chat.head == begin + rpt.head
    assert chat.stem == f"{instruction}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert (chat.name, chat.close, chat.answer) == ("rpt", "</think>", "boxed")


def test_chat_markers_of_a_template_without_head_follow_the_document(tokenizer):
    tokenizer.chat_template = CHATML
    chat = chat_template(BOXED, tokenizer)
    instruction = BOXED.stem.removesuffix("<think>\n").strip()
    assert chat.head == ""
    assert chat.stem == (
        f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_a_begin_token_is_kept_before_the_head_and_dropped_after_the_document(tokenizer):
    tokenizer.chat_template = TRIMMING.replace("bos_token", "'<|endoftext|>'")
    tokenizer.bos_token = "<|endoftext|>"
    try:
        assert chat_template(TEMPLATES["rpt"], tokenizer).head.startswith("<|endoftext|><|user|>\n")
        assert chat_template(BOXED, tokenizer).stem.startswith("<|user|>\n")
    finally:
        tokenizer.bos_token = "<|im_start|>"


@pytest.mark.parametrize("name", ["rpt", "raw"])
def test_a_thought_that_the_chat_template_opens_is_not_opened_twice(tokenizer, name):
    tokenizer.chat_template = OPENS_THE_THOUGHT
    stem = chat_template(TEMPLATES[name], tokenizer).stem
    assert stem.endswith("<|end|><|assistant|><think>\n")
    tokenizer.chat_template = TRIMMING
    assert chat_template(TEMPLATES[name], tokenizer).stem == stem.replace(
        "<|assistant|><think>\n", "<|assistant|>\n<think>\n"
    )


def test_no_chat_markers_where_there_are_none_or_the_answer_continues_the_text(tokenizer):
    tokenizer.chat_template = CHATML
    assert chat_template(NEXT, tokenizer) is NEXT
    assert chat_template(BOXED, None) is BOXED
    tokenizer.chat_template = None
    assert chat_template(BOXED, tokenizer) is BOXED


@pytest.mark.parametrize("content", ["m['content'] | upper", "m['content'] + m['content']"])
@pytest.mark.parametrize("name", ["rpt", "raw"])
def test_a_chat_template_that_alters_the_text_is_refused(tokenizer, name, content):
    tokenizer.chat_template = TRIMMING.replace("m['content'] | trim", content)
    with pytest.raises(ValueError, match="does not keep the user's text"):
        chat_template(TEMPLATES[name], tokenizer)


# Reading a response


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


def test_a_box_must_fit_into_the_answer_tokens():
    pieces = [b"a", b"</think>", b"\\boxed{", b"x", b"}"]
    assert read(pieces, BOXED, answer_tokens=3).prediction == b"x"
    assert not read(pieces, BOXED, answer_tokens=2).well_formed
    with pytest.raises(ValueError, match="answer_tokens is 0"):
        read(pieces, BOXED, answer_tokens=0)


def test_boxes_nest_up_to_depth_8():
    def nested(depth: int) -> bytes:
        return b"{" * (depth - 1) + b"x" + b"}" * (depth - 1)

    for depth in range(1, 9):
        text = b"</think>\\boxed{" + nested(depth) + b"}"
        assert read([text], BOXED) == Response(0, True, True, nested(depth))
    assert read([b"</think>\\boxed{" + nested(9) + b"}"], BOXED) == Response(0, True, False, b"")


# The match


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (b" the", 1.0),
        (b" the cat", 1.0),
        (b"the", 1.0),
        (b"the cat", 1.0),
        (b" the \n", 1.0),
        (b"th", 0.0),
        (b"cat", 0.0),
        (b"", 0.0),
        (b" ", 0.0),
    ],
)
def test_a_boxed_match_forgives_white_space_at_the_ends(prediction, expected):
    assert BOXED.match(prediction, b" the cat", (4, 8)) == expected


def test_a_next_match_is_exact():
    assert NEXT.match(b" the", b" the cat", (4, 8)) == 1.0
    assert NEXT.match(b"the", b" the cat", (4, 8)) == 0.0
    assert NEXT.match(b" the ", b" the cat", (4, 8)) == 0.0


def test_a_token_of_white_space_cannot_be_skipped():
    # Tokens "\n\n", "The": the next token is the line break.
    assert BOXED.match(b"The", b"\n\nThe", (2, 5)) == 0.0
    assert BOXED.match(b"\n\n", b"\n\nThe", (2, 5)) == 1.0
    assert BOXED.match(b"\n\nThe", b"\n\nThe", (2, 5)) == 1.0
    assert BOXED.match(b"x", b"", ()) == 0.0


# The automaton


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
    grammar = ResponseGrammar(BOXED, table, [0]).to("cpu")
    rows = [tokenizer.encode(t) for t in ("so</think>\\boxed{a}", "so</think> no", "hmm")]
    state = torch.full((3,), grammar.start)
    for step in range(max(map(len, rows))):
        token = torch.tensor([row[step] if step < len(row) else 1 for row in rows])
        state = grammar.next_state[state, token]
    assert grammar.thinking[state].tolist() == [False, False, True]
    assert grammar.done[state].tolist() == [True, False, False]


def test_moving_a_grammar_leaves_the_original_where_it_is(table):
    grammar = ResponseGrammar(NEXT, table, [0])
    moved = grammar.to("meta")
    assert moved.next_state.device.type == moved.thinking.device.type == "meta"
    assert moved.done.device.type == "meta"
    assert moved.start == grammar.start
    assert grammar.next_state.device.type == "cpu"


def test_a_large_vocabulary_builds_in_seconds():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 14, 152_000)
    lengths[:10] = 128
    vocabulary = [generator.bytes(length) for length in lengths]
    start = time.process_time()
    grammar = ResponseGrammar(BOXED, vocabulary, [7])
    assert time.process_time() - start < 10
    assert grammar.next_state.shape == (24, 152_000)


@pytest.mark.parametrize("end_token", [-1, 600, 10**6])
def test_end_tokens_outside_the_vocabulary_are_refused(table, end_token):
    with pytest.raises(ValueError, match=f"end_token_ids holds {end_token}"):
        ResponseGrammar(BOXED, table[:600], [end_token])
