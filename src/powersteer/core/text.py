"""The door for text: UTF-8, JSON, JSON Lines and YAML. Each function returns a value, or raises the one error."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes

MAX_DEPTH = 100
"""The most levels of lists and mappings within one another."""
MAX_DIGITS = 300
"""The most digits that a whole number in JSON may have."""
MAX_YAML_VALUES = 100_000
"""The most values of one YAML document, aliases written out."""
_OTHER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"} | {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """A text file's content, without a byte-order mark.

    Raises:
        PowersteerError: It cannot be read, or is not UTF-8 text.
    """
    return decode_text(read_bytes(path), str(path))


def decode_text(content: bytes, where: str) -> str:
    """UTF-8 text, without a byte-order mark.

    Args:
        content: The bytes.
        where: The file, for messages.

    Raises:
        PowersteerError: It is not UTF-8, or holds NUL, as no text does.
    """
    kind = next((name for mark, name in _OTHER_MARKS.items() if content.startswith(mark)), None)
    try:
        if kind is None and b"\0" not in content:
            return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise PowersteerError(f"{where} is not UTF-8 text{f' but {kind}' if kind else ''}: save it as UTF-8")


def parse_json(content: str | bytes, where: str) -> Any:
    """The value of a JSON text (RFC 8259): no NaN, no infinite number, no name twice in one object.

    Args:
        content: The text, or its bytes.
        where: The file, or the line of it, for messages.

    Raises:
        PowersteerError: It is not JSON, or nested deeper than `MAX_DEPTH`.
    """
    text = decode_text(content, where) if isinstance(content, bytes) else content
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
        _check(value)
    except PowersteerError:
        raise
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise PowersteerError(f"{where} is not JSON: {error.msg.lower()}, {place}") from None
    except Exception as error:  # a number of too many digits, nesting beyond the parser's own stack
        raise PowersteerError(f"{where} is not JSON: {_reason(error)}") from None
    return value


def json_decoder() -> json.JSONDecoder:
    """Reads a value out of a longer text as `parse_json` does, but for nesting and half characters."""
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)


def parse_object(content: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text; see `parse_json`.

    Raises:
        PowersteerError: It is not JSON, or JSON of another kind.
    """
    value = parse_json(content, where)
    if not isinstance(value, dict):
        raise PowersteerError(f"{where} is not a JSON object but {_kind(value)}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; see `parse_object`."""
    return parse_object(read_bytes(path), str(path))


def to_json(values: Any) -> str:
    """Plain values as a JSON text in ASCII; a number that is not finite becomes null."""
    return json.dumps(_with_null(values), indent=2)


def json_lines(text: str, where: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank; only a line feed ends one, with or without ``\\r``.

    Args:
        text: JSON Lines.
        where: The file, for messages.

    Raises:
        PowersteerError: It is one JSON array instead.
    """
    if text.lstrip().startswith("["):
        raise PowersteerError(f"{where} is one JSON array: write one object a line (JSON Lines), without brackets")
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document of plain values.

    Args:
        text: The document.
        where: The file, or the option, for messages.

    Raises:
        PowersteerError: It is not YAML, holds a key twice, or more than `MAX_YAML_VALUES`.
    """
    try:
        value = yaml.load(text, _Loader)
        _check(value, MAX_YAML_VALUES)
    except Exception as error:  # of the parser, the constructor of a date or number, or Python's own stack
        raise PowersteerError(f"{where} is not valid YAML: {_reason(error)}") from None
    return value


class _Loader(yaml.SafeLoader):
    """A SafeLoader that takes no key twice; PyYAML lets the last one win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(f"'{key.value}' comes twice, line {key.start_mark.line + 1}")
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' comes twice")
        found[name] = value
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_null(one) for key, one in value.items()}
    return [_with_null(one) for one in value] if isinstance(value, list | tuple) else value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"{digits[:20]}… has {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _check(value: Any, most: int | None = None) -> None:
    """Refuse nesting without end, half characters, and (``most``) more values than that."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        one, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if most is not None and seen > most:
            raise ValueError(f"more than {most} values")
        if isinstance(one, str):
            _check_string(one)
        elif isinstance(one, dict):
            waiting += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            waiting += [(part, depth + 1) for part in one]


def _check_string(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(r"it holds half a character (a lone surrogate, \ud800 to \udfff)") from None


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_DEPTH} levels"
    return " ".join(str(error).split())[:200] or type(error).__name__
