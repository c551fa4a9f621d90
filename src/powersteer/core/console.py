"""Printing: what is printed is printed as it is. No markup is read, and no control character reaches the terminal.

The notes of a run go through the console that draws its progress bar, not through `logging`: so they stand above the
bar, keep their lines whole in a pipe, and are seen without a handler that a caller of `train` must set up first.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

_KEPT = ("\n", "\t")


class PlainConsole(Console):
    """A console that takes every string for what it is: a path may hold brackets, a file's name escape codes.

    Args:
        **settings: Of rich's `Console`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Console.render_str`."""
        plain: Any = super().render_str
        return plain(printable(text), **{**settings, "emoji": False, "markup": False})


class PlainColumn(TextColumn):
    """A progress bar's words, as they are.

    Args:
        text_format: Such as ``{task.description}``.
    """

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False)

    def render(self, task: Any) -> Text:
        """See `TextColumn.render`."""
        return Text(printable(self.text_format.format(task=task)), style=self.style, justify=self.justify)


def printable(text: str) -> str:
    """Text with its control characters, bidirectional overrides and half characters written out: ``\\x1b``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in _KEPT or _is_harmless(one) else _written_out(one) for one in text)


def _is_harmless(character: str) -> bool:
    # Cc: control, Cs: surrogates; of Cf (format) joiners belong to emoji and scripts, overrides turn text round.
    kind = unicodedata.category(character)
    return kind not in ("Cc", "Cs") and not (kind == "Cf" and "\u202a" <= character <= "\u202e")


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
