"""Precomputed features: maps at the latents' size, of whatever made them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from powersteer.conditions.extractor import EXTRACTORS, Subject
from powersteer.conditions.kind import extractor_record
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError


@EXTRACTORS.add("feature", "npy", needs="feature maps in the source")
class Features(StrictConfig):
    """The source's own feature maps, as they are."""

    channels: int | None = Field(default=None, gt=0)
    """Checked, and recorded, where it is given."""

    def __call__(self, subject: Subject) -> npt.NDArray[np.float32]:
        """(C, h, w)."""
        features = subject.features
        if features is None:
            raise PowersteerError("there is no feature map here: a feature needs one, (C, h, w) in a .npy file")
        if features.ndim != 3 or self.channels not in (None, len(features)):
            wanted = "C" if self.channels is None else self.channels
            raise PowersteerError(f"the feature map must have shape ({wanted}, h, w), not {features.shape}")
        if not np.isfinite(features).all():
            raise PowersteerError("the feature map holds values that are not finite")
        return features

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        return extractor_record(
            "feature", "npy", version=version("powersteer"), settings=self.model_dump(), channels=self.channels
        )
