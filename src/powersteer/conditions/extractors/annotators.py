"""Detectors of the package controlnet_aux, passed through by name, where it and their weights are installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import Image, ImageOps
from pydantic import Field

from powersteer.conditions.extractor import EXTRACTORS, Subject, Task, from_settings, optional_module
from powersteer.conditions.kind import INK, PAPER, extractor_record
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.hardware import best_device

PACKAGE = "controlnet_aux"
WEIGHTS = "lllyasviel/Annotators"
"""The repository on the Hub that holds the weights of nearly all detectors."""


@dataclass(frozen=True)
class Detector:
    """One of the package's classes."""

    task: Task
    name: str
    """Our name for it."""
    kind: str
    """The name of its class in the package."""
    weights: str = WEIGHTS
    polarity: str | None = None
    """Which of ink and paper is 1 in the line art that it draws: `INK` or `PAPER`; None where it draws none."""


DETECTORS = (
    Detector("sketch", "pidinet", "PidiNetDetector", polarity=INK),
    Detector("sketch", "lineart", "LineartDetector", polarity=INK),
    Detector("sketch", "lineart-anime", "LineartAnimeDetector", polarity=INK),
    Detector("sketch", "mlsd", "MLSDdetector", polarity=INK),
    Detector("depth", "midas", "MidasDetector"),
    Detector("depth", "zoe", "ZoeDetector"),
    Detector("depth", "leres", "LeresDetector"),
    Detector("normal", "normalbae", "NormalBaeDetector"),
    Detector("pose", "openpose", "OpenposeDetector"),
)
MODES = {"sketch": "L", "depth": "L", "normal": "RGB", "pose": "RGB"}


class DetectorSettings(StrictConfig):
    """What a detector can be told."""

    weights: str | None = None
    """A folder, or a model of the Hub."""
    resolution: int = Field(default=512, ge=64, le=16384)
    """Pixels of the shorter side as the detector sees it."""
    dark_on_light: bool = False
    """Whether weights of your own draw line art dark on light, which is then inverted."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Further arguments of the detector's call."""
    device: str = "auto"


@dataclass(frozen=True)
class Annotator:
    """A detector with its settings."""

    detector: Detector
    settings: DetectorSettings

    def __call__(self, subject: Subject) -> Image.Image:
        """Mode L for line art and depth, else RGB; of the picture's size."""
        resolution = self.settings.resolution
        sizes = {"detect_resolution": resolution, "image_resolution": resolution}
        made = self.loaded(subject.picture.convert("RGB"), output_type="pil", **(sizes | self.settings.options))
        if not isinstance(made, Image.Image):
            raise PowersteerError(f"{PACKAGE}'s {self.detector.kind} returned no picture, but {type(made).__name__}")
        made = made.convert(MODES[self.detector.task])
        if self.extracted_polarity == PAPER:
            made = ImageOps.invert(made)
        size = subject.picture.size
        return made if made.size == size else made.resize(size, Image.Resampling.LANCZOS)

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        settings = self.settings.model_dump(exclude={"device"}) | {"weights": self.weights}
        return extractor_record(
            self.detector.task,
            self.detector.name,
            version=f"{PACKAGE} {_package_version()}",
            settings=settings,
            channels=len(MODES[self.detector.task]),
            extracted_polarity=self.extracted_polarity,
        )

    @property
    def weights(self) -> str:
        """Where they come from."""
        return self.settings.weights or self.detector.weights

    @property
    def extracted_polarity(self) -> str | None:
        """What it draws."""
        return PAPER if self.detector.polarity and self.settings.dark_on_light else self.detector.polarity

    @cached_property
    def loaded(self) -> Any:
        """The detector itself."""
        name = self.detector.kind
        package = optional_module(PACKAGE, f"the extractor {self.detector.name}", "pip install controlnet-aux")
        kind = getattr(package, name, None)
        if kind is None:
            raise PowersteerError(f"this version of {PACKAGE} has no {name}: pip install -U controlnet-aux")
        try:
            detector = kind.from_pretrained(self.weights)
        except Exception as error:  # the package, and what it loads with, meet whatever the files say
            raise PowersteerError(f"cannot load the weights '{self.weights}' of {name}: {reason_of(error)}") from None
        device = best_device(self.settings.device)
        return detector.to(device) if hasattr(detector, "to") else detector


def _build(detector: Detector, **settings: Any) -> Annotator:
    where = f"{detector.task} {detector.name}"
    return Annotator(detector, from_settings(DetectorSettings, where, **settings))


def _package_version() -> str:
    try:
        return version("controlnet-aux")
    except PackageNotFoundError:
        return "of unknown version"


for _detector in DETECTORS:
    _needs = f"controlnet_aux and its weights ({_detector.weights})"
    EXTRACTORS.add(_detector.task, _detector.name, _needs, rank=2)(partial(_build, _detector))
