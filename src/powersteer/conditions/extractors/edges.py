"""Line art without a network: what an artist drew, and OpenCV's filters."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from powersteer.conditions.extractor import EXTRACTORS, Subject, optional_module
from powersteer.conditions.kind import INK, PAPER, extractor_record
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError


@EXTRACTORS.add("sketch", "drawn", needs="line art in the source")
class Drawn(StrictConfig):
    """The line art itself, where the data has it."""

    def __call__(self, subject: Subject) -> Image.Image:
        """Mode L, ink 255 on 0."""
        if subject.drawing is None:
            raise PowersteerError("there is no line art here: choose another extractor, such as hed")
        return subject.drawing

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        return extractor_record(
            "sketch", "drawn", version=version("powersteer"), settings={}, channels=1, extracted_polarity=INK
        )


@EXTRACTORS.add("sketch", "canny", needs="opencv-python-headless")
class Canny(StrictConfig):
    """Thin binary edges (Canny, 1986)."""

    low: float = Field(default=100, ge=0)
    """An edge goes on where the gradient exceeds this,"""
    high: float = Field(default=200, ge=0)
    """and begins where it exceeds this."""
    sigma: float = Field(default=1.0, ge=0)
    """Pixels, of the blur before; 0 for none."""

    def __call__(self, subject: Subject) -> Image.Image:
        """Mode L, ink 255 on 0."""
        cv2 = _opencv("canny")
        grey = np.asarray(subject.picture.convert("L"))
        if self.sigma:
            grey = cv2.GaussianBlur(grey, (0, 0), self.sigma)
        return Image.fromarray(cv2.Canny(grey, self.low, self.high, L2gradient=True))

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        version = f"opencv {_opencv('canny').__version__}"
        return extractor_record(
            "sketch", "canny", version=version, settings=self.model_dump(), channels=1, extracted_polarity=INK
        )


@EXTRACTORS.add("sketch", "xdog", needs="opencv-python-headless")
class XDoG(StrictConfig):
    """Pen strokes: extended difference of Gaussians (Winnemöller, Kyprianidis & Olsen, 2012).

    D = G_σ − τ·G_kσ of the brightness in [0, 1]; paper where D ≥ ε, else ink that darkens as 1 + tanh(φ·(D − ε)).
    """

    sigma: float = Field(default=1.0, gt=0)
    """Pixels: about the width of a stroke."""
    k: float = Field(default=1.6, gt=1)
    tau: float = Field(default=0.98, gt=0, le=1)
    epsilon: float = -0.01
    phi: float = Field(default=60.0, gt=0)

    def __call__(self, subject: Subject) -> Image.Image:
        """Mode L, ink 255 on 0."""
        cv2 = _opencv("xdog")
        grey = np.asarray(subject.picture.convert("L"), dtype=np.float32) / 255
        narrow, wide = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (self.sigma, self.k * self.sigma))
        above = narrow - self.tau * wide - self.epsilon
        paper = np.where(above >= 0, 1, 1 + np.tanh(self.phi * above))
        return Image.fromarray((255 * (1 - paper)).round().astype(np.uint8))

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        version = f"opencv {_opencv('xdog').__version__}"
        return extractor_record(
            "sketch", "xdog", version=version, settings=self.model_dump(), channels=1, extracted_polarity=PAPER
        )


def _opencv(name: str) -> Any:
    return optional_module("cv2", f"the extractor {name}", "pip install 'powersteer[conditions]'")
