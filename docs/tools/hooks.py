"""What mkdocs cannot do alone: equations, help texts and error messages, all taken from their one source."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))
from messages import Message, by_marker, messages

HELP_MARKER = "<!-- help of every command -->"
KEYS_MARKER = re.compile(r"<!-- keys of (powersteer[\w.]*)\.(\w+) -->")
MATH = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)


def on_config(config: Any) -> Any:
    """Leave out of the menu the pages that are not written yet, such as results.md, which a command writes."""
    config.nav = _there(config.nav, Path(config.docs_dir))
    return config


def _there(nav: list[Any], docs: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            kept.append({title: _there(target, docs)})
        elif (docs / target).exists():
            kept.append(entry)
    return kept


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what pages leave to their sources."""
    if HELP_MARKER in markdown:
        markdown = markdown.replace(HELP_MARKER, help_texts())
    markdown = KEYS_MARKER.sub(lambda found: keys_table(found[1], found[2]), markdown)
    if "<!-- messages" in markdown:
        markdown = with_messages(markdown, messages())
    return MATH.sub(lambda found: f'<div class="equation">{convert(found[1].strip(), display="block")}</div>', markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Fonts, scripts and pictures come with the site.

    Raises:
        ValueError: A page would fetch something from elsewhere.
    """
    fetched = re.findall(r'(?:src="|<link[^>]* rel="stylesheet"[^>]* href=")(https?://[^"]+)', output)
    if fetched:
        raise ValueError(f"{page.file.src_uri} fetches {fetched}: put it into docs/")
    return output


def with_messages(page: str, found: list[Message]) -> str:
    """Each marker followed by a list of its messages.

    Raises:
        ValueError: A message is on no list, or a marker lists nothing.
    """
    listed, left = by_marker(page, found)
    empty = [marker for marker, of_marker in listed.items() if not of_marker]
    if left or empty:
        raise ValueError(f"no place for {left}, no messages for {empty}")
    for marker, of_marker in listed.items():
        texts = sorted({message.text for message in of_marker}, key=lambda text: text.lstrip("… :,'"))
        items = "\n".join(f"- ``{text} ``" for text in texts)
        page = page.replace(marker, f'<div class="messages" markdown>\n\n{items}\n\n</div>')
    return page


def keys_table(module: str, name: str) -> str:
    """A table of a settings class: each key, its default and its description."""
    from powersteer.apps.cli.options import default_of, described

    kind = getattr(import_module(module), name)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, info in kind.model_fields.items():
        default = "required" if info.is_required() else f"`{default_of(kind, key) or 'null'}`"
        rows.append(f"| `{key}` | {default} | {described(kind, key)} |")
    return "\n".join(rows)


def help_texts() -> str:
    """``--help`` of every command at 80 columns."""
    from powersteer.apps.cli import app

    def sections(command: Any, path: tuple[str, ...], parent: Any) -> list[str]:
        context = command.context_class(command, info_name=path[-1], parent=parent, terminal_width=80)
        name = " ".join(path)
        found = [f"### {name}\n\n```text\n{command.get_help(context)}\n```\n"]
        for inner in command.list_commands(context) if hasattr(command, "commands") else ():
            found += sections(command.commands[inner], (*path, inner), context)
        return found

    return "\n".join(sections(typer.main.get_command(app), ("powersteer",), None))
