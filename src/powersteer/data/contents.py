"""What pictures hold, remembered while their files stay as they are: as git's index does it."""

from __future__ import annotations

import hashlib
import io
import json
import time
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of, write_whole
from powersteer.core.images import picture_formats
from powersteer.core.text import read_object
from powersteer.data.rows import Picture

_TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_SETTLED = 2 * 10**9
"""Nanoseconds: a file that changed less long ago may change again within one tick of its clock."""

_Look = tuple[str, int, int]
"""Digest, width, height; no size (0, 0) of what is no picture."""


@dataclass
class Contents:
    """Digests and sizes of pictures; a file is read again only when its size or a time of change is another.

    Args:
        file: Where they are remembered between runs; nothing is without one.
    """

    file: Path | None = None
    _known: dict[str, _Look] = field(default_factory=dict[str, _Look], init=False)
    _seen: dict[Picture, _Look] = field(default_factory=dict[Picture, _Look], init=False)
    _changed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._known = _remembered(self.file)

    def digest(self, picture: Picture) -> str:
        """The digest of the picture's bytes."""
        return self._look(picture)[0]

    def digests(self, pictures: Iterable[Picture]) -> list[str]:
        """The digest of each picture's bytes; processes that share the file wait, and find what the first has read.

        Raises:
            PowersteerError: A picture cannot be read, or what is known of them not written.
        """
        with self._alone():
            self._known |= _remembered(self.file)
            found = [self.digest(picture) for picture in pictures]
            self.save()
        return found

    def size(self, picture: Picture) -> tuple[int, int]:
        """(width, height), upright.

        Raises:
            PowersteerError: It is no readable picture.
        """
        _, width, height = self._look(picture)
        if not width:
            raise PowersteerError(f"{picture} is not a readable picture")
        return width, height

    def save(self) -> None:
        """Remember for the next run."""
        if self.file is not None and self._changed:
            write_whole(self.file, json.dumps(self._known).encode())
            self._changed = False

    @contextmanager
    def _alone(self) -> Generator[None]:
        if self.file is None:
            yield
            return
        try:
            locks = self.file.parent / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            lock: Any = FileLock(locks / self.file.stem)
            lock.acquire()
        except OSError as error:
            raise PowersteerError(f"cannot write the cache {self.file.parent}: {reason_of(error)}") from None
        try:
            yield
        finally:
            lock.release()

    def _look(self, picture: Picture) -> _Look:
        if picture in self._seen:
            return self._seen[picture]
        stamp = _stamp(picture)
        found = self._known.get(stamp) if stamp else None
        if found is None:
            content = picture.content()
            found = (hashlib.sha256(content).hexdigest()[:24], *_size(content))
            if stamp:
                self._known[stamp] = found
                self._changed = True
        self._seen[picture] = found
        return found


def _remembered(file: Path | None) -> dict[str, _Look]:
    """What an earlier run left; what is damaged is read again."""
    try:
        said = {} if file is None or not file.exists() else read_object(file)
    except (PowersteerError, OSError):
        return {}
    return {stamp: (one[0], one[1], one[2]) for stamp, one in said.items() if _is_look(one)}


def _is_look(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [str, int, int]


def _stamp(picture: Picture) -> str | None:
    """What changes when the file does; None of what is no file, or may still change unseen."""
    if picture.file is None:
        return None
    try:
        stat = picture.file.stat()
    except (OSError, ValueError) as error:  # a dangling link
        raise PowersteerError(f"{picture} cannot be read: {reason_of(error)}") from None
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _SETTLED:
        return None
    return f"{picture.name}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"


def _size(content: bytes) -> tuple[int, int]:
    """(width, height) by the header alone; (0, 0) of what is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and metadata: what matters is said when it is decoded
            with Image.open(io.BytesIO(content), formats=picture_formats()) as image:
                width, height = image.size
                transposed = image.getexif().get(0x0112) in _TRANSPOSED
    except Exception:  # Pillow's headers raise whatever they meet
        return 0, 0
    return (height, width) if transposed else (width, height)
