"""ADE20K's scene parsing benchmark, as it is unpacked: ``images/`` and ``annotations/`` by split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from powersteer.conditions.extractor import Subject, Task
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, is_folder
from powersteer.core.text import read_text
from powersteer.data.layouts.base import alone, files_in, inside, pictures_in
from powersteer.data.prepare.sources.base import Choice, Item, Loaded, Wanted, name_of
from powersteer.data.prepare.sources.frame import open_frame, open_index

CLASSES = 150
SPLITS = {"train": "training", "validation": "validation"}
SCENES = "sceneCategories.txt"
"""``ADE_train_00000001 airport_terminal``, one a line: what stands for a caption."""


class Ade20k:
    """ADE20K.

    Args:
        root: With ``images/training``, ``images/validation`` and the same under ``annotations``: PNGs of class
            numbers, where 0 is anything else and 1 to 150 are the classes.
    """

    name = "ADE20K scene parsing"
    licence = "images for non-commercial research and education, annotations BSD-3-Clause; see ADE20K's terms"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unused: dict[str, list[str]] = {}

    @staticmethod
    def fits(root: Path) -> bool:
        """Whether a folder looks like it."""
        return any(is_folder(root / "images" / folder) for folder in SPLITS.values())

    def choice(self, task: Task) -> Choice:
        """The data set's own colours for its classes."""
        return Choice(settings={"palette": "ade20k"}) if task == "segmentation" else Choice()

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """By split and name."""
        scenes = self._scenes()
        annotations = self.root / "annotations"
        if wanted.task == "segmentation" and not is_folder(annotations):
            raise PowersteerError(f"{self.root} has no annotations: unpack them beside images/")
        items: list[Item] = []
        taken: dict[tuple[str, str], Path] = {}
        for split, folder in SPLITS.items():
            if not is_folder(self.root / "images" / folder):
                continue
            for path in pictures_in(self.root / "images" / folder):
                name = path.relative_to(self.root / "images" / folder).with_suffix("")
                index = (annotations / folder / name).with_suffix(".png") if wanted.task == "segmentation" else None
                load = partial(_load, path, index, wanted.background)
                scene = scenes.get(path.stem)
                item = Item(
                    name_of(path.with_suffix(""), self.root / "images" / folder),
                    split,
                    load,
                    (scene,) if scene else (),
                    path.stem,
                )
                items.append(item)
                twin = taken.setdefault((split, item.name), path)
                alone(str(self.root), item.name, [str(one) for one in dict.fromkeys((twin, path))])
        if not items:
            raise PowersteerError(f"{self.root / 'images'} holds no pictures")
        files, used = sorted(map(Path, files_in(self.root / "images"))), set(taken.values())
        unused = [str(path.relative_to(self.root)) for path in files if path not in used]
        unused += [path.name for path in inside(self.root) if path.name not in ("images", "annotations", SCENES)]
        self.unused = {"are none of the scene parsing benchmark's": unused} if unused else {}
        return items

    def _scenes(self) -> dict[str, str]:
        path = self.root / SCENES
        if not is_file(path):
            return {}
        pairs = (line.split(maxsplit=1) for line in read_text(path).split("\n"))
        named = {pair[0]: pair[1].replace("_", " ").strip() for pair in pairs if len(pair) == 2}
        return {name: scene for name, scene in named.items() if scene != "misc"}


def _load(path: Path, index: Path | None, background: str) -> Loaded:
    frame = open_frame(path, background)
    labels = None
    if index is not None:
        stored = open_index(index)
        if stored.max() > CLASSES:
            raise PowersteerError(f"{index}: class {stored.max()} is outside ADE20K's palette of {CLASSES}")
        labels = frame.labels((stored - 1).astype(np.int64))
    return Loaded(Subject(frame.picture, labels=labels), frame.content, frame.suffix)
