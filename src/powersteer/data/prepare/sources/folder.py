"""A folder of pictures, with whatever lies beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powersteer.conditions.arrays import read_features
from powersteer.conditions.extractor import Box, Subject, Task
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, is_folder, read_bytes
from powersteer.core.text import json_lines, parse_object, read_text
from powersteer.data.layouts.base import alone, files_in, inside, pictures_in, texts_of
from powersteer.data.prepare.sources.base import Choice, Item, Loaded, Wanted, name_of, plain_name
from powersteer.data.prepare.sources.frame import open_drawing, open_frame, open_index
from powersteer.data.splits import Split, is_held_out, split_of

METADATA = "metadata.jsonl"
_BESIDE = ("drawing_file_name", "labels_file_name", "features_file_name")
_Row = tuple[str, dict[str, Any]]
"""Where it stands, and what it says."""


class Folder:
    """Pictures of one's own.

    Captions are in ``NAME.txt``, or in a ``metadata.jsonl`` with ``file_name`` and ``text``, which may also give
    ``boxes`` (``[{"label": "cat", "box": [left, top, right, bottom]}]``), ``concept``, ``drawing_file_name``,
    ``labels_file_name`` (class numbers; 255 is none) and ``features_file_name`` (``.npy``); ``NAME.npy`` is found too.

    Args:
        root: The folder. A folder ``validation`` or ``test`` in it (or ``val``, …: `powersteer.data.splits`) is held
            out; what is trained on is then its folder ``train`` or, without one, all the rest.
    """

    licence = "that of the pictures"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"folder {plain_name(root.resolve().name)}"
        self.unused: dict[str, list[str]] = {}
        self._used: set[str] = set()

    @staticmethod
    def fits(root: Path) -> bool:
        """Whether it is one."""
        return is_folder(root)

    def choice(self, task: Task) -> Choice:
        """The task's own."""
        return Choice()

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """By name."""
        splits = self._splits()
        items = [item for split, folder in splits.items() for item in self._split(split, folder, wanted)]
        if not items:
            raise PowersteerError(f"{self.root} holds no pictures")
        self.unused = {}
        for path in sorted(map(Path, files_in(self.root))):
            if os.path.normpath(path) not in self._used:
                self.unused.setdefault(self._why_unused(path, splits), []).append(name_of(path, self.root))
        return items

    def _splits(self) -> dict[Split, Path]:
        found: dict[Split, list[Path]] = {}
        for path in inside(self.root):
            split = split_of(path.name)
            if split is not None and is_folder(path):
                found.setdefault(split, []).append(path)
        splits: dict[Split, Path] = {"train": self.root}
        if not set(found) - {"train"}:
            return splits
        for split, folders in found.items():
            alone(str(self.root), split, [folder.name for folder in folders])
        if "train" in found and is_file(self.root / METADATA):
            folder = found["train"][0]
            raise PowersteerError(
                f"{self.root / METADATA} is not read, as {folder} is there: write one in each split's folder"
            )
        splits.update({split: folders[0] for split, folders in found.items()})
        return splits

    def _split(self, split: Split, folder: Path, wanted: Wanted) -> list[Item]:
        is_training = split == "train"
        rows = _metadata(folder, is_training)
        files = map(Path, files_in(folder, held_out=[] if is_training else None))
        elsewhere = next((path for path in files if path.name == METADATA and path.parent != folder), None)
        if elsewhere is not None:
            raise PowersteerError(f"{elsewhere} is not read: give {elsewhere.parent} as the source, or move it up")
        named = (row[column] for _, row in rows.values() for column in _BESIDE if row.get(column))
        partners = {folder / os.path.normpath(name) for name in named}
        paths = list(rows) if rows else list(pictures_in(folder, held_out=not is_training))
        self._use(folder / METADATA, *paths, *partners)
        owners: dict[Path, Path] = {}
        return [
            self._item(split, folder, path, *rows.get(path, (str(path), {})), owners, wanted)
            for path in paths
            if path not in partners
        ]

    def _item(
        self,
        split: Split,
        folder: Path,
        path: Path,
        where: str,
        row: Mapping[str, Any],
        owners: dict[Path, Path],
        wanted: Wanted,
    ) -> Item:
        captions = texts_of(where, row, "text")
        own_text, own_features = row.get("text") is not None, row.get("features_file_name") is not None
        for file, is_wanted in ((path.with_suffix(".txt"), not own_text), (path.with_suffix(".npy"), not own_features)):
            if is_wanted and is_file(file):
                owner = owners.setdefault(file, path)
                if owner != path:
                    raise PowersteerError(f"'{owner}' and '{path}' both claim {file}: rename one of the pictures")
                self._use(file)
                if file.suffix == ".txt":
                    captions = (read_text(file).strip(),)
        load = partial(_load, path, folder, row, wanted.background)
        said = tuple(text for text in captions if text.strip())
        return Item(name_of(path, folder), split, load, said, _concept(where, row))

    def _use(self, *files: Path) -> None:
        self._used |= {os.path.normpath(file) for file in files}

    def _why_unused(self, path: Path, splits: Mapping[Split, Path]) -> str:
        held_first = sorted(splits.items(), key=lambda one: one[0] == "train")
        split, folder = next((one for one in held_first if path.is_relative_to(one[1])), (None, self.root))
        if split is None:
            return f"lie outside of {', '.join(folder.name for folder in splits.values())}"
        if split == "train" and any(map(is_held_out, path.relative_to(folder).parts[:-1])):
            return "lie in folders of held-out pictures"
        return f"are in no row of {METADATA}" if is_file(folder / METADATA) else "are no pictures, and belong to none"


def _load(path: Path, folder: Path, row: Mapping[str, Any], background: str) -> Loaded:
    frame = open_frame(path, background)
    drawing, labels, features = (folder / row[column] if row.get(column) else None for column in _BESIDE)
    if features is None and is_file(path.with_suffix(".npy")):
        features = path.with_suffix(".npy")
    subject = Subject(
        frame.picture,
        drawing=_drawing(drawing, frame.picture.size) if drawing else None,
        labels=frame.labels(_classes(open_index(labels))) if labels else None,
        boxes=_boxes(row["boxes"]) if row.get("boxes") is not None else None,
        features=read_features(read_bytes(features), str(features)).astype(np.float32) if features else None,
    )
    return Loaded(subject, frame.content, frame.suffix)


def _metadata(folder: Path, is_training: bool) -> dict[Path, _Row]:
    """Rows by the picture's file; nothing without a file of them."""
    path = folder / METADATA
    rows: dict[Path, _Row] = {}
    if not is_file(path):
        return rows
    for number, line in json_lines(read_text(path), str(path)):
        where = f"{path}, line {number}"
        row = parse_object(line, where)
        for column in ("file_name", *_BESIDE):
            name = row.get(column)
            if not isinstance(name, str | None) or (column == "file_name" and not name):
                raise PowersteerError(f"{where}: '{column}' must name a file, not {str(name)[:40] or 'nothing'}")
        name: Any = os.path.normpath(row["file_name"])
        if folder / name in rows:
            raise PowersteerError(f"{where}: '{name}' comes twice, first in {rows[folder / name][0]}")
        if is_training and any(map(is_held_out, Path(name).parts[:-1])):
            raise PowersteerError(
                f"{where}: '{name}' lies in a folder of held-out pictures: move the row to a {METADATA} there"
            )
        rows[folder / name] = where, row
    if not rows:
        raise PowersteerError(f"{path} is empty: give one JSON object a line, or no such file")
    return rows


def _concept(where: str, row: Mapping[str, Any]) -> str | None:
    value = row.get("concept")
    if not isinstance(value, str | int | None):
        raise PowersteerError(f"{where}: 'concept' must be a word or a number, not {str(value)[:40]}")
    return None if value is None else str(value)


def _boxes(given: Any) -> tuple[Box, ...]:
    try:
        return tuple(Box(str(one["label"]), *map(float, _four(one["box"]))) for one in given)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise PowersteerError(
            'boxes must be [{"label": "cat", "box": [left, top, right, bottom]}, …], in pixels'
        ) from None


def _four(box: Sequence[Any]) -> Sequence[Any]:
    if len(box) != 4:
        raise ValueError
    return box


def _classes(stored: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.where(stored == 255, -1, stored)


def _drawing(path: Path, size: tuple[int, int]) -> Any:
    drawing = open_drawing(path)
    if drawing.size != size:
        raise PowersteerError(
            f"{path} has {drawing.width}×{drawing.height} pixels, its picture {size[0]}×{size[1]}: they must be equal"
        )
    return drawing
