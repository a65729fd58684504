"""A prompt put together from pieces is the prompt encoded as one text, for tokenizers of all kinds.

The documented differences: no token reaches over the end of a piece, and a document behind a head
keeps the dummy space that its tokenizer puts before a text.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_rmt.prompt.pieces import leading
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.template import TEMPLATES
from tests.test_token_bytes import LINES, byte_level_bpe, metaspace_unigram

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGIN = "<s>"
DOCUMENT, THOUGHT = "Half of 84 is 42, naïve café: 数", "Anna buys three."


def _adds(tokenizer: PreTrainedTokenizerFast, before: Sequence[str], after: Sequence[str] = ()):
    """The tokenizer, which puts these special tokens round a text."""
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": "</s>"})
    tokenizer.add_tokens(["<|im_start|>", *before], special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in {*before, *after}],
    )
    return tokenizer


def _prefix_space() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _always() -> PreTrainedTokenizerFast:
    tokenizer = metaspace_unigram()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def _llama_2() -> PreTrainedTokenizerFast:
    tokenizer = metaspace_unigram()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def _no_dummy() -> PreTrainedTokenizerFast:
    tokenizer = metaspace_unigram()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return tokenizer


FAST: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level_bpe,
    "byte-level with prefix space": _prefix_space,
    "Metaspace, first": metaspace_unigram,
    "Metaspace, always": _always,
    "Metaspace, never": _no_dummy,
    "Llama 2": _llama_2,
}
ADDED = {
    "none": ((), ()),
    "begin": ((BEGIN,), ()),
    "two": (("<g>", "<s>"), ()),
    "end": ((), ("</s>",)),
}
SENTENCEPIECE = {
    "dummy prefix": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "no byte fallback": {"byte_fallback": False, "character_coverage": 1.0},
    "bpe": {"model_type": "bpe"},
}


def _sentencepiece(directory: Path, **options: Any) -> Path:
    path = directory / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                [*LINES, "0123456789", *[DOCUMENT, *map(_all_text, TEMPLATES)] * 2]
            ),
            model_writer=file,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
            **{"vocab_size": 420, "byte_fallback": True} | options,
        )
    return path


def _all_text(name: str) -> str:
    template = TEMPLATES[name]
    return template.head + template.stem + template.close + "\n\\boxed{}"


def _hugging_face(directory: Path, **config: Any) -> Any:
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return MegatronTokenizer.from_pretrained(
        str(directory), metadata_path={"library": "huggingface"}
    )


def _llama(directory: Path, **config: Any) -> Any:
    """``tokenizer.model`` alone, by the class that the configuration names."""
    _sentencepiece(directory)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named["add_bos_token"] = True
    return _hugging_face(directory, **named | config)


def _prompt(tokenizer: Any, template: str, chat: bool = True) -> Prompt:
    return Prompt.of(tokenizer, template, chat=chat, answer_tokens=4, force_close=False)


def _check(tokenizer: Any, prompt: Prompt, begin: tuple[int, ...]) -> None:
    """The assembled prompt against its text encoded as one.

    begin: what the prompt is expected to begin with.
    """
    inner = tokenizer._tokenizer.tokenizer
    literal = [
        text or inner.convert_ids_to_tokens(token).encode()
        if hasattr(inner, "name_or_path")
        else text
        for token, text in enumerate(prompt.bytes_of)
    ]

    def encode(text: str) -> list[int]:
        if hasattr(inner, "name_or_path"):
            return inner.encode(text, add_special_tokens=False)
        return tokenizer.tokenize(text)

    def joined(ids: Sequence[int]) -> bytes:
        return b"".join(literal[token] for token in ids)

    # As tools/preprocess_data.py writes it, without the end.
    document = tokenizer.tokenize(DOCUMENT)
    document = document[: -1 if document[-1] == tokenizer.eod else None]
    before, replaced = prompt.before(document)
    stem, thought = prompt.stem(7), prompt.encode(THOUGHT)
    answer = prompt.encode("\n\\boxed{ 42}")
    pieces = [before, document[replaced:], stem, thought, prompt.close, answer]
    assembled = [token for piece in pieces for token in piece]

    opened = leading(begin, assembled)
    assert opened == len(begin)
    if begin:
        rest = assembled[opened:]
        assert not any(leading(begin, rest[at:]) for at in range(len(rest)))

    template = prompt.template
    texts = [template.head, DOCUMENT, template.stem_text(7), THOUGHT, template.close]
    texts.append("\n\\boxed{ 42}")
    # Of chat templates that write the begin token, as transformers has it: once.
    texts = [text.replace(BEGIN, "") if begin else text for text in texts]
    whole = encode("".join(texts))
    expected = joined(whole)
    assert expected.replace(b" ", b"") == "".join(texts).replace(" ", "").encode()
    ends = {0: 0} | {len(joined(whole[:end])): end for end in range(1, len(whole) + 1)}
    dummy = joined(encode("x")).removesuffix(b"x")
    place, compared = 0, 0
    for number, piece in enumerate(pieces):
        ids = piece[leading(begin, piece) :]
        own = joined(ids)
        if number == 1 and place:
            # Behind a head the document keeps the dummy space of its data.
            own = own.removeprefix(dummy)
        if pieces[number - 1] == prompt.close and expected[place:].startswith(dummy + own):
            # Some tokenizers put one behind every added token, which the end of thought is here.
            place += len(dummy)
        limit = place + len(own)
        assert expected[place:limit] == own
        if number != 1 and place in ends and limit in ends:
            assert ids == whole[ends[place] : ends[limit]]
            compared += bool(own)
        place = limit
    assert place == len(expected)
    assert compared >= 2


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", ["none", "markers", "begin token and markers"])
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("kind", FAST)
def test_pieces_of_fast_tokenizers(kind: str, added: str, chat: str, name: str, tmp_path: Path):
    fast = _adds(FAST[kind](), *ADDED[added])
    fast.chat_template = {
        "none": None,
        "markers": CHAT,
        "begin token and markers": "{{ bos_token }}" + CHAT,
    }[chat]
    fast.save_pretrained(tmp_path)
    tokenizer = _hugging_face(tmp_path)
    prompt = _prompt(tokenizer, name)
    begin = tuple(fast.convert_tokens_to_ids(ADDED[added][0]))
    if not begin and chat == "begin token and markers" and name == "rpt":
        begin = (fast.bos_token_id,)
    _check(tokenizer, prompt, begin)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_pieces_of_sentencepiece_models(kind: str, name: str, tmp_path: Path):
    path = _sentencepiece(tmp_path, **SENTENCEPIECE[kind])
    tokenizer = MegatronTokenizer.from_pretrained(
        str(path), metadata_path={"library": "sentencepiece"}
    )
    _check(tokenizer, _prompt(tokenizer, name), ())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False},
    ],
    ids=["legacy", "current", "fast", "no begin token"],
)
def test_pieces_of_llamas_classes(config: dict[str, Any], name: str, tmp_path: Path):
    tokenizer = _llama(tmp_path, **config)
    begin = (tokenizer.bos,) if config.get("add_bos_token", True) else ()
    _check(tokenizer, _prompt(tokenizer, name), begin)
