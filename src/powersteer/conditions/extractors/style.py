"""Style (artistic drawing): where which colour is, coarsely, and the lines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any

from PIL import Image
from pydantic import Field

from powersteer.conditions.extractor import EXTRACTORS, Extractor, Subject
from powersteer.conditions.kind import INK, extractor_record
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError


@EXTRACTORS.add("style", "palette", needs="what its structure extractor needs")
class ColourAndStructure(StrictConfig):
    """Four channels: the picture's colours as a thumbnail, enlarged again, and a sketch of it."""

    structure: str | None = None
    """The sketch extractor that draws the structure; the first of them by default."""
    structure_settings: dict[str, Any] = Field(default_factory=dict[str, Any])
    cells: int = Field(default=8, ge=1)
    """How many cells the thumbnail has along its shorter side."""

    def __call__(self, subject: Subject) -> Image.Image:
        """RGBA: colour, and structure (ink 255 on 0) in alpha."""
        picture = subject.picture.convert("RGB")
        share = self.cells / min(picture.size)
        width, height = (max(1, round(side * share)) for side in picture.size)
        thumbnail = picture.resize((width, height), Image.Resampling.BOX)
        condition = thumbnail.resize(picture.size, Image.Resampling.NEAREST)
        structure = self.sketch(subject)
        if not isinstance(structure, Image.Image):
            raise PowersteerError(f"the extractor '{self.structure}' draws no sketch")
        condition.putalpha(structure.convert("L"))
        return condition

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        settings = {"cells": self.cells, "structure": dict(self.sketch.record())}
        return extractor_record("style", "palette", version=version("powersteer"), settings=settings, channels=4) | {
            "polarity": f"alpha: {INK}"
        }

    @cached_property
    def sketch(self) -> Extractor:
        """The structure's extractor."""
        return EXTRACTORS.find("sketch", self.structure).build(**self.structure_settings)
