"""A drawing in a file → a sketch condition: one channel, ink 1 on 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from powersteer.conditions.layers import on_paper, paper_of
from powersteer.core import images
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes

MIN_SIDE = 8
"""Pixels: anything smaller is a mistake, not a drawing."""


def open_layers(path: Path) -> Image.Image:
    """Read a picture of a person, upright and in sRGB: mode L, RGB, or RGBA where it has transparency.

    Raises:
        PowersteerError: It is no readable picture (see `powersteer.core.images.open_picture`), or a tiny one.
    """
    layers = images.open_picture(read_bytes(path), str(path))
    if min(layers.size) < MIN_SIDE:
        raise PowersteerError(f"{path} is {layers.width}×{layers.height} pixels: too small to steer by")
    return layers


def open_picture(path: Path) -> Image.Image:
    """Read a picture as RGB, what is transparent on white; see `open_layers`."""
    return on_paper(open_layers(path))


def sketch_condition(
    picture: Image.Image, size: tuple[int, int], where: str = "the drawing"
) -> tuple[Image.Image, bool]:
    """A drawing as a sketch condition.

    Most of a drawing is paper, so when most of the picture is bright it is ink on paper, and is inverted.

    Args:
        picture: Any picture; it is fitted into the size, padded with its own paper.
        size: Pixels (height, width).
        where: Its name, for messages.

    Returns:
        The condition, mode L, ink 255 on 0; and whether it was inverted.

    Raises:
        PowersteerError: It is too narrow for the size.
    """
    flat = on_paper(picture, paper_of(picture)) if picture.has_transparency_data else picture
    grey = flat.convert("L")
    inverted = bool(np.asarray(grey).mean() > 127)
    if inverted:
        grey = ImageOps.invert(grey)
    return padded(grey, size, "black", where), inverted


def padded(picture: Image.Image, size: tuple[int, int], colour: str, where: str) -> Image.Image:
    """A picture fitted into a size (height, width), the rest of it in a colour.

    Raises:
        PowersteerError: It is so narrow that less than a pixel of it would be left.
    """
    height, width = size
    share = min(width / picture.width, height / picture.height)
    if share * min(picture.size) < 1:
        raise PowersteerError(f"{where} is {picture.width}×{picture.height} pixels: too narrow to steer by, crop it")
    return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color=colour)
