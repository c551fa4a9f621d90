"""A picture's file, upright; and the turn that puts what was annotated on the stored pixels upright with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.conditions.extractor import Box
from powersteer.conditions.layers import on_paper
from powersteer.conditions.sketch import MIN_SIDE, sketch_condition
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes
from powersteer.core.images import decode_picture, normalised, open_picture

_ORIENTATION = 0x0112

_Point = tuple[float, float]
# EXIF orientation → the turn of an array (rows, columns), and of a point (x, y) in a picture w×h, that make it upright.
_TURNS: dict[int, tuple[Callable[[Any], Any], Callable[[float, float, int, int], _Point]]] = {
    2: (lambda a: a[:, ::-1], lambda x, y, w, h: (w - x, y)),
    3: (lambda a: a[::-1, ::-1], lambda x, y, w, h: (w - x, h - y)),
    4: (lambda a: a[::-1], lambda x, y, w, h: (x, h - y)),
    5: (lambda a: a.T, lambda x, y, w, h: (y, x)),
    6: (lambda a: a[::-1].T, lambda x, y, w, h: (h - y, x)),
    7: (lambda a: a[::-1, ::-1].T, lambda x, y, w, h: (h - y, w - x)),
    8: (lambda a: a[:, ::-1].T, lambda x, y, w, h: (y, w - x)),
}


@dataclass(frozen=True)
class Frame:
    """A decoded picture."""

    picture: Image.Image
    """RGB, upright."""
    content: bytes | None
    """The file, where a copy shows the same."""
    suffix: str
    stored: tuple[int, int]
    """(width, height) of the stored pixels."""
    orientation: int
    """EXIF's; 1 is upright."""

    def labels(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A label map (H, W) that was drawn on the stored or the upright pixels → upright.

        Raises:
            PowersteerError: It has another size than the picture.
        """
        if not self._turned((labels.shape[1], labels.shape[0])):
            return labels
        return np.ascontiguousarray(_TURNS[self.orientation][0](labels))

    def boxes(self, boxes: tuple[Box, ...], size: tuple[int, int]) -> tuple[Box, ...]:
        """Boxes that were drawn on a picture of ``size`` (width, height), stored or upright → upright.

        Raises:
            PowersteerError: The picture has another size.
        """
        if not self._turned(size):
            return boxes
        turn = _TURNS[self.orientation][1]
        turned: list[Box] = []
        for box in boxes:
            (x1, y1), (x2, y2) = (turn(x, y, *self.stored) for x, y in ((box.left, box.top), (box.right, box.bottom)))
            turned.append(Box(box.label, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
        return tuple(turned)

    def _turned(self, size: tuple[int, int]) -> bool:
        """Whether what has this size lies on the stored pixels, and they are not upright."""
        if size == self.stored:
            return self.orientation in _TURNS
        if size != self.picture.size:
            width, height = self.picture.size
            raise PowersteerError(f"the annotation is for {size[0]}×{size[1]} pixels, its picture has {width}×{height}")
        return False


def open_frame(path: Path, background: str) -> Frame:
    """Read a picture; transparency is laid on the background.

    Raises:
        PowersteerError: It is no readable picture, is cut short, is tiny, or has more than 8 bits a channel.
    """
    content = read_bytes(path)
    image = decode_picture(content, str(path))
    picture = normalised(image, content, str(path))
    if min(image.size) < MIN_SIDE:
        raise PowersteerError(f"{path} is {image.width}×{image.height} pixels: too small to learn from")
    orientation = image.getexif().get(_ORIENTATION, 1)
    plain = orientation not in _TURNS and image.mode in ("RGB", "L") and not image.has_transparency_data
    suffix = {"JPEG": ".jpg", "WEBP": ".webp"}.get(image.format or "", ".png")
    if image.format not in ("JPEG", "PNG", "WEBP"):
        plain = False  # training reads the others too, other tools do not
    return Frame(on_paper(picture, background), content if plain else None, suffix, image.size, orientation)


def open_index(path: Path) -> npt.NDArray[np.int64]:
    """The values of a one-channel label map (H, W), as stored.

    Raises:
        PowersteerError: It is no readable picture, or has several channels.
    """
    image = decode_picture(read_bytes(path), str(path))
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise PowersteerError(f"{path} has mode {image.mode}: a label map has one channel, of class numbers")
    return np.asarray(image).astype(np.int64)


def open_drawing(path: Path) -> Image.Image:
    """A drawing in mode L, ink 255 on 0, whichever way round it was drawn.

    Raises:
        PowersteerError: It is no readable picture.
    """
    layers = open_picture(read_bytes(path), str(path))
    return sketch_condition(layers, (layers.height, layers.width), str(path))[0]
