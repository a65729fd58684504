"""tools/document_tokens.py: long texts keep their ids, special tokens in texts are text."""

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.test_token_bytes import LINES, byte_level_bpe, metaspace_unigram

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import document_tokens  # noqa: E402
from document_tokens import DocumentTokenizer  # noqa: E402
from preprocess_data import load_tokenizer  # noqa: E402

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_3() -> PreTrainedTokenizerFast:
    """Digits in groups of three from the left, and a begin and an end that it adds itself."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*LINES, "314159 265358 979323 ..\n\n --\n"] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def llama_2() -> PreTrainedTokenizerFast:
    """No pre-tokenizer: a whole text is one word, with a dummy space and normalisation."""
    bpe = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["?", "</s>", *set(LINES[0].split())])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")


def with_strips() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([tokenizers.AddedToken("42", rstrip=True)])
    return tokenizer


def _megatron(directory: Path, build: Callable[[], PreTrainedTokenizerFast]) -> Any:
    build().save_pretrained(directory)
    return load_tokenizer(str(directory))


def _sentencepiece(directory: Path, kind: str) -> Any:
    with open(directory / "pieces.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            model_type=kind,
            vocab_size=400,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return load_tokenizer(str(directory / "pieces.model"))


def random_text(seed: int, length: int) -> str:
    """Prose, runs without a space, digits, other scripts, blanks and added tokens, mixed."""
    generator = random.Random(seed)
    parts = [
        lambda: generator.choice(LINES),
        lambda: " ".join(generator.choices([*"AB3;.", "buys", "apples", "each", "42"], k=60)),
        lambda: "".join(generator.choices("abcdefXYZ0123456789+/", k=400)),
        lambda: "".join(generator.choices("0123456789", k=500)),
        lambda: "".join(generator.choices("数学是有趣的。我们学习é\u0301🙂", k=300)),
        lambda: generator.choice([" ", "\n", "a", "=", "\t"]) * 300,
        lambda: (
            generator.choice(["</think>", "é ß", "\n\n", ".\n\n  ", "\u2019s", "\u00a0", "½"]) * 9
        ),
    ]
    text = ""
    while len(text) < length:
        text += generator.choice(parts)()
    return text


def pieces(tokenizer: DocumentTokenizer, text: str) -> list[list[int]]:
    return list(tokenizer.encode(text, "data:1"))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 200 characters, so that a text of a few thousand has every kind of seam."""
    monkeypatch.setattr(document_tokens, "LONGEST_WHOLE", 200)
    monkeypatch.setattr(document_tokens, "CONTEXT", 40)


BPE = [byte_level_bpe, llama_3, llama_2, with_strips]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("build", [*BPE, metaspace_unigram, words])
def test_ids_of_a_long_text_are_those_of_the_whole(
    tmp_path: Path, build: Callable[[], PreTrainedTokenizerFast]
) -> None:
    tokenizer = DocumentTokenizer(_megatron(tmp_path, build))
    for seed in range(40):
        text = random_text(seed, 3000)
        found = pieces(tokenizer, text)
        assert [*itertools.chain(*found)] == tokenizer.tokenizer.tokenize(text)
        if build in BPE:
            # Before and after the pieces are the tokenizer's own special tokens.
            assert len(found) - 2 >= len(text) // 400
            assert max(map(len, found)) <= 1600


@pytest.mark.usefixtures("small_pieces")
def test_ids_of_a_long_text_are_those_of_the_whole_in_sentencepiece(tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer(_sentencepiece(tmp_path, "bpe"))
    for seed in range(40):
        text = random_text(seed, 3000)
        found = pieces(tokenizer, text)
        assert [*itertools.chain(*found)] == tokenizer.tokenizer.tokenize(text)
        assert len(found) - 2 >= len(text) // 800


@pytest.mark.usefixtures("small_pieces")
def test_a_text_that_cannot_be_cut_is_whole_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unigram of sentencepiece adds up rounded scores from the first character on."""
    tokenizer = DocumentTokenizer(_sentencepiece(tmp_path, "unigram"))
    text = random_text(3, 3000)
    assert [*itertools.chain(*pieces(tokenizer, text))] == tokenizer.tokenizer.tokenize(text)
    monkeypatch.setattr(document_tokens, "LONGEST_UNCUT", 2000)
    with pytest.raises(ValueError, match=r"data:1: a text of \d+ characters.*split the document\."):
        pieces(tokenizer, text)


@pytest.mark.usefixtures("small_pieces")
def test_a_token_that_swallows_the_blanks_of_many_pieces_before_it_is_refused(
    tmp_path: Path,
) -> None:
    def build() -> PreTrainedTokenizerFast:
        tokenizer = byte_level_bpe()
        tokenizer.add_tokens([tokenizers.AddedToken("42", lstrip=True)])
        return tokenizer

    tokenizer = DocumentTokenizer(_megatron(tmp_path, build))
    with pytest.raises(ValueError, match=r"data:1: a text of 909 characters, a part of which"):
        pieces(tokenizer, "x" * 300 + " " * 600 + "42 eggs =")


@pytest.mark.usefixtures("small_pieces")
def test_words_without_an_end_are_whole_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_tokens, "LONGEST_UNCUT", 1600)
    tokenizer = DocumentTokenizer(_megatron(tmp_path, metaspace_unigram))
    text = "Anna buys " * 100 + "x" * 900 + " apples" * 100
    found = pieces(tokenizer, text)
    assert [*itertools.chain(*found)] == tokenizer.tokenizer.tokenize(text)
    assert len(found) > 6
    with pytest.raises(ValueError, match=r"data:1: a text of 5000 characters, 1600 of them"):
        pieces(tokenizer, "x" * 5000)


def test_what_is_encoded_at_once_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = DocumentTokenizer(_megatron(tmp_path, byte_level_bpe))
    encoded = []
    bare = tokenizer._bare
    monkeypatch.setattr(tokenizer, "_bare", lambda text: encoded.append(len(text)) or bare(text))
    text = "Anna buys three apples. " * 50_000
    total = sum(map(len, pieces(tokenizer, text)))
    assert max(encoded) <= document_tokens.LONGEST_WHOLE + document_tokens.CONTEXT
    # Looking for seams costs next to nothing.
    assert sum(encoded) < 1.02 * len(text)
    assert total == len(tokenizer.tokenizer.tokenize(text))


SPELLED = "A page with <|endoftext|> and <|im_start|>; and <|endoftext|> again."


def test_special_tokens_in_a_text_are_plain_text_unless_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "tokenizer"
    bpe = byte_level_bpe()
    special = {"<|endoftext|>": 0, "<|im_start|>": 1}
    plain = DocumentTokenizer(_megatron(directory, byte_level_bpe))
    (ids,) = pieces(plain, SPELLED)
    assert not {*special.values()} & {*ids}
    assert bpe.decode(ids) == SPELLED
    as_tokens = DocumentTokenizer(load_tokenizer(str(directory)), "special")
    (ids,) = pieces(as_tokens, SPELLED)
    assert [token for token in ids if token in special.values()] == [0, 1, 0]
    assert ids == bpe(SPELLED).input_ids
    # Added tokens that are not special, and texts without any, are the same for both.
    for text in (*LINES, "a </think> é ß", ""):
        assert pieces(plain, text) == pieces(as_tokens, text) == [bpe(text).input_ids]


def test_prompts_of_the_same_tokenizer_keep_their_chat_markers(tmp_path: Path) -> None:
    tokenizer = _megatron(tmp_path / "tokenizer", byte_level_bpe)
    ids = tokenizer.tokenize(SPELLED)
    assert {0, 1} <= {*ids}
    (documents,) = pieces(DocumentTokenizer(tokenizer, "plain"), SPELLED)
    assert not {0, 1} & {*documents}
    assert tokenizer.tokenize(SPELLED) == ids


def test_special_tokens_in_texts_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    megatron = _megatron(tmp_path, byte_level_bpe)
    for mode, read in (("plain", "plain text here"), ("special", "tokens here")):
        tokenizer = DocumentTokenizer(megatron, mode)
        tokenizer.note_special_tokens("nothing but </think>", "a:1")
        assert tokenizer.report() == ""
        tokenizer.note_special_tokens("x <|im_start|>", "a:2")
        tokenizer.note_special_tokens(SPELLED, "a:3")
        assert tokenizer.written == 4
        assert tokenizer.report().startswith("4 special tokens are written in the texts")
        assert f"'<|im_start|>', at a:2: they are {read}" in tokenizer.report()
    refusing = DocumentTokenizer(megatron, "refuse")
    refusing.note_special_tokens("nothing", "a:1")
    with pytest.raises(ValueError, match=r"a:3: the special token '<\|endoftext\|>' is written"):
        refusing.note_special_tokens(SPELLED, "a:3")


def test_a_vocabulary_that_finds_special_tokens_by_itself_is_refused_where_it_matters(
    tmp_path: Path,
) -> None:
    """Unigram has every token among its pieces."""
    tokenizer = DocumentTokenizer(_megatron(tmp_path, metaspace_unigram))
    tokenizer.note_special_tokens("no such thing", "a:1")
    with pytest.raises(ValueError, match=r"a:2: the special token '</s>' .* cannot read it as pl"):
        tokenizer.note_special_tokens("x </s> y", "a:2")
    as_tokens = DocumentTokenizer(tokenizer.tokenizer, "special")
    as_tokens.note_special_tokens("x </s> y", "a:2")
    assert as_tokens.written == 1


def test_sentencepiece_reads_no_special_token_from_text(tmp_path: Path) -> None:
    megatron = _sentencepiece(tmp_path, "bpe")
    for mode in document_tokens.SPECIAL_TOKENS:
        tokenizer = DocumentTokenizer(megatron, mode)
        tokenizer.note_special_tokens("x </s> y", "a:1")
        assert tokenizer.report() == ""
        assert megatron.eod not in pieces(tokenizer, "x </s> y")[0]
