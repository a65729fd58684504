"""HTML and SVG that cannot forget to escape: text is escaped unless it was made here.

Characters that would change what is seen around them, or that no UTF-8 file can hold, are shown as
others: controls as their pictures, marks of the direction of writing and halves of surrogate pairs
as U+FFFD.
"""

import html
from typing import Self

_VOID = frozenset(("br", "hr", "input", "link", "meta"))
_SHOWN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
_HIDDEN = dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), *_DIRECTIONS), "\ufffd")
_SHOWN |= _HIDDEN

Attribute = str | float | bool | None


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()

    @classmethod
    def joined(cls, *parts: str) -> Self:
        """``parts`` one behind the other; what is no markup is escaped."""
        return cls("".join(map(escaped, parts)))


def escaped(text: str) -> Markup:
    """``text`` as it is read by people, whatever it holds; markup stays as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(text.translate(_SHOWN)))


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """An element. An attribute's name may end in ``_`` where Python keeps the word (``class_``),
    other ``_`` become ``-``; None and False leave it out, True gives it no value."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            words.append(f'{key}="{escaped(text)}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{Markup.joined(*children)}</{name}>")
