"""The one form in which pairs reach everything else, whatever the layout of their files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from powersteer.conditions.kinds import FEATURE_SUFFIX
from powersteer.conditions.tensors import NO_STRUCTURE, read_features
from powersteer.errors import PowersteerError


@dataclass(frozen=True)
class Picture:
    """An encoded picture, or a feature map: a file, or a part of one."""

    name: str
    """Where it lies, for messages."""
    column: str
    """The column that names it."""
    read: Callable[[], bytes]
    file: Path | None = None
    """The file that holds it, where it is one of this machine."""

    def content(self) -> bytes:
        """Its bytes.

        Raises:
            PowersteerError: They cannot be read.
        """
        try:
            return self.read()
        except OSError as error:
            raise PowersteerError(f"{self} cannot be read: {error.strerror}") from None

    @property
    def is_features(self) -> bool:
        """Whether it is a feature map rather than a picture."""
        return self.name.lower().endswith(FEATURE_SUFFIX)

    def features(self) -> npt.NDArray[np.floating[Any]]:
        """The feature map (C, h, w); see `read_features`."""
        if not self.is_features:
            raise PowersteerError(f"{self} is no {FEATURE_SUFFIX}: conditioning_kind=feature reads feature maps")
        return read_features(self.content(), str(self))

    def open(self, mode: str, paper: str | None = None) -> Image.Image:
        """The decoded picture, upright.

        Args:
            mode: ``L``, ``RGB``, or ``RGBA``, which must have an alpha channel.
            paper: What shows through where it is transparent; white in RGB and nothing (0) in grey by default.

        Raises:
            PowersteerError: It is no readable picture, or has more than 8 bits a channel.
        """
        if self.is_features:
            raise PowersteerError(f"{self} is a feature map: give conditioning_kind=feature and conditioning_channels")
        content = self.content()
        try:
            with Image.open(io.BytesIO(content)) as image:
                upright = ImageOps.exif_transpose(image)
                upright.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
            raise PowersteerError(f"{self} is not a readable picture") from None
        if upright.mode.startswith(("I", "F")):
            raise PowersteerError(f"{self} has {upright.mode} pixels: save it with 8 bits a channel")
        if mode == "RGBA" and not upright.has_transparency_data:
            raise PowersteerError(f"{self} {NO_STRUCTURE}")
        if mode == "RGBA" or not upright.has_transparency_data:
            return upright.convert(mode)
        layers = upright.convert("RGBA")
        ground = Image.new("RGBA", layers.size, paper or ("white" if mode == "RGB" else "black"))
        return Image.alpha_composite(ground, layers).convert(mode)

    def __str__(self) -> str:
        return f"'{self.name}' (column {self.column})"


@dataclass(frozen=True)
class Row:
    """One pair."""

    where: str
    """Its place in the data set, for messages: ``train[12]``."""
    image: Picture
    conditioning_image: Picture
    texts: tuple[str, ...] = ()
    """Its own captions, if it has any."""
    generated_text: str | None = None
    """A caption that a model wrote, if it has one."""

    @property
    def text(self) -> str | None:
        """The first of its own captions."""
        return self.texts[0] if self.texts else None
