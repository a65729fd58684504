"""The exact bytes that each token of a vocabulary stands for in running text.

The reward of next-token reasoning compares a prediction with the document byte by byte (RPT,
arXiv 2506.08007, prefix matching), and a token need not be whole characters: "é" may be two
tokens. Decoding token by token would turn the halves into replacement characters. So the bytes
are read from the tokenizer's own description: the ``decoder`` of a Hugging Face fast tokenizer,
the piece types of a sentencepiece model, the ranks of a tiktoken vocabulary.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"
_SUPPORTED = (
    "use a tokenizer with a byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), Metaspace or "
    "byte-fallback (Llama 2, Mistral), sentencepiece or tiktoken vocabulary"
)

# One decoding step: what is still text becomes text or bytes; bytes pass through unchanged.
_Step = Callable[[str], str | bytes]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Bytes of each token id; ``b"".join`` over ``encode(text)`` gives ``text.encode()``.

    Args:
        tokenizer: a ``transformers`` tokenizer, or Megatron's tokenizer as
            ``megatron.training.get_tokenizer()`` returns it (libraries huggingface, megatron, sft,
            sentencepiece and tiktoken of ``megatron.core.tokenizers.text``).

    Returns:
        One entry for each id from 0 to the largest: ``[vocab]``. Special and control tokens, the
        unknown token, and ids that no token has, are ``b""``; added tokens that are not special
        (``</think>`` in Qwen3) are their own text.

    What a tokenizer changes before it splits text stays changed in the bytes: the dummy space
    that sentencepiece-like tokenizers put first (and Metaspace with ``prepend_scheme="always"``
    after each special token), ``add_prefix_space`` of byte-level BPE, Unicode normalisation, and
    U+2581, which sentencepiece cannot tell from a space. A special token written out in the text
    is encoded as that token, so its bytes are missing.

    Raises:
        ValueError: the tokenizer is of a kind whose tokens have no fixed bytes (WordPiece, BPE
            with word suffixes, ...) or that is not known here.
    """
    inner = transformers_tokenizer(tokenizer)
    if inner is not None:
        return _transformers_token_bytes(inner)
    return _megatron_token_bytes(tokenizer.library, tokenizer._tokenizer)


def transformers_tokenizer(tokenizer: Any) -> Any | None:
    """The ``transformers`` tokenizer that ``tokenizer`` is, or that Megatron's has inside; None
    where Megatron's has another inside."""
    library = getattr(tokenizer, "library", None)
    if library in ("huggingface", "megatron"):
        return tokenizer._tokenizer.tokenizer
    if library == "sft":
        return tokenizer._tokenizer._tokenizer
    return tokenizer if library is None else None


def special_texts(tokenizer: Any) -> dict[int, str]:
    """What each special token is called: the text that is encoded as that token, where the
    tokenizer looks for it.

    tokenizer: as for ``token_bytes``.
    """
    inner = transformers_tokenizer(tokenizer)
    if inner is None:
        wrapper = tokenizer._tokenizer
        named = dict(enumerate(getattr(wrapper, "special_tokens", None) or ()))
        return named | dict(getattr(wrapper, "id_to_special_token", None) or {})
    added = getattr(inner, "added_tokens_decoder", {})
    return {token_id: token.content for token_id, token in added.items() if token.special}


def _megatron_token_bytes(library: str, wrapper: Any) -> list[bytes]:
    if library == "sentencepiece":
        table = _sentencepiece_token_bytes(wrapper.tokenizer)
        # With --tokenizer-sentencepiece-legacy some ids are special to the wrapper alone.
        return _with_entries(table, wrapper.vocab_size, dict.fromkeys(wrapper.id_to_special_token))
    if library == "tiktoken":
        return _with_entries([], wrapper.vocab_size, wrapper.id2token)
    raise ValueError(
        f"token_bytes: Megatron's tokenizer library {library!r} is not supported; {_SUPPORTED}."
    )


def _transformers_token_bytes(tokenizer: Any) -> list[bytes]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    entries: dict[int, bytes | None] = {
        token_id: None if token.special else token.content.encode()
        for token_id, token in added.items()
    }
    # A special token that the vocabulary lacks has no id.
    entries |= dict.fromkeys({*getattr(tokenizer, "all_special_ids", ())} - {None})

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        description = json.loads(backend.to_str())
        decode = _decoder_of(description["decoder"])
        vocabulary = {token_id: token for token, token_id in backend.get_vocab().items()}
        plain = {i: decode(token) for i, token in vocabulary.items() if i not in entries}
        entries |= plain | dict.fromkeys(_unknown_token(description["model"], vocabulary))
        return _with_entries([], max(vocabulary, default=-1) + 1, entries)
    if hasattr(tokenizer, "sp_model"):
        table = _sentencepiece_token_bytes(tokenizer.sp_model)
        return _with_entries(table, max([len(table) - 1, *entries]) + 1, entries)
    raise ValueError(
        f"token_bytes: {type(tokenizer).__name__} is neither a fast transformers tokenizer nor a "
        f"sentencepiece one; {_SUPPORTED}, loaded with use_fast=True."
    )


def _with_entries(
    table: list[bytes], length: int, entries: Mapping[int, bytes | None]
) -> list[bytes]:
    """``table`` padded with ``b""`` to ``length``, then ``entries`` put in; None means ``b""``."""
    result = table + [b""] * (length - len(table))
    for token_id, value in entries.items():
        result[token_id] = value or b""
    return result


def _sentencepiece_token_bytes(model: Any) -> list[bytes]:
    def piece_bytes(token_id: int) -> bytes:
        if model.is_control(token_id) or model.is_unused(token_id) or model.is_unknown(token_id):
            return b""
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(_SENTENCEPIECE_SPACE, " ").encode()

    return [piece_bytes(token_id) for token_id in range(model.get_piece_size())]


def _unknown_token(model: Mapping[str, Any], vocabulary: Mapping[int, str]) -> list[int]:
    """The id that stands for anything not in the vocabulary: a list of one, or empty."""
    if "unk_id" in model:
        return [model["unk_id"]] if model["unk_id"] is not None else []
    return [i for i, token in vocabulary.items() if token == model.get("unk_token")]


def _decoder_of(description: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """The function from one token to its bytes that a ``tokenizers`` decoder describes."""
    if description is None:
        raise ValueError(f"token_bytes: the tokenizer describes no decoder; {_SUPPORTED}.")
    steps = list(_steps(description))

    def decode(token: str) -> bytes:
        value: str | bytes = token
        for step in steps:
            if isinstance(value, str):
                value = step(value)
        return value if isinstance(value, bytes) else value.encode()

    return decode


def _steps(description: Mapping[str, Any]) -> Iterable[_Step]:
    kind = description["type"]
    if kind == "Sequence":
        fused = False
        for part in description["decoders"]:
            # After Fuse there is one string, the whole text: Strip then takes the dummy space off
            # its ends and concerns no token by itself.
            if not (fused and part["type"] == "Strip"):
                yield from _steps(part)
            fused = fused or part["type"] == "Fuse"
    elif kind == "ByteLevel":
        yield _from_byte_level
    elif kind == "ByteFallback":
        yield _from_byte_piece
    elif kind == "Metaspace":
        yield lambda token: token.replace(description["replacement"], " ")
    elif kind == "Replace" and "String" in description["pattern"]:
        yield lambda token: token.replace(description["pattern"]["String"], description["content"])
    elif kind != "Fuse":
        raise ValueError(
            f"token_bytes: a {kind} decoder does not give each token fixed bytes; {_SUPPORTED}."
        )


def _from_byte_piece(token: str) -> str | bytes:
    match = _BYTE_PIECE.fullmatch(token)
    return bytes.fromhex(match[1]) if match else token


def _from_byte_level(token: str) -> bytes:
    alphabet = _byte_of_character()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 is itself, the other bytes are U+0100 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
