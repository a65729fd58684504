"""Templates as data, and the chat markers that go round them."""

import dataclasses
import json

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_rmt.prompt.template import TEMPLATES, Template, chat_template, load_template
from tests.tiny_tokenizer import build_tokenizer

BOXED = TEMPLATES["raw"]
NEXT = TEMPLATES["inline"]

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
    return build_tokenizer()


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
