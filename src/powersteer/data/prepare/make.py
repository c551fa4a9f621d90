"""One item of a source → a picture and its condition in files: the work of every process of `powersteer prepare`."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.conditions.extractor import Box, Extractor, Registered, Subject
from powersteer.core.console import printable
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of, write_whole
from powersteer.data.looks import first_alike, perceptual_hash, thumbnail
from powersteer.data.pairs import same_aspect
from powersteer.data.prepare.config import Captions
from powersteer.data.prepare.sources.base import Item

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Job:
    """An item, and the name of its files."""

    item: Item
    key: str


@dataclass(frozen=True)
class Outcome:
    """What became of an item: a line of the log."""

    key: str
    name: str
    split: str
    row: dict[str, Any] | None
    """The item's line of ``metadata.jsonl``; None where the item was refused."""
    reason: str | None = None
    """Why the item was refused; None where it was not."""


@dataclass(frozen=True)
class Measures:
    """What tells one picture from another."""

    name: str
    concept: str | None
    digest: str
    """The SHA-256 of the picture's file, or of its pixels where there is no file."""
    shape: npt.NDArray[np.float32]
    """The picture's `perceptual_hash`, (256,)."""
    colours: npt.NDArray[np.float32]
    """The picture's `thumbnail`, (16, 16, 3)."""


def measure(item: Item) -> Measures | None:
    """Measure a held-out item; None where it cannot be read, which is told when its pair is made."""
    try:
        loaded = item.load()
    except Exception:  # as in `Maker`
        return None
    return _measures(item, loaded.subject.picture, loaded.content)


def _measures(item: Item, picture: Image.Image, content: bytes | None) -> Measures:
    digest = hashlib.sha256(content if content is not None else picture.tobytes()).hexdigest()
    return Measures(item.name, item.concept, digest, perceptual_hash(picture), thumbnail(picture))


class HeldOut:
    """The held-out pictures, for training pictures to be compared with.

    Args:
        concepts: Of held-out items, with a name.
        pictures: Their measures.
    """

    def __init__(self, concepts: Mapping[str, str], pictures: Sequence[Measures]) -> None:
        self.concepts = concepts
        self.names = [one.name for one in pictures]
        self.digests = {one.digest: one.name for one in pictures}
        self.shapes = np.array([one.shape for one in pictures], dtype=np.float32).reshape(-1, 256)
        self.colours = np.array([one.colours for one in pictures], dtype=np.float32).reshape(-1, 16, 16, 3)

    def refuse(self, measures: Measures) -> None:
        """Stop at what is held out.

        Raises:
            PowersteerError: It is, by its concept, its content, or by its looks.
        """
        same = self.concepts.get(measures.concept or "")
        if same is not None:
            raise PowersteerError(f"held out too, as '{same}': the same subject")
        if measures.digest in self.digests:
            raise PowersteerError(f"held out too, as '{self.digests[measures.digest]}': the same file")
        alike = first_alike(measures.shape[None], measures.colours[None], self.shapes, self.colours)
        if alike:
            raise PowersteerError(f"looks like '{self.names[alike[0]]}', which is held out")


@dataclass(frozen=True)
class Recipe:
    """How pairs are made; sent to every process once."""

    out_dir: Path
    registered: Registered
    settings: Mapping[str, Any]
    held_out: HeldOut
    captions: Captions = "all"
    several: bool = False
    """Whether ``text`` is a list: one form for all rows."""
    resolution: int | None = None

    def build(self) -> Maker:
        """In the process that makes pairs."""
        import_module("powersteer.conditions.extractors.catalogue")  # an extractor may look for others by name
        return Maker(self, self.registered.build(**self.settings))


class Maker:
    """Makes pairs.

    Args:
        recipe: How.
        extractor: Built from it.
    """

    def __init__(self, recipe: Recipe, extractor: Extractor) -> None:
        self.recipe, self.extractor = recipe, extractor

    def __call__(self, job: Job) -> Outcome:
        """Write the files of a pair; what is wrong with the item is said in the outcome.

        Raises:
            PowersteerError: The files cannot be written.
        """
        item = job.item
        try:
            picture, suffix, condition = self._make(item)
        except PowersteerError as error:
            return Outcome(job.key, item.name, item.split, None, printable(str(error)))
        except Exception as error:  # of 118,000 pictures one will meet a fault of some library
            return Outcome(
                job.key, item.name, item.split, None, printable(f"{type(error).__name__}: {reason_of(error)}")
            )
        condition_suffix = ".png" if isinstance(condition, Image.Image) else ".npy"
        files = {
            f"images/{job.key}{suffix}": picture,
            f"conditions/{job.key}{condition_suffix}": _encoded(condition, condition_suffix),
        }
        for name, content in files.items():
            write_whole(self.recipe.out_dir / item.split / name, content)
        return Outcome(job.key, item.name, item.split, self._row(item, *files))

    def _make(self, item: Item) -> tuple[bytes, str, Image.Image | npt.NDArray[np.float32]]:
        """The picture's file, its suffix, and the condition."""
        recipe, loaded = self.recipe, item.load()
        subject, content = loaded.subject, loaded.content
        if item.split == "train":
            recipe.held_out.refuse(_measures(item, subject.picture, content))
        if recipe.resolution is not None and min(subject.picture.size) != recipe.resolution:
            subject, content = scaled(subject, recipe.resolution), None
        condition = self.extractor(subject)
        if isinstance(condition, Image.Image) and not same_aspect(condition.size, subject.picture.size):
            raise PowersteerError(
                f"{recipe.registered.name} made a condition of {condition.width}×{condition.height} pixels of a "
                f"picture of {subject.picture.width}×{subject.picture.height}"
            )
        return content or _encoded(subject.picture, loaded.suffix), loaded.suffix, condition

    def _row(self, item: Item, picture: str, condition: str) -> dict[str, Any]:
        row: dict[str, Any] = {"file_name": picture, "conditioning_image_file_name": condition}
        texts = self._texts(item)
        if self.recipe.several or texts:
            row["text"] = list(texts) if self.recipe.several else texts[0]
        if item.concept is not None:
            row["concept"] = item.concept
        return {**row, "source": item.name}

    def _texts(self, item: Item) -> tuple[str, ...]:
        if not item.captions or self.recipe.captions == "all":
            return item.captions
        if self.recipe.captions == "first":
            return item.captions[:1]
        return (random.Random(item.name).choice(item.captions),)


def scaled(subject: Subject, resolution: int) -> Subject:
    """A subject with its shorter side of ``resolution`` pixels; label maps without interpolation.

    Raises:
        PowersteerError: It is so long that it would be no readable picture any more.
    """
    width, height = subject.picture.size
    zoom = resolution / min(width, height)
    size = max(resolution, round(width * zoom)), max(resolution, round(height * zoom))
    most = 2 * (Image.MAX_IMAGE_PIXELS or size[0] * size[1])
    if size[0] * size[1] > most:
        raise PowersteerError(
            f"at this resolution it has {size[0]}×{size[1]} pixels, more than {most // 10**6} million"
        )
    across, down = size[0] / width, size[1] / height
    labels, boxes = subject.labels, subject.boxes
    if labels is not None:
        resized = Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        labels = np.asarray(resized).astype(np.int64)
    if boxes is not None:
        boxes = tuple(
            Box(one.label, one.left * across, one.top * down, one.right * across, one.bottom * down) for one in boxes
        )
    return Subject(
        subject.picture.resize(size, Image.Resampling.LANCZOS),
        drawing=None if subject.drawing is None else subject.drawing.resize(size, Image.Resampling.LANCZOS),
        labels=labels,
        boxes=boxes,
        features=subject.features,
    )


def _encoded(made: Image.Image | npt.NDArray[np.float32], suffix: str) -> bytes:
    buffer = io.BytesIO()
    if not isinstance(made, Image.Image):
        np.save(buffer, made)
    elif suffix == ".jpg":
        made.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    elif suffix == ".webp":
        made.save(buffer, "WEBP", lossless=True)
    else:
        made.save(buffer, "PNG")
    return buffer.getvalue()
