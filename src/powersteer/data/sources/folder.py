"""A folder of pictures, with whatever lies beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powersteer.conditions.extractor import Box, Subject, Task
from powersteer.conditions.tensors import read_features
from powersteer.data.sources.base import Choice, Item, Loaded, Wanted, pictures_in, read_bytes, read_text
from powersteer.data.sources.frame import open_drawing, open_frame, open_index
from powersteer.errors import PowersteerError

METADATA = "metadata.jsonl"
SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
"""Folders that hold a split, where there is one of training and one held out."""


class Folder:
    """Pictures of one's own.

    Captions are in ``NAME.txt``, or in a ``metadata.jsonl`` with ``file_name`` and ``text``, which may also give
    ``boxes`` (``[{"label": "cat", "box": [left, top, right, bottom]}]``), ``concept``, ``drawing_file_name``,
    ``labels_file_name`` (class numbers; 255 is none) and ``features_file_name`` (``.npy``); ``NAME.npy`` is found too.

    Args:
        root: The folder; with ``train`` and ``validation`` (or ``val``, ``test``) in it, these are its splits.
    """

    licence = "that of the pictures"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"folder {root.resolve().name}"

    @staticmethod
    def fits(root: Path) -> bool:
        """Whether it is one."""
        return root.is_dir()

    def choice(self, task: Task) -> Choice:
        """The task's own."""
        return Choice()

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """By name."""
        found = {split: self.root / name for split, names in SPLITS.items() for name in names}
        splits = {split: folder for split, folder in found.items() if folder.is_dir()}
        if "train" not in splits or len(splits) == 1:
            splits = {"train": self.root}
        items = [item for split, folder in splits.items() for item in self._split(split, folder, wanted)]
        if not items:
            raise PowersteerError(f"{self.root} holds no pictures")
        return items

    def _split(self, split: str, folder: Path, wanted: Wanted) -> list[Item]:
        rows = _metadata(folder)
        listed = {folder / name: row for name, row in rows.items()}
        paths = list(listed) if rows else list(pictures_in(folder))
        beside = [str(row[column]) for row in rows.values() for column in _BESIDE if row.get(column)]
        partners = {folder / name for name in beside}
        return [
            Item(
                name=path.relative_to(folder).as_posix(),
                split=split,
                load=partial(_load, path, folder, listed.get(path, {}), wanted.background),
                captions=_captions(path, listed.get(path, {})),
                concept=_text(listed.get(path, {}).get("concept")),
            )
            for path in paths
            if path not in partners
        ]


_BESIDE = ("drawing_file_name", "labels_file_name", "features_file_name")


def _load(path: Path, folder: Path, row: Mapping[str, Any], background: str) -> Loaded:
    frame = open_frame(path, background)
    drawing, labels, features = (folder / str(row[column]) if row.get(column) else None for column in _BESIDE)
    if features is None and path.with_suffix(".npy").exists():
        features = path.with_suffix(".npy")
    subject = Subject(
        frame.picture,
        drawing=_drawing(drawing, frame.picture.size) if drawing else None,
        labels=frame.labels(_classes(open_index(labels))) if labels else None,
        boxes=_boxes(row["boxes"]) if row.get("boxes") is not None else None,
        features=read_features(read_bytes(features), str(features)).astype(np.float32) if features else None,
    )
    return Loaded(subject, frame.content, frame.suffix)


def _metadata(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by the picture's name; nothing without a file of them."""
    path = folder / METADATA
    rows: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return rows
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise PowersteerError(f"{path}, line {number}: not a JSON object with a file_name")
        if row["file_name"] in rows:
            raise PowersteerError(f"{path}, line {number}: '{row['file_name']}' comes twice")
        rows[row["file_name"]] = row
    if not rows:
        raise PowersteerError(f"{path} is empty: give one JSON object a line, or no such file")
    return rows


def _captions(path: Path, row: Mapping[str, Any]) -> tuple[str, ...]:
    given = row.get("text")
    if given is None and path.with_suffix(".txt").exists():
        given = read_text(path.with_suffix(".txt")).strip()
    return tuple(str(text) for text in (given if isinstance(given, list) else [given]) if text)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _boxes(given: Any) -> tuple[Box, ...]:
    try:
        return tuple(Box(str(one["label"]), *map(float, _four(one["box"]))) for one in given)
    except (KeyError, TypeError, ValueError):
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
