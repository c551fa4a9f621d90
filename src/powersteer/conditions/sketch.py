"""A drawing in a file → a sketch condition: one channel, ink 1 on 0."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from powersteer.conditions.tensors import NO_STRUCTURE
from powersteer.errors import PowersteerError

MIN_SIDE = 8
"""Pixels: anything smaller is a mistake, not a drawing."""


def open_picture(path: Path, paper: str | None = "white") -> Image.Image:
    """Read a picture upright as RGB, what is transparent on ``paper``; as RGBA without paper.

    Raises:
        PowersteerError: There is no such file, it is no readable picture, or (without paper) it has no alpha channel.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                raise PowersteerError(f"{path} has {upright.mode} pixels: save it with 8 bits a channel")
            if paper is None and not upright.has_transparency_data:
                raise PowersteerError(f"{path} {NO_STRUCTURE}")
            layers = upright.convert("RGBA")
    except FileNotFoundError:
        raise PowersteerError(f"{path} does not exist") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise PowersteerError(f"{path} is not a readable picture ({error})") from None
    if min(layers.size) < MIN_SIDE:
        raise PowersteerError(f"{path} is {layers.width}×{layers.height} pixels: too small to steer by")
    if paper is None:
        return layers
    return Image.alpha_composite(Image.new("RGBA", layers.size, paper), layers).convert("RGB")


def sketch_condition(picture: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, bool]:
    """A drawing as a sketch condition.

    Most of a drawing is paper, so when most of the picture is bright it is ink on paper, and is inverted.

    Args:
        picture: Any picture; it is fitted into the size, padded with its own paper.
        size: Pixels (height, width).

    Returns:
        The condition, mode L, ink 255 on 0; and whether it was inverted.
    """
    grey = picture.convert("L")
    inverted = _mean(grey) > 127
    if inverted:
        grey = ImageOps.invert(grey)
    height, width = size
    return ImageOps.pad(grey, (width, height), Image.Resampling.LANCZOS, color=0), inverted


def _mean(grey: Image.Image) -> float:
    counts = grey.histogram()
    return sum(value * count for value, count in enumerate(counts)) / sum(counts)
