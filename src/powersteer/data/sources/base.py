"""What a source of pictures is: splits of items, each of which can be loaded on its own, in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from powersteer.conditions.extractor import Subject, Task
from powersteer.data.layouts import PICTURE_SUFFIXES
from powersteer.errors import PowersteerError

Captions = Literal["first", "all", "random"]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source."""

    task: Task
    background: str = "white"
    """Behind what is transparent."""
    resolution: int | None = None
    """Pixels of the shorter side; the pictures' own by default."""


@dataclass(frozen=True)
class Loaded:
    """A picture and whatever its source knows of it."""

    subject: Subject
    content: bytes | None = None
    """The picture's file, where a copy of it would show the same: upright, 8 bits, RGB or grey."""
    suffix: str = ".png"
    """Of the picture's file: what is not copied is written in the same format."""


@dataclass(frozen=True)
class Item:
    """One picture of a source, not yet read."""

    name: str
    """Unique within its split."""
    split: str
    load: Callable[[], Loaded]
    """Can be pickled. Raises PowersteerError where the picture, or what belongs to it, cannot be read."""
    captions: tuple[str, ...] = ()
    concept: str | None = None
    """What must not be trained on when it is held out: a picture's identity, or whatever several pictures show."""


@dataclass(frozen=True)
class Choice:
    """The extractor that suits a source, and its settings."""

    extractor: str | None = None
    """The task's own by default."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Source(Protocol):
    """One way in which pictures lie on disk."""

    name: str
    """What ``dataset.json`` says of it."""
    licence: str
    """Under which terms its pictures come."""

    def choice(self, task: Task) -> Choice:
        """What it is best prepared with."""
        ...

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """All pictures, the held-out splits among them; training pictures are those of the split ``train`` alone.

        Raises:
            PowersteerError: There are none, or a file that describes them all is missing or malformed.
        """
        ...


def read_bytes(path: Path) -> bytes:
    """Of a file.

    Raises:
        PowersteerError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise PowersteerError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Of a file.

    Raises:
        PowersteerError: It cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PowersteerError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def pictures_in(folder: Path) -> Iterator[Path]:
    """The pictures of a folder and the folders in it, by name; links are followed, loops are not."""
    yield from _pictures_in(folder, frozenset())


def _pictures_in(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir():
            yield path
        elif path.is_dir():
            yield from _pictures_in(path, above | {real})


def rgb(picture: Image.Image, background: str) -> Image.Image:
    """Any 8-bit picture as RGB; what is transparent is laid on the background."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, background), layers).convert("RGB")
