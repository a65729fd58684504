"""Templates as data, and the chat markers that go round them."""

import dataclasses
import json
from pathlib import Path

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
        ({"close": "x" * 257}, "close of 257 bytes; pass an end marker of at most 256"),
        ({"answer": "json"}, "answer 'json'; pass 'boxed' or 'next'"),
        ({"head": None}, "field head is None; pass a string"),
        ({"head": "\ud800"}, "field head holds half of a surrogate pair"),
        ({"stem": "{budget}\udfff"}, "field stem holds half of a surrogate pair"),
        ({"close": "</\ud800>"}, "field close holds half of a surrogate pair"),
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
        (json.dumps({**dataclasses.asdict(BOXED), "close": ""}), r"template file .* empty close"),
        (json.dumps({**dataclasses.asdict(BOXED), "stem": "\ud800{budget}"}), "surrogate"),
        ("[" * 100_000, "is not JSON"),
        ("\ufeff[]", "is not JSON"),
        ('{"name": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_bad_template_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_template(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rtp", "", "."])
def test_unknown_template_names_are_refused(name):
    with pytest.raises(ValueError, match="neither a file nor one of rpt, raw, inline"):
        load_template(name)


def test_a_template_name_that_the_system_cannot_take_is_refused_in_short():
    with pytest.raises(
        ValueError, match=r"template file x+\.\.\. cannot be read: File name"
    ) as caught:
        load_template("x" * 5000)
    assert len(str(caught.value)) < 300


def test_a_template_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (tmp_path / "own.json").touch()
    with pytest.raises(ValueError, match=r"own.json cannot be read: Permission denied"):
        load_template(str(tmp_path / "own.json"))


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


# What chat templates do to a lone user's turn; each with a part of what they say.
BROKEN = {
    "{{ raise_exception('Give me \n tools') }}": "TemplateError: Give me tools",
    "{{ tools | length }}" + TRIMMING: "TypeError",
    "{% if %}" + TRIMMING: "TemplateSyntaxError",
    "{{ no_such_thing(messages) }}": "UndefinedError: 'no_such_thing' is undefined",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ messages[7]['content'] }}": "UndefinedError",
}


@pytest.mark.parametrize("name", ["rpt", "raw"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_chat_template_that_cannot_be_rendered_is_refused_with_what_it_says(
    tokenizer, name, broken
):
    tokenizer.chat_template, tokenizer.name_or_path = broken, "some/tokenizer"
    with pytest.raises(ValueError, match="pass --rmt-no-chat") as caught:
        chat_template(TEMPLATES[name], tokenizer)
    assert f"tokenizer some/tokenizer cannot be rendered, it says {BROKEN[broken]}" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_several_chat_templates_of_which_none_is_the_default_are_refused(tokenizer):
    tokenizer.chat_template = {"tool_use": TRIMMING, "rag": TRIMMING}
    with pytest.raises(
        ValueError, match=r"cannot be rendered, it says ValueError: .*pass --rmt-no"
    ):
        chat_template(BOXED, tokenizer)


@pytest.mark.parametrize("name", ["rpt", "raw"])
def test_a_chat_template_that_asks_for_a_system_turn_gets_one(tokenizer, name):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' or not messages[0]['content'] %}"
        "{{ raise_exception('A system message is needed') }}{% endif %}" + TRIMMING
    )
    chat = chat_template(TEMPLATES[name], tokenizer)
    opened = chat.head if TEMPLATES[name].head else chat.stem
    assert "<|system|>\nYou are a helpful assistant.<|end|><|user|>\n" in opened
    tokenizer.chat_template = TRIMMING
    assert chat_template(TEMPLATES[name], tokenizer).head == chat.head.replace(
        "<|system|>\nYou are a helpful assistant.<|end|>", ""
    )


def test_a_chat_template_that_writes_no_text_is_refused(tokenizer):
    tokenizer.chat_template = TRIMMING + "{{ '\ud800' }}"
    with pytest.raises(ValueError, match="surrogate pair"):
        chat_template(BOXED, tokenizer)
