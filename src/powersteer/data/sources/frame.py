"""A picture's file, upright; and the turn that puts what was annotated on the stored pixels upright with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from powersteer.conditions.extractor import Box
from powersteer.conditions.sketch import MIN_SIDE
from powersteer.data.sources.base import read_bytes, rgb
from powersteer.errors import PowersteerError

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24
"""Offset of the bit depth in a PNG."""

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
    image = _decode(path, content)
    orientation = image.getexif().get(_ORIENTATION, 1)
    upright = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")) or (content.startswith(_PNG) and content[_PNG_DEPTH] == 16):
        raise PowersteerError(f"{path} has 16 bits a channel or more: save it with 8")
    if min(image.size) < MIN_SIDE:
        raise PowersteerError(f"{path} is {image.width}×{image.height} pixels: too small to learn from")
    plain = orientation not in _TURNS and image.mode in ("RGB", "L") and not image.has_transparency_data
    suffix = {"JPEG": ".jpg", "WEBP": ".webp"}.get(image.format or "", ".png")
    if image.format not in ("JPEG", "PNG", "WEBP"):
        plain = False  # training reads the others too, other tools do not
    return Frame(rgb(upright, background), content if plain else None, suffix, image.size, orientation)


def open_index(path: Path) -> npt.NDArray[np.int64]:
    """The values of a one-channel label map (H, W), as stored.

    Raises:
        PowersteerError: It is no readable picture, or has several channels.
    """
    image = _decode(path, read_bytes(path))
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise PowersteerError(f"{path} has mode {image.mode}: a label map has one channel, of class numbers")
    return np.asarray(image).astype(np.int64)


def open_drawing(path: Path) -> Image.Image:
    """A drawing in mode L, ink 255 on 0, whichever way round it was drawn.

    Raises:
        PowersteerError: It is no readable picture.
    """
    grey = open_frame(path, "white").picture.convert("L")
    mean = np.asarray(grey).mean()
    return ImageOps.invert(grey) if mean > 127 else grey  # most of a drawing is paper


def _decode(path: Path, content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError:
        raise PowersteerError(f"{path} is no picture that can be read") from None
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise PowersteerError(f"{path} is not a whole picture ({error})") from None
    return image
