"""A family of tiny tokenizers, one of each kind that models come with, each with a random model.

Every member is a Hugging Face directory whose files are written by the library that defines them
(tokenizers, sentencepiece, safetensors), never by transformers, so that what transformers makes of
them can be compared with what stands in them.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

from conversion.model_config import read_config
from conversion.weight_names import rows_of

# Begins and ends with each kind of character that tokenizers treat apart: digits, several spaces,
# newlines, accents, Chinese and emoji, of which the last two come from single bytes.
TEXTS = [
    "Half of 84 is 42, and 42 + 42 = 84.",
    "Anna buys three apples for 6 euros;  each apple costs 2 euros.\n",
    "naïve café: déjà vu in Zürich costs 12345 euros",
    "Two  spaces, a tab\tand a newline\n\nand 数学 is fun 🙂 too",
    "Each of the 3 apples costs 2 euros, so Anna pays 6 euros for them.",
] * 4
BEGIN, END, UNKNOWN, TURN = "<s>", "</s>", "<unk>", "<|turn|>"
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
# Wide enough for a constant in the first channel, by which special ids and holes are never drawn.
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Member:
    """One kind of tokenizer.

    files: its files by name. config: of config.json, beside the sizes. begins, ends: the tokens
    that are put before a text, and that end a response. space: what the tokenizer itself puts
    before a text. refused: a command (``convert``, ``preprocess``) and a pattern of the sentence
    with which it refuses this tokenizer; None if it is to be right.
    """

    files: Callable[[], Mapping[str, bytes]]
    config: Mapping[str, Any] = field(default_factory=dict)
    begins: str | None = None
    ends: tuple[str, ...] = (END,)
    space: str = ""
    refused: tuple[str, str] | None = None


def _fast(tokenizer: Tokenizer, **settings: Any) -> dict[str, bytes]:
    """The files of a tokenizer of the library tokenizers."""
    description = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(description).encode(),
    }


def _put_begin_first(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def _byte_level(*specials: str) -> Tokenizer:
    """GPT-2's kind: Llama 3, Qwen, SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level() -> dict[str, bytes]:
    tokenizer = _put_begin_first(_byte_level(BEGIN, END))
    return _fast(tokenizer, bos_token=BEGIN, eos_token=END)


def byte_level_with_end_only() -> dict[str, bytes]:
    return _fast(_byte_level(END), eos_token=END)


def byte_level_with_begin_only() -> dict[str, bytes]:
    return _fast(_put_begin_first(_byte_level(BEGIN)), bos_token=BEGIN)


def byte_level_with_two_ends() -> dict[str, bytes]:
    """Llama 3's: a text and a turn each have a token that ends them."""
    tokenizer = _put_begin_first(_byte_level(BEGIN, END, TURN))
    return _fast(tokenizer, bos_token=BEGIN, eos_token=END)


def byte_level_with_holes() -> dict[str, bytes]:
    """Ids that no token has, inside the range."""
    description = json.loads(_byte_level(END).to_str())
    vocabulary = description["model"]["vocab"]
    last = len(vocabulary) - 5
    description["model"]["vocab"] = {
        token: token_id + (7 if token_id >= last else 0) for token, token_id in vocabulary.items()
    }
    return _fast(Tokenizer.from_str(json.dumps(description)), eos_token=END)


def special_markers() -> dict[str, bytes]:
    """The marks of a thought are special tokens, as ``add_special_tokens`` makes them."""
    tokenizer = _byte_level(BEGIN, END)
    tokenizer.add_special_tokens(["<think>", "</think>"])
    return _fast(_put_begin_first(tokenizer), bos_token=BEGIN, eos_token=END)


def markers_with_strips() -> dict[str, bytes]:
    """An added token that swallows the blanks around it."""
    tokenizer = _byte_level(END)
    tokenizer.add_tokens([AddedToken("</think>", lstrip=True, rstrip=True, normalized=False)])
    return _fast(tokenizer, eos_token=END)


def metaspace() -> dict[str, bytes]:
    """Unigram behind a Metaspace pre-tokenizer, with single bytes for what is not in it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=[UNKNOWN, END],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces[2:2] = [(piece, -20.0) for piece in BYTE_PIECES]
    tokenizer.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    tokenizer.decoder = _fallback_decoder()
    return _fast(tokenizer, eos_token=END, unk_token=UNKNOWN)


def _fallback_decoder() -> decoders.Decoder:
    """Llama 2's and Mistral's."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)])


def _byte_fallback() -> Tokenizer:
    """Llama 2's form: the normalizer writes the spaces, and pieces may hold several words."""
    specials = [UNKNOWN, BEGIN, END]
    trained = Tokenizer(models.BPE(unk_token=UNKNOWN))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    others = [token for token in model["vocab"] if token not in specials]
    vocabulary = {token: index for index, token in enumerate([*specials, *BYTE_PIECES, *others])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = _fallback_decoder()
    tokenizer.add_special_tokens(specials)
    return _put_begin_first(tokenizer)


OF_LLAMA = {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN}


def byte_fallback() -> dict[str, bytes]:
    return _fast(_byte_fallback(), **OF_LLAMA)


def current_llama() -> dict[str, bytes]:
    """tokenizer.json, for transformers' class of Llama 2."""
    return _fast(_byte_fallback(), tokenizer_class="LlamaTokenizer", legacy=False, **OF_LLAMA)


def byte_level_for_llama() -> dict[str, bytes]:
    """A byte-level vocabulary under Llama 2's class, for which transformers has other rules."""
    tokenizer = _put_begin_first(_byte_level(BEGIN, END))
    settings = {"bos_token": BEGIN, "eos_token": END}
    return _fast(tokenizer, tokenizer_class="LlamaTokenizerFast", **settings)


def _sentencepiece(kind: str, dummy_prefix: bool, **settings: Any) -> dict[str, bytes]:
    """A sentencepiece model alone, for transformers' class of Llama 2."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type=kind,
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    begins = {"add_bos_token": True, "add_eos_token": False}
    description = {"tokenizer_class": "LlamaTokenizer", **OF_LLAMA, **begins, **settings}
    return {
        "tokenizer.model": model.getvalue(),
        "tokenizer_config.json": json.dumps(description).encode(),
    }


def legacy_sentencepiece() -> dict[str, bytes]:
    return _sentencepiece("bpe", True, legacy=True)


def sentencepiece_with_dummy_prefix() -> dict[str, bytes]:
    return _sentencepiece("bpe", True, legacy=False)


def sentencepiece_without_dummy_prefix() -> dict[str, bytes]:
    return _sentencepiece("bpe", False, legacy=False, add_prefix_space=False)


def sentencepiece_that_is_given_a_prefix() -> dict[str, bytes]:
    """The model has no dummy prefix, and transformers puts one there unless it is told not to."""
    return _sentencepiece("bpe", False, legacy=False)


def sentencepiece_unigram() -> dict[str, bytes]:
    """Transformers' class of Llama 2 takes the pieces for those of a BPE: other ids, same bytes."""
    return _sentencepiece("unigram", True, legacy=False)


FAMILY: dict[str, Member] = {
    "byte-level": Member(byte_level, begins=BEGIN),
    "metaspace": Member(metaspace, space=" "),
    "sentencepiece, dummy prefix": Member(sentencepiece_with_dummy_prefix, begins=BEGIN, space=" "),
    "sentencepiece, no dummy prefix": Member(sentencepiece_without_dummy_prefix, begins=BEGIN),
    "sentencepiece, prefix of transformers": Member(
        sentencepiece_that_is_given_a_prefix, refused=("convert", "ids")
    ),
    "sentencepiece, Unigram": Member(
        sentencepiece_unigram, begins=BEGIN, space=" ", refused=("convert", "ids")
    ),
    "byte fallback": Member(byte_fallback, begins=BEGIN, space=" "),
    "added tokens that strip": Member(markers_with_strips, refused=("convert", "</think>")),
    "special markers": Member(special_markers, begins=BEGIN),
    "begin only": Member(
        byte_level_with_begin_only, begins=BEGIN, ends=(), refused=("preprocess", "eos_token")
    ),
    "end only": Member(byte_level_with_end_only),
    "several ends": Member(byte_level_with_two_ends, begins=BEGIN, ends=(END, TURN)),
    "holes": Member(byte_level_with_holes),
    "Llama class, legacy": Member(legacy_sentencepiece, begins=BEGIN, space=" "),
    "Llama class, current": Member(current_llama, begins=BEGIN, space=" "),
    "Llama class, byte-level": Member(byte_level_for_llama, begins=BEGIN),
    "Qwen model, Metaspace": Member(
        metaspace, config={"model_type": "qwen2"}, refused=("convert", "ids")
    ),
}


@cache
def _written(files: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
    """Trained once, as several members may share a tokenizer."""
    return files()


class OwnTokenizer:
    """What the files themselves say, read by the library that defines them."""

    def __init__(self, directory: Path) -> None:
        description = json.loads((directory / "tokenizer_config.json").read_text())
        self.specials = {
            token: None for key, token in description.items() if key.endswith("_token") if token
        }
        self.pieces = None
        if (directory / "tokenizer.json").exists():
            self.fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            model = str(directory / "tokenizer.model")
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=model)

    def ids(self, text: str) -> list[int]:
        """Of a whole text, a begin token included where the files ask for one."""
        if self.pieces is None:
            return self.fast.encode(text).ids
        return [self.pieces.bos_id(), *self.pieces.encode(text)]

    def id_of(self, token: str) -> int:
        """Of a token by name."""
        if self.pieces is None:
            return self.fast.token_to_id(token)
        return self.pieces.piece_to_id(token)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        if self.pieces is None:
            return max(self.fast.get_vocab().values()) + 1
        return self.pieces.get_piece_size()

    def without_text(self) -> list[int]:
        """Special ids, and those that no token has."""
        if self.pieces is not None:
            return [0, 1, 2]
        by_id = {token_id: token for token, token_id in self.fast.get_vocab().items()}
        special = self.fast.get_added_tokens_decoder()
        return [
            token_id
            for token_id in range(self.size)
            if token_id not in by_id or (token_id in special and special[token_id].special)
        ]


def write_member(name: str, directory: Path) -> OwnTokenizer:
    """Write the Hugging Face directory of one member, with a random model that draws text only."""
    member = FAMILY[name]
    directory.mkdir()
    for file, content in _written(member.files).items():
        (directory / file).write_bytes(content)
    own = OwnTokenizer(directory)
    ends = [own.id_of(token) for token in member.ends]
    config = {
        "model_type": "llama",
        # As most models have, some rows that no id uses.
        "vocab_size": own.size + 8,
        "bos_token_id": None if member.begins is None else own.id_of(member.begins),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        **MODEL,
        **member.config,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_weights(config, own), directory / "model.safetensors", metadata={"format": "pt"})
    return own


def _weights(config: Mapping[str, Any], own: OwnTokenizer) -> dict[str, torch.Tensor]:
    """Random, but for a constant channel that keeps ids without text from being drawn."""
    shape = read_config(config)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for weight, place in rows_of(shape):
        for name, size in zip(weight.names(place), weight.part_shapes(shape), strict=True):
            mean = 1.0 if "norm" in name else 0.0
            weights[name] = torch.empty(size).normal_(mean, 0.1, generator=generator)
    weights["model.embed_tokens.weight"][:, 0] = 2.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][own.without_text(), 0] = -20.0
    return weights
