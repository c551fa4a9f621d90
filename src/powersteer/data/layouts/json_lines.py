"""``metadata.jsonl`` and ControlNet's ``prompt.json``: one JSON object a line, that names files of the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file
from powersteer.core.text import json_lines, parse_object, read_text
from powersteer.data.layouts.base import Columns, ReadRow, Seen, generated_of, listed, texts_of
from powersteer.data.rows import Picture, Row


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line, that names files of the folder."""

    file: str
    names: Callable[[Columns], Columns]
    """What a row calls its columns, given the user's names."""

    def fits(self, folder: Path) -> bool:
        """Whether there is the file."""
        return is_file(folder / self.file)

    def rows(self, folder: Path, columns: Columns, seen: Seen) -> Iterator[ReadRow]:
        """One a line."""
        path = seen.take(folder / self.file)
        lines = json_lines(read_text(path), str(path))
        return (partial(self._row, folder, f"{folder.name}[{i - 1}]", line, columns, seen) for i, line in lines)

    def _row(self, folder: Path, where: str, line: str, columns: Columns, seen: Seen) -> Row:
        row, names = parse_object(line, where), self.names(columns)
        seen.columns.update(row)
        # People write a column plainly; `datasets` would take it for text.
        image, condition = (
            plain if plain in row and name not in row else name
            for plain, name in (
                (columns.image, names.image),
                (columns.conditioning_image, names.conditioning_image),
            )
        )
        pictures = _file(where, row, image, folder, seen), _file(where, row, condition, folder, seen)
        texts = texts_of(where, row, names.text)
        lacks = (
            f"column '{names.text}' is empty" if names.text in row else f"no column '{names.text}', but {listed(row)}"
        )
        return Row(where, *pictures, texts, generated_of(where, row, names), "" if texts else lacks)


def image_folder(columns: Columns) -> Columns:
    """Hugging Face ImageFolder: pictures in columns that end in ``file_name``."""
    image = "file_name" if columns.image == "image" else f"{columns.image}_file_name"
    return replace(columns, image=image, conditioning_image=f"{columns.conditioning_image}_file_name")


def controlnet(columns: Columns) -> Columns:
    """ControlNet's tutorial: ``source`` is the condition; what the user names otherwise is called so."""
    usual = {"image": "target", "conditioning_image": "source", "text": "prompt"}
    return replace(columns, **{own: name for own, name in usual.items() if getattr(columns, own) == own})


def _file(where: str, row: Mapping[str, Any], column: str, folder: Path, seen: Seen) -> Picture:
    name = row.get(column)
    if column not in row:
        raise PowersteerError(f"{where}: column '{column}' is missing; there are {listed(row)}")
    if not isinstance(name, str) or not name:
        raise PowersteerError(f"{where}: column '{column}' holds {str(name)[:40] or 'nothing'}, which names no file")
    path = seen.take(folder / name)
    if not is_file(path):
        raise PowersteerError(f"{where}: '{path}' not found (column {column})")
    return Picture(str(path), column, path.read_bytes, path)
