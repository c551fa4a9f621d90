"""COCO 2017, as it is unpacked: ``train2017/``, ``val2017/`` and ``annotations/*.json``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powersteer.conditions.extractor import Box, Subject, Task
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, is_folder
from powersteer.data.layouts.base import alone, files_in, inside, pictures_in
from powersteer.data.prepare.sources.base import Choice, Item, Loaded, Wanted, name_of
from powersteer.data.prepare.sources.frame import Frame, open_frame, open_index
from powersteer.data.prepare.sources.json_scan import Span, read_spans, scan
from powersteer.data.prepare.sources.masks import coco_tools, to_mask

SPLITS = {"train": "train2017", "validation": "val2017"}
CATEGORIES = 182
"""Ids of things (1 to 90) and stuff (92 to 182); class number = id − 1."""
PIXELMAPS = ("stuffthingmaps", "stuffthingmaps_trainval2017")
"""Folders where people unpack COCO-Stuff's label maps: class numbers, 255 for none."""


class Coco:
    """COCO 2017.

    Args:
        root: With the pictures' folders and ``annotations``: ``captions_….json``, and for segmentation COCO-Stuff's
            label maps or ``instances_….json`` and ``stuff_….json``, for layout ``instances_….json``.
    """

    name = "COCO 2017"
    licence = "annotations CC BY 4.0; each picture has a licence of its own on Flickr, see COCO's terms of use"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unused: dict[str, list[str]] = {}

    @staticmethod
    def fits(root: Path) -> bool:
        """Whether a folder looks like it."""
        return any(is_folder(root / folder) for folder in SPLITS.values())

    def choice(self, task: Task) -> Choice:
        """COCO-Stuff's classes."""
        return Choice(settings={"palette": "coco-stuff"}) if task in ("segmentation", "layout") else Choice()

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """By split and file name: what the annotations list, and whatever else is there."""
        splits = {split: folder for split, folder in SPLITS.items() if is_folder(self.root / folder)}
        items = [item for split, folder in splits.items() for item in self._split(split, folder, wanted)]
        if not items:
            raise PowersteerError(f"{self.root} holds no pictures in {' or '.join(SPLITS.values())}")
        ours = ("annotations", *PIXELMAPS, *splits.values())
        unused = [path.name for path in inside(self.root) if path.name not in ours]
        pictures = {path for folder in splits.values() for path in pictures_in(self.root / folder)}
        files = (path for folder in splits.values() for path in sorted(map(Path, files_in(self.root / folder))))
        unused += [name_of(path, self.root) for path in files if path not in pictures]
        self.unused = {"are none of COCO 2017's": unused} if unused else {}
        return items

    def _split(self, split: str, folder: str, wanted: Wanted) -> list[Item]:
        known = self._known(folder, wanted.task)
        present = {path.relative_to(self.root / folder).as_posix() for path in pictures_in(self.root / folder)}
        items: list[Item] = []
        taken: dict[str, str] = {}
        for name in sorted(present | set(known)):
            about = known.get(name, _About())
            maps = self._maps(folder) if wanted.task == "segmentation" else None
            index = (maps / name).with_suffix(".png") if maps else None
            load = partial(_load, self.root / folder / name, wanted, index, about)
            # A picture of COCO has one number, whichever year's folder it lies in.
            concept = Path(name).stem.rpartition("_")[2]
            item = Item(name_of(Path(name).with_suffix(""), Path()), split, load, about.captions, concept)
            items.append(item)
            twin = taken.setdefault(item.name, name)
            alone(str(self.root / folder), item.name, list(dict.fromkeys((twin, name))))
        return items

    def _maps(self, folder: str) -> Path | None:
        return next((self.root / name / folder for name in PIXELMAPS if is_folder(self.root / name / folder)), None)

    def _known(self, folder: str, task: Task) -> dict[str, _About]:
        """What the annotations of a split say of its pictures, by file name."""
        annotations = self.root / "annotations"
        wanted: list[Path] = []
        if task == "layout" or (task == "segmentation" and self._maps(folder) is None):
            wanted.append(annotations / f"instances_{folder}.json")
            if not is_file(wanted[0]):
                raise PowersteerError(f"{task} needs {wanted[0]}: unpack COCO's annotations there")
        if task == "segmentation" and wanted:
            coco_tools()  # not once for each picture
        stuff = annotations / f"stuff_{folder}.json"
        if task == "segmentation" and wanted and is_file(stuff):
            wanted.insert(0, stuff)  # things lie on top
        pictures: dict[str, _About] = {}
        captions = annotations / f"captions_{folder}.json"
        if is_file(captions):
            images, texts, _ = _read(captions, keep_text=True)
            pictures = {name: _About(size, tuple(texts.get(id_, ()))) for id_, (name, size) in images.items()}
        for path in wanted:
            images, spans, names = _read(path, keep_text=False)
            for id_, (name, size) in images.items():
                about = pictures.get(name, _About())
                marks = (*about.marks, _Marks(path, tuple(spans.get(id_, ())), names))
                pictures[name] = _About(size, about.captions, marks)
        return pictures


@dataclass(frozen=True)
class _Marks:
    """Where the annotations of one picture lie in one file."""

    path: Path
    spans: tuple[Span, ...]
    names: Mapping[int, str]
    """The names of the categories, by id."""


@dataclass(frozen=True)
class _About:
    size: tuple[int, int] | None = None
    captions: tuple[str, ...] = ()
    marks: tuple[_Marks, ...] = field(default=())


def _read(path: Path, *, keep_text: bool) -> tuple[dict[int, tuple[str, tuple[int, int]]], Any, dict[int, str]]:
    """(name and size of the images, captions or places of the annotations, names of the categories), all by id."""
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    found: defaultdict[int, list[Any]] = defaultdict(list)
    names: dict[int, str] = {}
    keys: set[str] = set()
    files: dict[str, int] = {}
    for key, record, span in scan(path):
        keys.add(key)
        if key not in _FIELDS:
            continue
        values = [_field(path, key, record, name, kind) for name, kind in _FIELDS[key].items()]
        if key == "images":
            id_, name, width, height = values
            if id_ in images or name in files:
                raise PowersteerError(f"{path}: the image {id_}, '{name}', comes twice")
            images[id_], files[name] = (name, (width, height)), id_
        elif key == "annotations":
            said = (span, _field(path, key, record, "caption", str)) if keep_text else span
            found[values[0]].append(said)
        else:
            names[values[0]] = values[1]
    if "images" not in keys:
        raise PowersteerError(f"{path} is not COCO's JSON: it has no 'images'")
    if keep_text:
        return images, {id_: [_caption(path, *one) for one in texts] for id_, texts in found.items()}, names
    return images, found, names


_FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int},
    "categories": {"id": int, "name": str},
}
"""What a record must have."""


def _field(path: Path, key: str, record: Any, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise PowersteerError(f"{path} is not COCO's JSON: a record of '{key}' has no '{name}'")
    if type(record[name]) is not kind:
        wanted = "a whole number" if kind is int else "text"
        raise PowersteerError(
            f"{path} is not COCO's JSON: '{name}' of '{key}' is {str(record[name])[:40]}, not {wanted}"
        )
    return record[name]


def _caption(path: Path, span: Span, latin: str) -> str:
    """Captions of plain letters are right already; the few others are read again."""
    return " ".join((latin if latin.isascii() else read_spans(path, (span,))[0]["caption"]).split())


def _load(path: Path, wanted: Wanted, index: Path | None, about: _About) -> Loaded:
    frame = open_frame(path, wanted.background)
    labels = boxes = None
    if index is not None:
        stored = open_index(index)
        labels = frame.labels(np.where(stored == 255, -1, stored))
        if labels.max() >= CATEGORIES:
            raise PowersteerError(f"{index}: class {labels.max()} is outside COCO-Stuff's palette of {CATEGORIES}")
    elif about.marks and about.size is not None:
        frame.boxes((), about.size)  # before anything of that size is made
        try:
            if wanted.task == "segmentation":
                labels = frame.labels(_labels(about.marks, about.size))
            else:
                boxes = _boxes(frame, about.marks, about.size)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, PowersteerError):
                raise
            raise PowersteerError(f"an annotation of {path} is not as COCO has them: {error!r}") from None
    return Loaded(Subject(frame.picture, labels=labels, boxes=boxes), frame.content, frame.suffix)


def _labels(marks: tuple[_Marks, ...], size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Class numbers (H, W); within a file the larger first, so that what is small lies on top."""
    labels = np.full((size[1], size[0]), -1, dtype=np.int64)
    for mark in marks:
        for record in sorted(read_spans(mark.path, mark.spans), key=lambda one: -float(one.get("area", 0))):
            if record["category_id"] <= CATEGORIES:  # stuff's 183 stands for all things
                labels[to_mask(record["segmentation"], size)] = record["category_id"] - 1
    return labels


def _boxes(frame: Frame, marks: tuple[_Marks, ...], size: tuple[int, int]) -> tuple[Box, ...]:
    """The boxes of single things; a crowd's box says nothing of where one of them is."""
    boxes: list[Box] = []
    for mark in marks:
        for record in read_spans(mark.path, mark.spans):
            if not record.get("iscrowd"):
                x, y, width, height = record["bbox"]
                boxes.append(Box(mark.names[record["category_id"]], x, y, x + width, y + height))
    return frame.boxes(tuple(boxes), size)
