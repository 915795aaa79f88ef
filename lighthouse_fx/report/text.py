"""How results become text: rich renderables as plain text, empty cells, and text of unknown origin that is safe to print."""

from __future__ import annotations

import io
import unicodedata

from rich.console import Console, RenderableType

_KEPT = "\n\t"


def as_text(renderable: RenderableType, *, width: int) -> str:
    """What a rich renderable prints, without colour.

    Args:
        renderable: a table, a group of them or a text.
        width: in columns.
    """
    text = io.StringIO()
    Console(width=width, file=text, color_system=None).print(renderable)
    return text.getvalue()


def or_dash(value: object, form: str = "") -> str:
    """A cell of a table: "-" for None, integers with separators, everything else by its format."""
    if value is None:
        return "-"
    if isinstance(value, int) and not form:
        return f"{value:,}"
    return format(value, form)


def printable(text: str) -> str:
    r"""A text of unknown origin, such as a file's, with control characters spelled out (`\x1b`).

    A terminal obeys the escape sequences that it is sent, and half a surrogate pair cannot be encoded at all.
    """
    return "".join(_spelled(c) if unicodedata.category(c) in ("Cc", "Cs") and c not in _KEPT else c for c in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
