"""Whether ids are the text: tokenizers that keep it, that lose it, whose rules are replaced."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rmt.prompt.ids_of_text import CHARACTERS, FIXED_TEXTS, check_ids_are_text
from tests.test_token_bytes import LINES, byte_level_bpe, metaspace_unigram

NUMBERS = [" ".join(map(str, range(1000)))] * 4


def of_bytes(
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    added: tuple[AddedToken, ...] = (),
    without: bytes = b"",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with tokens of several digits, lacking tokens for the bytes ``without``."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.decoder = normalizer, decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizer or byte_level
    lacking = {byte_level.pre_tokenize_str(chr(byte))[0][0][-1] for byte in without}
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=[*{*pre_tokenizers.ByteLevel.alphabet()} - lacking],
        limit_alphabet=256 - len(lacking),
        show_progress=False,
    )
    bpe.train_from_iterator(NUMBERS if without else [*LINES, *NUMBERS], trainer)
    bpe.add_tokens([token for token in added if not token.special])
    bpe.add_special_tokens([token for token in added if token.special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def as_llama_2(added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Its normalizer writes the spaces, and one before every piece of text."""
    tokenizer = metaspace_unigram()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


def pieces(directory: Path, **changes: Any) -> Path:
    """A sentencepiece model as Llama 2 has it, but for the ``changes``."""
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 360,
    }
    path = directory / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            hard_vocab_limit=False,
            minloglevel=2,
            **options | changes,
        )
    return path


def by_megatron(path: Path) -> Any:
    return MegatronTokenizer.from_pretrained(str(path), metadata_path={"library": "sentencepiece"})


KEEPING: dict[str, Callable[[], Any]] = {
    "byte-level, added tokens": byte_level_bpe,
    "Metaspace": metaspace_unigram,
    "Llama 2": as_llama_2,
    "Llama 2, dummy space behind an added token": lambda: as_llama_2(("</think>",)),
    "NFC": lambda: of_bytes(normalizers.NFC()),
    "NFKC": lambda: of_bytes(normalizers.NFKC()),
    "single word": lambda: of_bytes(added=(AddedToken("</think>", single_word=True),)),
    "blanks beside a special token": lambda: of_bytes(
        added=(AddedToken("<mask>", lstrip=True, special=True),)
    ),
    "no tokens for control characters": lambda: of_bytes(without=b"\x04\x06"),
    "prefix space": lambda: of_bytes(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
}


@pytest.mark.parametrize("name", KEEPING)
def test_tokenizers_that_keep_the_text_are_accepted(name: str, tmp_path: Path):
    tokenizer = KEEPING[name]()
    documents = [*LINES, "a </think> b", "a<|end|>b", "▁ is a blank", ""]
    check_ids_are_text(tokenizer, documents)
    tokenizer.save_pretrained(tmp_path)
    check_ids_are_text(AutoTokenizer.from_pretrained(tmp_path), documents)


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"model_type": "unigram"}])
def test_sentencepiece_models_that_keep_the_text_are_accepted(options, tmp_path: Path):
    check_ids_are_text(by_megatron(pieces(tmp_path, **options)), LINES)


LOSING: dict[str, tuple[Callable[[], Any], str]] = {
    "left blanks of an added token": (
        lambda: of_bytes(added=(AddedToken("</think>", lstrip=True),)),
        "'a </think>  b",
    ),
    "right blanks of an added token": (
        lambda: of_bytes(added=(AddedToken("</think>", rstrip=True),)),
        "'a </think>  b",
    ),
    "Strip": (lambda: of_bytes(normalizers.Strip()), "Anna"),
    "Strip on the right": (lambda: of_bytes(normalizers.Strip(left=False)), "end"),
    "Lowercase": (lambda: of_bytes(normalizers.Lowercase()), "Anna"),
    "StripAccents": (
        lambda: of_bytes(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "CAFÉ",
    ),
    "double spaces": (lambda: of_bytes(normalizers.Replace(Regex(" +"), " ")), "Anna"),
    "a byte without a token": (lambda: of_bytes(without=b"\xe6"), "数学"),
    "unknown characters": (
        lambda: without_bytes(metaspace_unigram()),
        "becomes .*<unk>",
    ),
    "spaces cut away": (
        lambda: of_bytes(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
        "Anna",
    ),
}


def without_bytes(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Without byte fallback."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = [(piece, score) for piece, score in model["vocab"]]
    tokenizer.backend_tokenizer.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=False)
    return tokenizer


@pytest.mark.parametrize("name", LOSING)
def test_tokenizers_that_lose_text_are_refused(name: str):
    make, place = LOSING[name]
    who = f"class TokenizersBackend, transformers {transformers.__version__}"
    with pytest.raises(ValueError, match=f"{who}.* do not spell the text: .*{place}"):
        check_ids_are_text(make())


@pytest.mark.parametrize(
    "options", [{"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc_cf"}]
)
def test_sentencepiece_models_that_lose_text_are_refused(options, tmp_path: Path):
    with pytest.raises(ValueError, match="the sentencepiece tokenizer gives ids that do not spell"):
        check_ids_are_text(by_megatron(pieces(tmp_path, **options)))


def test_a_document_whose_text_is_lost_is_refused():
    tokenizer = of_bytes(added=(AddedToken("<|sep|>", rstrip=True, special=True),))
    check_ids_are_text(tokenizer, ["no such token", "or<|sep|>nothing behind it"])
    with pytest.raises(ValueError, match=r"'and <.sep.> a blank' becomes 'and <.sep.>a blank'"):
        check_ids_are_text(tokenizer, ["and <|sep|> a blank"])
    # Only the beginning of a document is read.
    check_ids_are_text(tokenizer, ["x" * CHARACTERS + "<|sep|> a blank"])
    control = of_bytes(without=b"\x04")
    with pytest.raises(ValueError, match=r"'a\\x04b' becomes 'ab'"):
        check_ids_are_text(control, ["a\x04b"])


def as_model(directory: Path, tokenizer: PreTrainedTokenizerFast, model_type: str) -> Any:
    """``tokenizer`` as ``transformers`` reads it beside the configuration of such a model."""
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(directory)


def qwen_2(digits: str) -> pre_tokenizers.PreTokenizer:
    """Its pre-tokenizer, but that numbers are cut by ``digits``."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    ).replace("DIGITS", digits)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def test_rules_that_the_library_replaces_are_refused(tmp_path: Path):
    """Models of type qwen2 get Qwen2's own normalizer and pre-tokenizer, not their file's."""
    own = of_bytes(normalizers.NFC(), qwen_2(r"\p{N}"))
    check_ids_are_text(as_model(tmp_path / "own", own, "qwen2"))
    other = of_bytes(normalizers.NFC(), qwen_2(r"\p{N}{1,3}"))
    check_ids_are_text(as_model(tmp_path / "llama", other, "llama"))
    sentence = r"class Qwen2Tokenizer.* other ids than .*qwen2/tokenizer.json, .* behind '.*' come"
    with pytest.raises(ValueError, match=sentence):
        check_ids_are_text(as_model(tmp_path / "qwen2", other, "qwen2"))
    with pytest.raises(ValueError, match=r"class Qwen2Tokenizer.* do not spell the text"):
        check_ids_are_text(as_model(tmp_path / "blanks", as_llama_2(), "qwen2"))


def test_a_sentencepiece_model_alone_is_the_model_s_own_file(tmp_path: Path):
    pieces(tmp_path)
    for name, content in (
        ("config.json", {"model_type": "llama"}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    check_ids_are_text(AutoTokenizer.from_pretrained(tmp_path), LINES)
    # What the class takes for BPE is another kind of model.
    pieces(tmp_path, model_type="unigram")
    with pytest.raises(ValueError, match=r"LlamaTokenizer.* other ids than .*tokenizer\.model"):
        check_ids_are_text(AutoTokenizer.from_pretrained(tmp_path), LINES)


def test_truncation_and_padding_that_a_file_describes_do_not_matter(tmp_path: Path):
    tokenizer = of_bytes()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=32)
    tokenizer.save_pretrained(tmp_path)
    check_ids_are_text(AutoTokenizer.from_pretrained(tmp_path), LINES)


def test_the_fixed_texts_hold_every_byte_that_scripts_have():
    printed = {*range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}
    assert printed | {*b"\t\r\n"} == {*"".join(FIXED_TEXTS).encode()}
