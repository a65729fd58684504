"""Whether a tokenizer's ids are the text that they stand for, and the model's own ids of it.

Tokenizers lose text without a word: blanks that a library's class does not know of, letters that a
normalizer lowers, bytes that no token has, blanks that an added token swallows. And a library may
put its own rules in the place of the model's, whose ids then are not those that the model was
trained on. Both are found here, on fixed texts and on whatever documents are at hand.
"""

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_rmt.prompt.token_bytes import special_texts, token_bytes, transformers_tokenizer
from megatron_rmt.prompt.tokenizer_files import file_beside

_SENTENCE = (
    "  Anna's CAFÉ (cafe\u0301), déjà vu:\t数学 한국어 Ωμέγα 🙂👩\u200d🚀 \u201cIt's\u201d ﬁ ½ x² "
    "≤ 3.14159; 1234567\n\n\tif (x) { y = \\frac{1}{2}; }  \r\n    # Straße,\u00a0ÇA \u2026 "
    "end.  \n"
)
# Where the pre-tokenizer cuts numbers shows in one of these, if a token is several digits at all.
_NUMBERS = " ".join(map(str, range(1000)))
# Every byte that the scripts of the world have in UTF-8. Good tokenizers lack tokens for some
# control characters and empty planes.
_CHARACTERS = "".join(
    map(
        chr,
        (
            *range(0x20, 0x7F),
            *range(0xA0, 0x800, 31),
            *range(0x800, 0xD800, 509),
            *range(0xE000, 0x10000, 1009),
            *range(0x10000, 0x30000, 4001),
        ),
    )
)
FIXED_TEXTS = (_SENTENCE, _NUMBERS, _CHARACTERS)
# So many of the first documents, and of each so many characters, are compared.
DOCUMENTS, CHARACTERS = 8, 20_000
# Characters of a text that a message shows on each side of the place where it goes wrong.
_SHOWN = 12


def check_ids_are_text(tokenizer: Any, documents: Iterable[str] = ()) -> None:
    """Check on ``FIXED_TEXTS`` and ``documents`` that the ids are the text, and the model's own.

    The bytes of the ids have to be the text up to: a dummy space first and behind an added token,
    as sentencepiece-like tokenizers put it; Unicode normalisation (what has one NFKC form is one
    text); U+2581, which sentencepiece cannot tell from a space. Special tokens written out in a
    document count as their own text. The ids have to be those of the ``tokenizer.json`` beside the
    tokenizer, or of ``tokenizer.model`` where that stands alone.

    tokenizer: of ``transformers``, or Megatron's (see ``token_bytes``).

    Raises:
        ValueError: they are not, or the tokens have no fixed bytes.
    """
    table = token_bytes(tokenizer)
    inner = transformers_tokenizer(tokenizer)
    added = {
        token_id: token.content
        for token_id, token in getattr(inner, "added_tokens_decoder", {}).items()
    } | special_texts(tokenizer)
    plain = [text for token_id, text in added.items() if table[token_id]]
    among_blanks = "".join(f"a {text}  b\n{text}\n\tc" for text in plain)
    own = _own_encoder(tokenizer)
    for text in (*FIXED_TEXTS, among_blanks, *(text[:CHARACTERS] for text in documents)):
        ids = _encode(tokenizer, text)
        read, wrong = _read_along(ids, table, added, _canonical(text))
        if wrong is not None:
            raise ValueError(
                f"{_named(tokenizer)} gives ids that do not spell the text: "
                f"{_around(_canonical(text), wrong)!r} becomes {_around(read, wrong)!r}; use a "
                "tokenizer that keeps blanks and capitals and has tokens for all bytes, or another "
                "version of transformers."
            )
        # Which tokens were added may differ: a library takes them from other files as well.
        if own is None or added.keys() & set(ids):
            continue
        name, encode = own
        # Libraries differ in whether a text that begins with a blank gets a dummy space as well.
        text = text.lstrip(" ")
        ids, theirs = _encode(tokenizer, text), encode(text)
        if theirs != ids:
            pairs = enumerate(itertools.zip_longest(ids, theirs))
            same = next(at for at, (ours, other) in pairs if ours != other)
            before = b"".join(table[token_id] for token_id in ids[:same]).decode(errors="ignore")
            raise ValueError(
                f"{_named(tokenizer)} gives other ids than {name}, by which the model was trained: "
                f"behind {before[-_SHOWN:]!r} come {ids[same : same + 3]} instead of "
                f"{theirs[same : same + 3]}; use a version of transformers that keeps the file's "
                "rules."
            )


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` without those that a tokenizer puts before and after it."""
    if not text:
        return []
    inner = transformers_tokenizer(tokenizer)
    if inner is None:
        return list(tokenizer.tokenize(text))
    return list(inner.encode(text, add_special_tokens=False))


def _own_encoder(tokenizer: Any) -> tuple[str, Callable[[str], list[int]]] | None:
    """The model's own tokenizer file and how it encodes text, where ``transformers`` was to read
    it."""
    if transformers_tokenizer(tokenizer) is None:
        return None
    description = file_beside(tokenizer, "tokenizer.json")
    if description is not None:
        from tokenizers import Tokenizer

        own = Tokenizer.from_file(str(description))
        own.no_truncation()
        own.no_padding()
        return str(description), lambda text: own.encode(text, add_special_tokens=False).ids
    pieces = file_beside(tokenizer, "tokenizer.model")
    if pieces is not None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = SentencePieceProcessor(model_file=str(pieces))
        except RuntimeError:
            # A tiktoken vocabulary goes by the same name.
            return None
        return str(pieces), model.encode
    return None


def _read_along(
    ids: Sequence[int], table: Sequence[bytes], added: dict[int, str], text: str
) -> tuple[str, int | None]:
    """What ``ids`` spell, without dummy spaces, and where it first departs from ``text``, in
    characters; None where it does not."""
    read, wrong = "", None
    for is_added, run in itertools.groupby(ids, key=added.__contains__):
        if is_added:
            piece = "".join(map(added.__getitem__, run))
        else:
            piece = b"".join(map(table.__getitem__, run)).decode(errors="replace")
        piece = _canonical(piece)
        at = len(read)
        if not is_added and not text.startswith(piece, at) and piece.startswith(" "):
            without = piece[1:]
            piece = without if text.startswith(without, at) else piece
        read += piece
    if read != text:
        pairs = itertools.zip_longest(read, text)
        wrong = next(at for at, (ours, theirs) in enumerate(pairs) if ours != theirs)
    return read, wrong


def _canonical(text: str) -> str:
    return unicodedata.normalize("NFKC", text.replace("\u2581", " "))


def _around(text: str, at: int) -> str:
    return text[max(0, at - _SHOWN) : at + _SHOWN]


def _named(tokenizer: Any) -> str:
    inner = transformers_tokenizer(tokenizer)
    if inner is None:
        return f"the {tokenizer.library} tokenizer"
    import transformers

    return f"the tokenizer (class {type(inner).__name__}, transformers {transformers.__version__})"
