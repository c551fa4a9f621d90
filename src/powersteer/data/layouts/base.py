"""What all layouts share: what columns are called, which files are data, and that no name is claimed twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_folder, reason_of
from powersteer.core.images import picture_suffixes
from powersteer.data.rows import Row
from powersteer.data.splits import is_held_out

PICTURE_SUFFIXES = tuple(sorted(picture_suffixes()))
DEEPEST = 64
"""Folders within one another."""
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")

ReadRow = Callable[[], Row]


@dataclass(frozen=True)
class Columns:
    """What a layout with named columns calls them.

    Raises:
        PowersteerError: Two have one name.
    """

    image: str = "image"
    conditioning_image: str = "conditioning_image"
    text: str = "text"
    generated_text: str = "generated_text"

    def __post_init__(self) -> None:
        names = [getattr(self, one.name) for one in fields(self)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PowersteerError(f"two columns are called '{twice}': picture, condition and captions are apart")

    @property
    def is_default(self) -> bool:
        """Whether nobody has named one."""
        return self == Columns()


@dataclass
class Seen:
    """What a layout comes upon beside its pairs."""

    files: set[str] = field(default_factory=set[str])
    """Files that a row names, whether it is whole or not."""
    columns: set[str] = field(default_factory=set[str])
    """Names of columns that there are."""
    left_out: list[str] = field(default_factory=list[str])
    """Parts of files that no row has."""

    def take(self, file: Path) -> Path:
        """Note a file that a row names."""
        self.files.add(os.path.normpath(file))
        return file


class Layout(Protocol):
    """One way to lay out pairs."""

    def fits(self, folder: Path) -> bool:
        """Whether a folder looks like it."""
        ...

    def rows(self, folder: Path, columns: Columns, seen: Seen) -> Iterator[ReadRow]:
        """Its pairs, in order; a pair that cannot be made says so when it is called, and the next may be whole."""
        ...


def listed(names: Iterable[str]) -> str:
    """Names, for messages: not more than a line."""
    ordered = sorted(names)
    return ", ".join(ordered[:12]) + (", …" if len(ordered) > 12 else "") if ordered else "none"


def texts_of(where: str, record: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """One caption, or a list of several.

    Raises:
        PowersteerError: It is something else.
    """
    given = record.get(column)
    texts: list[Any] = given if isinstance(given, list) else [given]
    wrong = next((text for text in texts if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise PowersteerError(f"{where}: column '{column}' holds {str(wrong)[:40]}, which is no text")
    return tuple(text for text in texts if text is not None)


def generated_of(where: str, record: Mapping[str, Any], columns: Columns) -> str | None:
    """The caption that a model wrote; the first of several."""
    return next(iter(texts_of(where, record, columns.generated_text)), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's, not the user's: ``._1.png``, ``.DS_Store``."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def inside(folder: Path) -> list[Path]:
    """Files and folders in a folder by name, without hidden ones.

    Raises:
        PowersteerError: It cannot be read.
    """
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if not is_hidden(name)]  # noqa: PTH208
    except (OSError, ValueError) as error:
        raise PowersteerError(f"{folder} cannot be read: {reason_of(error)}") from None


def pictures_in(folder: Path, *others: str, held_out: bool = True) -> Iterator[Path]:
    """The pictures of a folder and the folders in it, by name; links are followed, loops are not.

    Args:
        folder: The folder.
        *others: Suffixes of other files that are wanted.
        held_out: Take those in folders that by their name hold a validation or test split, too.
    """
    yield from _pictures_in(folder, frozenset((*PICTURE_SUFFIXES, *others)), held_out, frozenset())


def _pictures_in(folder: Path, suffixes: frozenset[str], held_out: bool, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        return
    if len(above) >= DEEPEST:
        raise PowersteerError(f"{folder} lies deeper than {DEEPEST} folders within one another")
    for path in inside(folder):
        if is_folder(path):
            if held_out or not is_held_out(path.name):
                yield from _pictures_in(path, suffixes, held_out, above | {real})
        elif path.suffix.lower() in suffixes:
            yield path


def files_in(folder: Path, *, held_out: list[str] | None = None) -> Iterator[str]:
    """All files of a folder and the folders in it, without hidden ones; links to folders are not followed.

    Args:
        folder: The folder.
        held_out: Where folders that by their name hold a validation or test split are noted, and passed over.

    Raises:
        PowersteerError: A folder cannot be read.
    """
    waiting = [str(folder)]
    while waiting:
        current = waiting.pop()
        try:
            with os.scandir(current) as entries:
                found = [(one.path, one.name, one.is_dir(follow_symlinks=False), one.is_symlink()) for one in entries]
        except (OSError, ValueError) as error:
            raise PowersteerError(f"{current} cannot be read: {reason_of(error)}") from None
        for path, name, is_dir, is_link in found:
            if is_hidden(name):
                continue
            if not is_dir and not (is_link and is_folder(Path(path))):
                yield path
            elif held_out is not None and is_held_out(name):
                held_out.append(path)
            elif not is_link:
                waiting.append(path)


def alone(where: str, name: str, claims: list[str]) -> None:
    """Refuse a name that several claim.

    Raises:
        PowersteerError: There is more than one.
    """
    if len(claims) > 1:
        raise PowersteerError(f"{where}: '{claims[0]}' and '{claims[1]}' are both '{name}': remove or rename one")
