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

from megatron_rmt.prompt.pieces import PieceEncoder, before_document, leading
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.template import TEMPLATES
from megatron_rmt.prompt.token_bytes import token_bytes
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
            **{"vocab_size": 450, "byte_fallback": True} | options,
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

    # A window from the middle of a document begins with none of its own.
    window, _ = prompt.before(prompt.encode(DOCUMENT))
    assert leading(begin, window) == (len(begin) if prompt.template.head else 0)
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
            # A unigram model has "#", "##" and "##", "#" for as likely, and rounding chooses.
            assert sorted(ids) == sorted(whole[ends[place] : ends[limit]])
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


def test_megatrons_sft_tokenizer_puts_its_begin_token_before_no_piece_but_the_first(tmp_path: Path):
    fast = _adds(byte_level_bpe(), (BEGIN,))
    fast.save_pretrained(tmp_path)
    tokenizer = MegatronTokenizer.from_pretrained(
        str(tmp_path), metadata_path={"library": "sft"}, prompt_format="default"
    )
    prompt = _prompt(tokenizer, "rpt")
    assert prompt.preamble.index(fast.bos_token_id) == 0
    pieces = [*prompt.preamble[1:], *prompt.stem(3), *prompt.close, *prompt.encode("It")]
    assert fast.bos_token_id not in pieces


def _with(begin: Sequence[str], **options: Any) -> PieceEncoder:
    """An encoder of single characters, of which "^" and "~" may begin a text."""
    bytes_of = [bytes([byte]) if byte not in b"^~" else b"" for byte in range(128)]
    ids = tuple(map(ord, begin))
    return PieceEncoder(lambda text: list(text.encode()), bytes_of, ids, **options)


@pytest.mark.parametrize(
    ("options", "head", "expected"),
    [
        ({}, "Head", "Head"),
        ({"opens_texts": True}, "Head", "^Head"),
        ({}, "^Head", "^Head"),
        ({"opens_texts": True}, "^^He^ad", "^Head"),
        ({}, "He^ad", "^Head"),
        ({"opens_texts": True}, "", ""),
        # Of chat templates that open their turns with it.
        ({"opens_texts": True, "marks_turns": True}, "^user ^you", "^user ^you"),
        ({"opens_texts": True, "marks_turns": True}, "user ^you", "^user ^you"),
    ],
)
def test_the_begin_token_of_a_head(options: dict[str, bool], head: str, expected: str):
    encoder = _with("^", **options)
    assert bytes(encoder.first(head)).decode() == expected
    inside = head if options.get("marks_turns") else head.replace("^", "")
    assert bytes(encoder.inside(head)).decode() == inside


def test_what_begins_a_text_may_be_several_tokens():
    encoder = _with("~^", opens_texts=True)
    for head in ("Head", "^Head", "~^Head", "~^~^Head"):
        assert bytes(encoder.first(head)) == b"~^Head"


@pytest.mark.parametrize(
    ("preamble", "document", "expected"),
    [
        ("", "text", "text"),
        ("", "^text", "^text"),
        ("", "^^text", "^text"),
        ("Head ", "text", "Head text"),
        ("Head ", "^text", "^Head text"),
        ("Head ", "^^text", "^Head text"),
        ("^Head ", "text", "^Head text"),
        ("^Head ", "^text", "^Head text"),
        # The end of the text, or of a window, is not lost for it.
        ("^Head ", "^", "^Head ^"),
        ("^Head ", "te^xt", "^Head te^xt"),
    ],
)
def test_a_documents_begin_token_gives_way_to_the_heads(
    preamble: str, document: str, expected: str
):
    before, replaced = before_document(preamble.encode(), b"^", document.encode())
    assert bytes(before).decode() + document[replaced:] == expected
    assert len(before) + len(document) - replaced <= len(preamble) + len(document)


def test_documents_of_a_tokenizer_without_begin_token_stay_as_they_are():
    assert before_document([7, 8], (), [1, 1, 2]) == ([7, 8], 0)


def _named(fast: PreTrainedTokenizerFast, directory: Path) -> PieceEncoder:
    fast.save_pretrained(directory)
    tokenizer = _hugging_face(directory)
    return PieceEncoder.of(tokenizer, token_bytes(tokenizer))


def test_a_named_begin_token_counts_unless_it_ends_documents_or_marks_turns(tmp_path: Path):
    """Data may hold it although the tokenizer at hand puts none before a text."""
    fast = _adds(byte_level_bpe(), ())
    begin = fast.bos_token_id
    assert _named(fast, tmp_path / "named").begin == (begin,)
    assert not _named(fast, tmp_path / "named").opens_texts
    fast.chat_template = CHAT.replace("<|im_start|>", BEGIN)
    assert _named(fast, tmp_path / "turns").begin == ()
    fast.chat_template = "{{ 1 / 0 }}"
    assert _named(fast, tmp_path / "broken").begin == (begin,)
    fast.eos_token = BEGIN
    assert _named(fast, tmp_path / "end").begin == ()
    adds = _adds(byte_level_bpe(), (BEGIN,))
    adds.chat_template = CHAT.replace("<|im_start|>", BEGIN)
    encoder = _named(adds, tmp_path / "both")
    assert (encoder.begin, encoder.opens_texts, encoder.marks_turns) == ((begin,), True, True)
