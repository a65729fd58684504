"""The bytes of tokens, on real tokenizers trained here on a few lines."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_rmt.prompt.token_bytes import token_bytes

LINES = [
    "Half of 84 is 42, and 42 + 42 = 84.",
    "Anna buys three apples for 6 euros; each apple costs 2 euros.",
    "  two leading spaces,\n\ta tab and a newline\n",
    "naïve café: déjà vu, Zürich, Ωμέγα",
] * 4

# Emoji and Chinese are not in LINES: their bytes can only come from single-byte tokens.
TEXTS = [
    *LINES[:4],
    "x",
    "f(x) = ∑ x² ≤ 3√2 \\frac{1}{2}",
    "数学 is fun 🙂🙃, isn't it?\r\n\r\n\x00\x7f\u00a0\u00ad",
    "spaces      and Ġ Ċ <b>",
]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    # Qwen3 adds its markers of thought as tokens that are not special.
    fast.add_tokens(["</think>", "é ß"])
    return fast


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """Unigram, Metaspace and byte fallback, with the decoder of Llama 2 and Mistral."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=380, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [(piece, score) for piece, score in model["vocab"]]
    pieces[2:2] = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def sentencepiece_model(directory: Path) -> Path:
    path = directory / "pieces.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            vocab_size=400,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def joined(table: list[bytes], ids: list[int]) -> bytes:
    return b"".join(table[token_id] for token_id in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bytes_concatenate_to_the_text(text: str) -> None:
    tokenizer = byte_level_bpe()
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    assert joined(table, tokenizer(text).input_ids) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_metaspace_bytes_concatenate_to_dummy_space_and_text(text: str) -> None:
    tokenizer = metaspace_unigram()
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    dummy = b"" if text.startswith(" ") else b" "
    assert joined(table, tokenizer(text).input_ids) == dummy + text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_bytes_concatenate_to_dummy_space_and_text(text: str, tmp_path: Path) -> None:
    tokenizer = MegatronTokenizer.from_pretrained(
        str(sentencepiece_model(tmp_path)), metadata_path={"library": "sentencepiece"}
    )
    table = token_bytes(tokenizer)
    assert len(table) == tokenizer.vocab_size
    assert joined(table, tokenizer.tokenize(text)) == b" " + text.encode()


def test_special_tokens_are_empty_and_other_added_tokens_are_their_text() -> None:
    tokenizer = byte_level_bpe()
    table = token_bytes(tokenizer)
    assert table[tokenizer.eos_token_id] == b""
    for added in ("</think>", "é ß"):
        assert table[tokenizer.convert_tokens_to_ids(added)] == added.encode()
    # <|im_start|> is no named attribute of the tokenizer, only marked as special.
    assert [tokenizer.decode(i) for i, value in enumerate(table) if not value] == [
        "<|endoftext|>",
        "<|im_start|>",
    ]


def test_unknown_and_control_tokens_are_empty(tmp_path: Path) -> None:
    unigram = metaspace_unigram()
    assert token_bytes(unigram)[:2] == [b"", b""]
    # Known to the model only, not as a special token.
    for unnamed in (
        models.Unigram([("a", -1.0), ("<?>", -9.0)], unk_id=1),
        models.BPE({"a": 0, "<?>": 1}, [], unk_token="<?>"),
    ):
        backend = tokenizers.Tokenizer(unnamed)
        backend.decoder = decoders.Metaspace()
        assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == [b"a", b""]
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path)))
    table = token_bytes(
        MegatronTokenizer.from_pretrained(
            str(tmp_path / "pieces.model"), metadata_path={"library": "sentencepiece"}
        )
    )
    assert [table[i] for i in (model.unk_id(), model.bos_id(), model.eos_id())] == [b""] * 3


def test_each_of_the_256_bytes_has_a_token_in_every_kind(tmp_path: Path) -> None:
    megatron = MegatronTokenizer.from_pretrained(
        str(sentencepiece_model(tmp_path)), metadata_path={"library": "sentencepiece"}
    )
    for tokenizer in (byte_level_bpe(), metaspace_unigram(), megatron):
        assert {bytes([byte]) for byte in range(256)} <= set(token_bytes(tokenizer))


def test_megatron_wrapper_gives_the_table_of_the_tokenizer_inside(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((byte_level_bpe(), metaspace_unigram())):
        directory = str(tmp_path / str(number))
        tokenizer.save_pretrained(directory)
        wrapped = MegatronTokenizer.from_pretrained(
            directory, metadata_path={"library": "huggingface"}
        )
        assert token_bytes(wrapped) == token_bytes(tokenizer)
        assert len(token_bytes(wrapped)) == wrapped.vocab_size


def test_sentencepiece_ids_known_to_megatron_alone_are_empty(tmp_path: Path) -> None:
    path = str(sentencepiece_model(tmp_path))
    plain = MegatronTokenizer.from_pretrained(path, metadata_path={"library": "sentencepiece"})
    legacy = MegatronTokenizer.from_pretrained(
        path, metadata_path={"library": "sentencepiece"}, legacy=True, special_tokens=["<sep>"]
    )
    assert token_bytes(legacy) == [*token_bytes(plain), b""]


def test_tiktoken_bytes_concatenate_to_the_text(tmp_path: Path) -> None:
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"an", b" an", "é".encode()]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(value).decode(), "token_str": ""}
        for rank, value in enumerate(vocabulary)
    ]
    (tmp_path / "vocabulary.json").write_text(json.dumps(rows))
    tokenizer = MegatronTokenizer.from_pretrained(
        str(tmp_path / "vocabulary.json"),
        metadata_path={"library": "tiktoken"},
        vocab_size=len(vocabulary) + 10,
        num_special_tokens=10,
    )
    table = token_bytes(tokenizer)
    assert table == [b""] * 10 + vocabulary
    for text in TEXTS:
        assert joined(table, tokenizer.tokenize(text)) == text.encode()


def test_prefix_space_of_byte_level_bpe_is_in_the_bytes() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert joined(token_bytes(tokenizer), tokenizer("one two").input_ids) == b" one two"


def test_metaspace_decoder_alone_is_understood() -> None:
    tokenizer = metaspace_unigram()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    table = token_bytes(tokenizer)
    text = LINES[0]
    assert joined(table, tokenizer(text).input_ids) == b" " + text.encode()


def test_normalizer_that_writes_the_spaces_is_understood() -> None:
    """Llama 2 has no pre-tokenizer: its normalizer prepends and replaces the space."""
    tokenizer = metaspace_unigram()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    table = token_bytes(tokenizer)
    for text in TEXTS:
        assert joined(table, tokenizer(text).input_ids) == b" " + text.encode()


def unsupported() -> dict[str, Any]:
    word_piece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    suffixes = tokenizers.Tokenizer(models.BPE())
    suffixes.decoder = decoders.BPEDecoder()
    silent = tokenizers.Tokenizer(models.BPE())
    wrap = PreTrainedTokenizerFast
    return {
        "WordPiece": wrap(tokenizer_object=word_piece),
        "BPEDecoder": wrap(tokenizer_object=suffixes),
        "no decoder": wrap(tokenizer_object=silent),
        "null-text": MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=16
        ),
        "object": object(),
    }


@pytest.mark.parametrize("kind", ["WordPiece", "BPEDecoder", "no decoder", "null-text", "object"])
def test_unsupported_kind_is_named_with_a_remedy(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}.*use a tokenizer with"):
        token_bytes(unsupported()[kind])


def test_strip_before_fuse_is_refused_because_it_depends_on_the_neighbours() -> None:
    tokenizer = metaspace_unigram()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Strip(content=" ", left=1), decoders.Fuse()]
    )
    with pytest.raises(ValueError, match="Strip"):
        token_bytes(tokenizer)
