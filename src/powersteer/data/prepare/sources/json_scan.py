"""JSON files of half a gigabyte, one record at a time: where each lies is kept, not what it says."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.text import MAX_DEPTH, json_decoder, parse_object

WINDOW = 1 << 20
"""Bytes that are looked at at once; more where a record is longer."""
LONGEST = 1 << 26
"""Bytes of one record."""
_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"

Span = tuple[int, int]
"""A record's first byte, and the one after it."""


def scan(path: Path) -> Iterator[tuple[str, Any, Span]]:
    """The records of a JSON object of lists: (the list's key, the record, where it lies).

    What is not a list is passed over. JSON is read by the letter, as everywhere, but for text of more than 7 bits: read
    such a record with `read_spans`.

    Raises:
        PowersteerError: It cannot be read, or is not such a file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _Scanner(data).records()
    except OSError as error:
        raise PowersteerError(f"{path} cannot be read: {reason_of(error)}") from None
    except PowersteerError:
        raise
    except _Refused as error:
        raise PowersteerError(f"{path} is not JSON: {error}") from None
    except ValueError:
        raise PowersteerError(f"{path} is not COCO's JSON, an object of lists of records, or is cut short") from None


def read_spans(path: Path, spans: tuple[Span, ...]) -> list[dict[str, Any]]:
    """The records that `scan` found there.

    Raises:
        PowersteerError: The file cannot be read, has changed since, or a record is no object.
    """
    try:
        with path.open("rb") as file:
            return [parse_object(_slice(file, span), f"{path}, byte {span[0]}") for span in spans]
    except OSError as error:
        raise PowersteerError(f"{path} cannot be read: {reason_of(error)}") from None


def _slice(file: Any, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1] - span[0])


class _Refused(ValueError):
    """What is JSON by its form, and not by the letter."""


class _Scanner:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.window, self.start = "", 0
        self.decode = json_decoder().raw_decode

    def records(self) -> Iterator[tuple[str, Any, Span]]:
        keys: set[str] = set()
        at = self._expect(len(_MARK) if self.data[: len(_MARK)] == _MARK else 0, "{")
        while self._peek(at) != "}":
            key, at = self._value(at)
            if not isinstance(key, str):
                raise ValueError
            if key in keys:
                raise _Refused(f"'{key}' comes twice")
            keys.add(key)
            at = self._expect(at, ":")
            if self._peek(at) != "[":
                _, at = self._value(at)
            else:
                at = self._expect(at, "[")
                while self._peek(at) != "]":
                    record, end = self._value(at)
                    yield key, record, (self._skip(at), end)
                    at = self._comma(end, "]")
                at = self._expect(at, "]")
            at = self._comma(at, "}")

    def _comma(self, at: int, end: str) -> int:
        at = self._skip(at)
        return at if self._peek(at) == end else self._expect(at, ",")

    def _expect(self, at: int, character: str) -> int:
        if self._peek(at) != character:
            raise ValueError
        return self._skip(self._skip(at) + 1)

    def _peek(self, at: int) -> str:
        return self.data[(at := self._skip(at)) : at + 1].decode("latin-1")

    def _skip(self, at: int) -> int:
        while self.data[at : at + 1] and self.data[at : at + 1] in _BLANK:
            at += 1
        return at

    def _value(self, at: int) -> tuple[Any, int]:
        """The value that begins here, and where it ends."""
        at, size = self._skip(at), WINDOW
        while True:
            try:
                value, end = self.decode(self.window, at - self.start)
            except (json.JSONDecodeError, IndexError):
                end = len(self.window)
            except RecursionError:
                raise _Refused(f"nested deeper than {MAX_DEPTH} levels") from None
            except ValueError as error:
                raise _Refused(str(error)[:200]) from None
            else:
                if end < len(self.window):  # else it may go on beyond
                    return value, self.start + end
            if self.start == at and (at + len(self.window) >= len(self.data) or len(self.window) > LONGEST):
                raise ValueError
            # One character is one byte in Latin-1, so places in the text are places in the file.
            self.window, self.start = self.data[at : at + size].decode("latin-1"), at
            size *= 2
