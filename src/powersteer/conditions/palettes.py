"""Classes and their colours: ADE20K's and COCO-Stuff's, or a user's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.conditions.kind import extractor_record
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, read_bytes
from powersteer.core.text import parse_json, parse_object

BUILT_IN = ("ade20k", "coco-stuff", "openmoji")
"""``ade20k``: the 150 classes of scene parsing, in the colours in wide use; road and skyscraper share one.
``coco-stuff``: the 182 categories, things and stuff, in the order of their ids; no colours are canonical, so that of id
n is colour n of the PASCAL VOC map (`voc_colours`). ``openmoji``: the colours that its artists paint with."""
NO_LABEL = -1
"""Drawn black."""
_AT_ONCE = 1 << 20
"""Differences of colours in memory."""

Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Palette:
    """Classes by index, each with a name and a colour."""

    names: tuple[str, ...]
    colours: Pixels
    """(N, 3), RGB."""

    @classmethod
    def find(cls, name_or_path: str) -> Palette:
        """One of `BUILT_IN`, or a JSON file ``{"name": [r, g, b], …}`` of classes in order.

        Raises:
            PowersteerError: There is no such palette, or the file is no such object, or two classes share a colour.
        """
        if name_or_path in BUILT_IN:
            content = (files("powersteer.core") / "assets" / "palettes" / f"{name_or_path}.json").read_bytes()
            return cls.of_table(parse_object(content, name_or_path))
        path = Path(name_or_path)
        if not is_file(path):
            known = ", ".join(BUILT_IN)
            raise PowersteerError(f"there is no palette '{name_or_path}': give {known}, or a JSON file")
        table = parse_json(read_bytes(path), str(path))
        if not isinstance(table, dict) or not table:
            raise PowersteerError(f'{path} is no palette: it must hold {{"name": [r, g, b], …}}')
        seen: dict[tuple[int, ...], str] = {}
        for name, colour in table.items():
            if not _is_colour(colour):
                raise PowersteerError(f"{path}: '{name}' is {str(colour)[:40]}, not three whole numbers from 0 to 255")
            if (other := seen.setdefault(tuple(colour), name)) != name:
                raise PowersteerError(f"{path}: '{other}' and '{name}' have one colour, {colour}: give each its own")
        return cls.of_table(table)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Palette:
        """Classes without colours of their own, in those of `voc_colours`."""
        return cls(tuple(names), voc_colours(len(names) + 1)[1:])

    @classmethod
    def of_table(cls, table: Mapping[str, Sequence[int]]) -> Palette:
        """Name → RGB, as `table` has it."""
        return cls(tuple(table), np.array(list(table.values()), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def table(self) -> dict[str, list[int]]:
        """Name → RGB, as a user's file has it."""
        return dict(zip(self.names, self.colours.tolist(), strict=True))

    def index(self, name: str) -> int:
        """The index of a class.

        Raises:
            PowersteerError: There is none of this name; the nearest is suggested.
        """
        found = self._indices.get(name)
        if found is None:
            nearest = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise PowersteerError(f"label '{name}' is not among the palette's {len(self)} classes{hint}")
        return found

    def picture(self, labels: Labels) -> Image.Image:
        """Labels (H, W) as their colours, RGB; `NO_LABEL` is black.

        Raises:
            PowersteerError: A label is no index of a class.
        """
        low, high = int(labels.min()), int(labels.max())
        if low < NO_LABEL or high >= len(self):
            worst = low if low < NO_LABEL else high
            raise PowersteerError(f"label {worst} is outside the palette of {len(self)} classes: give another palette")
        black = np.zeros((1, 3), dtype=np.uint8)
        return Image.fromarray(np.concatenate([self.colours, black])[labels])  # index -1 is the last

    def labels_of(self, picture: Image.Image) -> Labels:
        """Each pixel's nearest colour as a label (H, W); black, where no class has it, is `NO_LABEL`.

        Of classes that share a colour, the first.
        """
        pixels = np.asarray(picture.convert("RGB"), dtype=np.int64)
        packed, places = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_inverse=True)
        distinct = packed[:, None] >> np.array([16, 8, 0]) & 255  # (M, 3)
        colours = np.concatenate([self.colours.astype(np.int64), np.zeros((1, 3), dtype=np.int64)])
        nearest = np.empty(len(distinct), dtype=np.int64)
        step = max(1, _AT_ONCE // len(colours))
        for start in range(0, len(distinct), step):
            part = distinct[start : start + step, None] - colours  # (m, N + 1, 3)
            nearest[start : start + step] = (part**2).sum(-1).argmin(-1)
        nearest[nearest == len(self)] = NO_LABEL
        return nearest[places].reshape(pixels.shape[:2])

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


class InColours(StrictConfig):
    """An extractor that paints what the source itself knows in a palette's colours."""

    kind: ClassVar[tuple[str, str]]
    """Its task and its name."""
    palette: str
    """Built in (`BUILT_IN`), or a JSON file."""

    def record(self) -> Mapping[str, Any]:
        """See `powersteer.conditions.extractor.Extractor`."""
        table = self.colours.table
        return extractor_record(
            *self.kind, version=version("powersteer"), settings=self.model_dump(), channels=3, palette=table
        )

    @cached_property
    def colours(self) -> Palette:
        """The palette itself."""
        return Palette.find(self.palette)


def voc_colours(count: int) -> Pixels:
    """The first colours (count, 3) of the PASCAL VOC colour map.

    The bits of an index go to red, green, blue, red, … in turn, and in each channel from the highest bit down; the
    first colour is black, and the first 256 are distinct.
    """
    index = np.arange(count)[:, None]
    colours = np.zeros((count, 3), dtype=np.int64)
    for bit in range(8):
        colours |= (index >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def _is_colour(colour: Any) -> bool:
    return (
        isinstance(colour, list)
        and len(colour) == 3
        and all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in colour)
    )
