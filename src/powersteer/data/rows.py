"""The one form in which pairs reach everything else, whatever the layout of their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.conditions.arrays import FEATURE_SUFFIX, read_features
from powersteer.conditions.kind import KINDS
from powersteer.conditions.layers import on_paper
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.images import open_picture


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
        except (OSError, ValueError) as error:
            raise PowersteerError(f"{self} cannot be read: {reason_of(error)}") from None

    @property
    def is_features(self) -> bool:
        """Whether it is a feature map rather than a picture."""
        return self.name.lower().endswith(FEATURE_SUFFIX)

    def features(self) -> npt.NDArray[np.floating[Any]]:
        """The feature map (C, h, w); see `read_features`."""
        if not self.is_features:
            raise PowersteerError(f"{self} is no {FEATURE_SUFFIX}: conditioning_kind=feature reads feature maps")
        return read_features(self.content(), str(self))

    def picture(self) -> Image.Image:
        """The picture as RGB, upright and in sRGB, what is transparent on white.

        Raises:
            PowersteerError: It is no readable picture; see `powersteer.core.images.open_picture`.
        """
        return on_paper(self._decoded())

    def condition(self, channels: int, kind: str | None) -> Image.Image:
        """The picture as a condition: mode L, RGB or RGBA; see `powersteer.conditions.kind.Kind.as_condition`.

        Args:
            channels: 1, 3 or 4.
            kind: Of the condition.

        Raises:
            PowersteerError: It is no readable picture, or (4 channels) has no alpha channel.
        """
        return KINDS.find(kind).as_condition(self._decoded(), channels, str(self))

    def _decoded(self) -> Image.Image:
        if self.is_features:
            raise PowersteerError(f"{self} is a feature map: give conditioning_kind=feature and conditioning_channels")
        return open_picture(self.content(), str(self))

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
    no_text: str = ""
    """Why it has no caption of its own, where its layout knows."""

    @property
    def text(self) -> str | None:
        """The first of its own captions."""
        return self.texts[0] if self.texts else None
