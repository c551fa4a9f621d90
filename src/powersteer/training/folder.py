"""The output folder of a run: one run at a time, swept of what kills left, and noticed when it goes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of

LOCK = "run.lock"
REFIT = "refit"
LOCK_SECONDS = 8
"""So long a run waits for the lock: the data workers of one that was killed leave within five."""
_LEFT = re.compile(
    r"\.checkpoint-\d+\.(old|partial)|\.adapter\.partial|log\.partial|\.(log\.jsonl|run\.json|train\.yaml)"
)
"""What a kill leaves amid a write."""

StillThere = Callable[[], None]
"""Raises `PowersteerError` when the folder is gone."""


@contextmanager
def held(output_dir: Path, writes: bool) -> Generator[StillThere]:
    """The folder, made if need be, with no other training in it until the block ends.

    Args:
        output_dir: The folder.
        writes: Whether this process is the one that writes; of several, one does.

    Raises:
        PowersteerError: It cannot be written, or another training is at work in it.
    """
    try:
        made = not output_dir.exists()
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / LOCK, timeout=LOCK_SECONDS)
        if writes:
            lock.acquire()
            sweep(output_dir)
    except Timeout:
        raise PowersteerError(
            f"another training is at work in {output_dir}: wait for its end, or give another output_dir"
        ) from None
    except (OSError, ValueError) as error:
        raise PowersteerError(f"cannot write to {output_dir}: {reason_of(error)}") from None
    try:
        yield _watch(output_dir) if writes else lambda: None
    finally:
        if writes:
            with suppress(OSError):
                if made and [path.name for path in output_dir.iterdir()] == [LOCK]:  # refused before it began
                    shutil.rmtree(output_dir)
            lock.release()


def sweep(output_dir: Path) -> None:
    """Remove what kills left half-written or half-removed."""
    for place in (output_dir, output_dir / REFIT):
        for path in place.iterdir() if place.is_dir() else ():
            if _LEFT.fullmatch(path.name):
                remove(path)
    for path in (output_dir / "validation").glob("*.partial"):
        remove(path)


def remove(path: Path) -> None:
    """A file, or a folder and all in it; whatever of it cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def writing(what: Path | str) -> Generator[None]:
    """Within the block, an error in writing is one line.

    Raises:
        PowersteerError: Something could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PowersteerError(f"cannot write {what}: {full_reason(error)}") from None


def full_reason(error: Exception) -> str:
    """The operating system's words, also where a library hands on only their number."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else reason_of(error)


def _watch(output_dir: Path) -> StillThere:
    known = (output_dir / LOCK).stat()

    def still_there() -> None:
        try:
            same = os.path.samestat((output_dir / LOCK).stat(), known)
        except FileNotFoundError:
            same = False
        except OSError:
            same = True  # a file system that is away for a moment
        if not same:
            raise PowersteerError(
                f"{output_dir} was removed, moved or replaced while it was trained into: the training has stopped, "
                "since its best weights are gone from there; the same command begins anew"
            )

    return still_there
