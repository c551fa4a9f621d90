"""Where commands print, and how they write figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from powersteer.core.console import PlainConsole, printable
from powersteer.core.files import write_whole
from powersteer.core.text import to_json

out = PlainConsole()
"""Prints strings as they are: no markup, no escape codes."""
err = PlainConsole(stderr=True)


def show(text: object) -> None:
    """Print a text, its lines however long."""
    out.print(str(text), soft_wrap=True)


def show_json(values: Any) -> None:
    """Print plain values as JSON."""
    out.print(to_json(values), soft_wrap=True)


def tell(word: str, style: str, text: str, console: Console = out) -> None:
    """Print ``word: text``, the word in a colour, on one line however long."""
    console.print(Text.assemble((f"{word}:", style), " ", printable(text)), soft_wrap=True)


def write_json(file: Path | None, values: dict[str, Any]) -> None:
    """Write figures to a file, if one is given."""
    if file is not None:
        write_whole(file, (to_json(values) + "\n").encode())
