"""The studio's temporary folder: held while it lives, swept when it died, bounded in between."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "powersteer-studio-"
_STUDIO, _TRAINING = "studio.lock", "training.lock"
"""Held by the studio, and by a training that works in its folder and may outlive it by some seconds."""


@contextmanager
def work_folder() -> Generator[Path]:
    """A new temporary folder, as long as the block lasts; those of studios that were killed are removed first."""
    sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with FileLock(folder / _STUDIO):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def training_lock(folder: Path) -> FileLock:
    """What a training holds as long as it needs the folder."""
    return FileLock(folder / _TRAINING)


def sweep(place: Path) -> list[Path]:
    """Remove the folders of this user's studios that nobody holds any more; returns them.

    Args:
        place: Where temporary folders lie; other people's may lie there too.
    """
    removed: list[Path] = []
    for folder in place.glob(f"{PREFIX}*"):
        # A folder without the lock is being made at this moment, or is none of ours.
        with suppress(OSError, Timeout, ValueError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or not (folder / _STUDIO).is_file():
                continue
            with FileLock(folder / _STUDIO, timeout=0), FileLock(folder / _TRAINING, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def make_room(folder: Path, most: int) -> None:
    """Remove the oldest files of a folder until all of them together have at most so many bytes."""
    files: list[tuple[float, int, Path]] = []
    for file in folder.rglob("*"):
        with suppress(OSError):  # it was removed meanwhile
            if file.is_file():
                found = file.stat()
                files.append((found.st_mtime, found.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= most:
            break
        with suppress(OSError):
            file.unlink()
            total -= size


def bytes_in(folder: Path) -> int:
    """How many bytes all files in a folder have together."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def without_place(text: str, folder: Path) -> str:
    """Words that name files in a folder, with the files' names alone: where a server keeps them is its own business."""
    return re.sub(re.escape(f"{folder}/") + r"(?:[^\s'\"]*/)?", "", text)
