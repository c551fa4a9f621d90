"""The one form in which pairs reach everything else, whatever the layout of their files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from powersteer.errors import PowersteerError


@dataclass(frozen=True)
class Picture:
    """An encoded picture: a file, or a part of one."""

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

    def open(self, mode: str) -> Image.Image:
        """The decoded picture, upright; what is transparent becomes white in RGB, and nothing (0) in grey.

        Raises:
            PowersteerError: It is no readable picture, or has more than 8 bits a channel.
        """
        content = self.content()
        try:
            with Image.open(io.BytesIO(content)) as image:
                upright = ImageOps.exif_transpose(image)
                upright.load()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
            raise PowersteerError(f"{self} is not a readable picture") from None
        if upright.mode.startswith(("I", "F")):
            raise PowersteerError(f"{self} has {upright.mode} pixels: save it with 8 bits a channel")
        if not upright.has_transparency_data:
            return upright.convert(mode)
        layers = upright.convert("RGBA")
        paper = Image.new("RGBA", layers.size, "white" if mode == "RGB" else "black")
        return Image.alpha_composite(paper, layers).convert(mode)

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
