"""Every error message of the package, read from its source: for the page on troubleshooting, and its test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "powersteer"
MARKER = re.compile(r"<!-- messages (in|with): (.+?) -->")
"""On the page, where messages are listed: of these modules or folders (in), or which contain these words (with)."""


@dataclass(frozen=True, order=True)
class Message:
    """An error as its source has it, with … for what it fills in."""

    module: str
    """Relative to the package: ``data/layouts.py``."""
    text: str


def messages(source: Path = SOURCE) -> list[Message]:
    """Of every `PowersteerError`, and of every `ValueError` of a configuration or preset, sorted, each once.

    Plain `ValueError`s of ``data/prepare/sources/`` are caught there. An error that only passes on a text made
    elsewhere is not listed; what makes the text is.
    """
    trees = {file.relative_to(source).as_posix(): ast.parse(file.read_text("utf-8")) for file in source.rglob("*.py")}
    constants = {name: text for tree in trees.values() for name, text in _constants(tree)}
    found: set[Message] = set()
    for module, tree in trees.items():
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or not call.args:
                continue
            if call.func.id == "PowersteerError" or (
                call.func.id == "ValueError" and not module.startswith("data/prepare/sources/")
            ):
                found |= {Message(module, text) for text in _texts(call.args[0], functions, constants)}
    return sorted(found)


def by_marker(page: str, found: list[Message]) -> tuple[dict[str, list[Message]], list[Message]]:
    """Which marker of the page lists which messages, and those that none lists.

    Markers with words come first; of modules, the one that names a message's module most closely has it.
    """
    markers = {match[0]: (match[1], match[2].split(", ")) for match in MARKER.finditer(page)}
    listed: dict[str, list[Message]] = {marker: [] for marker in markers}
    left: list[Message] = []
    for message in found:
        fits: list[tuple[int, str]] = []
        for marker, (kind, names) in markers.items():
            for name in names:
                if kind == "with" and name in message.text:
                    fits.append((1000, marker))
                elif kind == "in" and (message.module == name or (name[-1] == "/" and message.module.startswith(name))):
                    fits.append((len(name), marker))
        if fits:
            listed[max(fits)[1]].append(message)
        else:
            left.append(message)
    return listed, left


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name.isupper() and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield name, value.value


def _texts(node: ast.expr, functions: dict[str, ast.FunctionDef], constants: dict[str, str]) -> Iterator[str]:
    """What the expression may say: of a function of the same module, what it returns."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        for inner in ast.walk(functions[node.func.id]):
            if isinstance(inner, ast.Return) and inner.value is not None:
                yield from _texts(inner.value, functions, constants)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else _filled(part, constants) for part in node.values
        ]
        yield re.sub(r"…(, …)+", "…", "".join(parts))


def _filled(part: ast.expr, constants: dict[str, str]) -> str:
    value = part.value if isinstance(part, ast.FormattedValue) else part
    return constants.get(value.id, "…") if isinstance(value, ast.Name) else "…"
