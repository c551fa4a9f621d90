"""How people lay out pairs: one small class each, found out by looking; a new layout is one more class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from powersteer.core.errors import PowersteerError, PowersteerWarning
from powersteer.core.files import is_folder
from powersteer.data.layouts.base import (
    PICTURE_SUFFIXES,
    Columns,
    Layout,
    ReadRow,
    Seen,
    files_in,
    inside,
    listed,
)
from powersteer.data.layouts.basenames import Basenames
from powersteer.data.layouts.json_lines import JsonLines, controlnet, image_folder
from powersteer.data.layouts.shards import WebDataset, key_and_kind, shard_row
from powersteer.data.layouts.tables import SavedDataset, hub_table, table_rows
from powersteer.data.rows import Row
from powersteer.data.splits import is_held_out

__all__ = [
    "HELP", "LAYOUTS", "PICTURE_SUFFIXES", "Columns", "Found", "Layout", "WebDataset", "hub_rows", "key_and_kind",
    "look", "read_rows", "shard_row",
]  # fmt: skip

HELP = (
    "it needs a metadata.jsonl (file_name, conditioning_image_file_name, text), a prompt.json (source, target, "
    "prompt), images/ and conditioning_images/ with the same names, *.tar shards (KEY.image.png, "
    "KEY.conditioning_image.png, KEY.txt), or what datasets' save_to_disk wrote"
)
LAYOUTS: tuple[Layout, ...] = (
    JsonLines("metadata.jsonl", image_folder),
    JsonLines("prompt.json", controlnet),
    WebDataset(),
    SavedDataset(),
    Basenames(),
)
_OURS = ("dataset.json", "rejected.csv", "license", "readme", "notice")
"""Beginnings of names of files that lie beside pairs and are none."""


@dataclass(frozen=True)
class Found:
    """What a folder of pairs holds."""

    rows: list[Row]
    faults: list[str]
    """What is wrong with the rows that are not whole."""
    left_out: list[str]
    """Files, and members of shards, that are in no pair."""
    held_out: list[str]
    """Folders in it that by their name hold a validation or test split: nothing is taken from there."""
    from_held_out: list[Row]
    """Rows that name pictures in such folders all the same."""


def read_rows(folder: Path, columns: Columns | None = None, faults: list[str] | None = None) -> list[Row]:
    """The pairs of a folder, in whichever layout it has; warns of files that are in no pair.

    Args:
        folder: The folder.
        columns: What a layout with named columns calls them.
        faults: Where malformed rows are noted and passed over, and nobody is warned; without it, the first is raised.

    Raises:
        PowersteerError: No layout fits, there are no pairs, a name is claimed twice, or a row is malformed or names a
            file that is not there; row, file and column are named.
    """
    found = look(folder, columns)
    if faults is not None:
        faults += found.faults
        return found.rows
    if found.faults:
        raise PowersteerError(found.faults[0])
    if found.left_out:
        _warn(f"{folder}: {len(found.left_out)} files are in no pair, such as {found.left_out[0]}")
    if found.from_held_out:
        row = found.from_held_out[0]
        _warn(f"{len(found.from_held_out)} pairs lie in folders of held-out pictures, such as {row.image}")
    return found.rows


def look(folder: Path, columns: Columns | None = None) -> Found:
    """All that a folder of pairs holds; see `read_rows`.

    Raises:
        PowersteerError: No layout fits, there are no pairs, or what describes them all is malformed.
    """
    columns = columns or Columns()
    if not is_folder(folder):
        raise PowersteerError(f"there is no folder of pairs {folder}")
    layout = _layout_of(folder)
    if layout is None:
        fitting = next((path for path in inside(folder) if is_folder(path) and _layout_of(path)), None)
        hint = f"; did you mean {fitting}?" if fitting else ""
        raise PowersteerError(f"{folder} holds no pairs that can be read: {HELP}{hint}")
    seen = Seen()
    rows, faults = _whole(layout.rows(folder, columns, seen), str(folder), columns, seen)
    if not rows and not faults:
        raise PowersteerError(f"{folder} has no rows")
    held_out: list[str] = []
    files = files_in(Path(os.path.normpath(folder)), held_out=held_out)
    left_out = sorted(file for file in files if file not in seen.files and not _is_ours(file))
    places = [str(row.image.file.parent) if row.image.file else "" for row in rows]
    there = {place for place in {*places} - {""} if any(map(is_held_out, Path(os.path.relpath(place, folder)).parts))}
    lie_there = [row for row, place in zip(rows, places, strict=True) if place in there]
    return Found(rows, faults, left_out + seen.left_out, sorted(held_out), lie_there)


def hub_rows(name: str, config_name: str | None, split: str, columns: Columns) -> list[Row]:
    """The pairs of a data set on the Hub, or in a folder that `datasets` can load.

    Args:
        name: ``user/name``.
        config_name: Its configuration, where it has several.
        split: Such as ``train``.
        columns: What it calls its columns.

    Raises:
        PowersteerError: It cannot be loaded, or a column is missing.
    """
    seen, where = Seen(), f"{name}/{split}"
    table = hub_table(name, config_name, split)
    rows, faults = _whole(table_rows(table, where, columns, seen), where, columns, seen)
    if faults:
        raise PowersteerError(faults[0])
    return rows


def _whole(reads: Iterator[ReadRow], where: str, columns: Columns, seen: Seen) -> tuple[list[Row], list[str]]:
    """The rows that are whole, and what is wrong with the others."""
    rows: list[Row] = []
    faults: list[str] = []
    pairs: dict[tuple[str, str], str] = {}
    for read in reads:
        try:
            row = read()
            pair = os.path.normpath(row.image.name), os.path.normpath(row.conditioning_image.name)
            earlier = pairs.setdefault(pair, row.where)
            if earlier != row.where:
                raise PowersteerError(
                    f"{row.where}: the same picture and condition as {earlier}: remove one; several captions are a "
                    "list in one row"
                )
        except PowersteerError as error:
            faults.append(str(error))
        else:
            rows.append(row)
    usual = Columns()
    for column, given, is_there in (
        (columns.text, columns.text != usual.text, any(row.texts for row in rows)),
        (columns.generated_text, columns.generated_text != usual.generated_text, any(r.generated_text for r in rows)),
    ):
        if given and rows and not is_there:
            raise PowersteerError(f"{where}: no row has a text in column '{column}'; there are {listed(seen.columns)}")
    return rows, faults


def _layout_of(folder: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(folder)), None)


def _is_ours(file: str) -> bool:
    return file.rpartition(os.sep)[2].lower().startswith(_OURS)


def _warn(text: str) -> None:
    warnings.warn(text, PowersteerWarning, stacklevel=3)
