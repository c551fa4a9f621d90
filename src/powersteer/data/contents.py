"""What pictures hold, remembered while their files stay as they are: as git's index does it."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from powersteer.data.rows import Picture
from powersteer.errors import PowersteerError

_TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


@dataclass
class Contents:
    """Digests and sizes of pictures; a file is read again only when its size or time of change is another.

    Args:
        file: Where they are remembered between runs; nothing is without one.
    """

    file: Path | None = None
    _known: dict[str, tuple[str, int, int]] = field(default_factory=dict[str, tuple[str, int, int]], init=False)
    _changed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            try:
                self._known = json.loads(self.file.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # cut short: all is read again

    def digest(self, picture: Picture) -> str:
        """Of its bytes."""
        return self._look(picture)[0]

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
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self._known), encoding="utf-8")
            partial.replace(self.file)
            self._changed = False

    def _look(self, picture: Picture) -> tuple[str, int, int]:
        stamp = _stamp(picture)
        known = self._known.get(stamp) if stamp else None
        if known is None:
            content = picture.content()
            known = (hashlib.sha256(content).hexdigest()[:24], *_size(content))
            if stamp:
                self._known[stamp] = known
                self._changed = True
        return known


def _stamp(picture: Picture) -> str | None:
    if picture.file is None:
        return None
    stat = picture.file.stat()
    return f"{picture.name}|{stat.st_size}|{stat.st_mtime_ns}"


def _size(content: bytes) -> tuple[int, int]:
    """(width, height) by the header alone; (0, 0) of what is no picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            transposed = image.getexif().get(0x0112) in _TRANSPOSED
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
        return 0, 0
    return (height, width) if transposed else (width, height)
