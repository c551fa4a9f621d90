"""What a source of pictures is: splits of items, each of which can be loaded on its own, in any process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from powersteer.conditions.extractor import Subject, Task


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
    """The suffix of the picture's file: a picture that is not copied is written in the same format."""


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
    unused: dict[str, list[str]]
    """Files that no item takes, by why; known once the items are."""

    def choice(self, task: Task) -> Choice:
        """What it is best prepared with."""
        ...

    def items(self, wanted: Wanted) -> Sequence[Item]:
        """All pictures, the held-out splits among them; training pictures are those of the split ``train`` alone.

        Raises:
            PowersteerError: There are none, or a file that describes them all is missing or malformed.
        """
        ...


def name_of(path: Path, folder: Path) -> str:
    """A file's name within a folder, in characters that a data set can hold."""
    return plain_name(path.relative_to(folder).as_posix())


def plain_name(name: str) -> str:
    """A name with what is no UTF-8 in it written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
