"""Every pair of a folder, read once and measured."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from powersteer.conditions.kind import KINDS
from powersteer.core.console import PlainColumn, PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.images import decode_picture
from powersteer.data.conditioning import Conditioning
from powersteer.data.layouts import Found
from powersteer.data.looks import perceptual_hash, thumbnail
from powersteer.data.pairs import captioned, same_aspect
from powersteer.data.rows import Picture, Row


@dataclass(frozen=True)
class Stored:
    """What is told of a picture before it is put right."""

    profile: str
    """The name of its colour profile, where that is not sRGB."""
    transparent: bool
    """Whether any of it is transparent."""
    frames: int
    """How many frames it has; more than one where it is an animation."""


@dataclass(frozen=True)
class Measured:
    """One pair that can be read."""

    row: Row
    digest: str
    """The SHA-256 of the picture's bytes."""
    size: tuple[int, int]
    """Width and height of the picture, in pixels."""
    low: float
    high: float
    mean: float
    """The condition's lowest, highest and mean value: in [0, 1], or for features as they are."""
    picture: Stored
    condition: Stored | None
    """The same of the condition; None where it is features."""
    hash: npt.NDArray[np.float32]
    thumbnail: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scan:
    """The pairs of one folder."""

    found: Found
    pairs: list[Measured]
    """Those that can be read."""
    faults: list[tuple[str, str]]
    """What training would stop at: (kind, all of it)."""

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(N, 2): width, height."""
        return np.array([one.size for one in self.pairs]).reshape(-1, 2)

    @cached_property
    def means(self) -> npt.NDArray[np.float64]:
        """(N,), of the conditions."""
        return np.array([one.mean for one in self.pairs])

    @cached_property
    def hashes(self) -> npt.NDArray[np.float32]:
        """(N, 256), -1 or 1."""
        return np.array([one.hash for one in self.pairs], dtype=np.float32).reshape(-1, 256)

    @cached_property
    def thumbnails(self) -> npt.NDArray[np.float32]:
        """(N, 16, 16, 3)."""
        return np.array([one.thumbnail for one in self.pairs], dtype=np.float32).reshape(-1, 16, 16, 3)


def scan(found: Found, name: str, conditions: Conditioning, default_prompt: str | None) -> Scan:
    """Read every pair.

    Args:
        found: The folder's rows.
        name: Of the folder.
        conditions: What they should be.
        default_prompt: Caption of pairs that have none.
    """
    pairs: list[Measured] = []
    faults = [("row", fault) for fault in found.faults]
    bar = PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*bar, console=PlainConsole(stderr=True), transient=True) as progress:
        for row in progress.track(found.rows, description=f"reading {name}"):
            try:
                pairs.append(_measured(row, conditions))
            except PowersteerError as error:
                said = str(error)
                faults.append(("picture", said if said.startswith(row.where) else f"{row.where}: {said}"))
                continue
            try:
                captioned(row, default_prompt)
            except PowersteerError as error:
                faults.append(("caption", str(error)))
    return Scan(found, pairs, faults)


def _measured(row: Row, conditions: Conditioning) -> Measured:
    content = row.image.content()
    picture = row.image.picture()
    is_picture = KINDS.find(conditions.kind).mode(conditions.channels) is not None
    values, shape = _picture(row, conditions) if is_picture else _features(row, conditions)
    if not same_aspect(picture.size, shape):
        raise PowersteerError(
            f"{row.where}: the condition is {shape[0]}×{shape[1]} pixels, its picture {picture.width}×"
            f"{picture.height}: they must have one aspect ratio"
        )
    return Measured(
        row,
        hashlib.sha256(content).hexdigest(),
        picture.size,
        float(values.min()),
        float(values.max()),
        float(values.mean()),
        _stored(row.image, content),
        _stored(row.conditioning_image, row.conditioning_image.content()) if is_picture else None,
        perceptual_hash(picture),
        thumbnail(picture),
    )


def _picture(row: Row, conditions: Conditioning) -> tuple[npt.NDArray[np.floating[Any]], tuple[int, int]]:
    """A condition's values, and its width and height."""
    picture = row.conditioning_image.condition(conditions.channels, conditions.kind)
    return np.asarray(picture, dtype=np.float32) / 255, picture.size


def _features(row: Row, conditions: Conditioning) -> tuple[npt.NDArray[np.floating[Any]], tuple[int, int]]:
    """The same of a feature map."""
    values, bounds = row.conditioning_image.features(), conditions.record["range"]
    channels, height, width = values.shape
    if channels != conditions.channels:
        raise PowersteerError(f"{row.conditioning_image} has {channels} channels, not {conditions.channels}")
    if bounds is not None and not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise PowersteerError(f"{row.conditioning_image} has values outside {bounds}")
    return values, (width, height)


def _stored(picture: Picture, content: bytes) -> Stored:
    """What `Stored` tells of a picture that was opened before, so that nothing of it can be unreadable."""
    image = decode_picture(content, str(picture))
    transparent = image.has_transparency_data and bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())
    # A phone's JPEG of several pictures (MPO) is one, with its depth or a preview beside it.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    return Stored(_profile(image), transparent, frames)


def _profile(image: Image.Image) -> str:
    content = image.info.get("icc_profile")
    if not content:
        return ""
    profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(content))
    name = ImageCms.getProfileDescription(profile).strip() or "unnamed"
    return "" if "srgb" in name.lower() and image.mode != "CMYK" else name
