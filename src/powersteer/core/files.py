"""Files: read or refused in words; written whole, or not at all."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from powersteer.core.errors import PowersteerError


def embedded(name: str) -> Path:
    """The folder of something that ships in the package."""
    return Path(str(files("powersteer.core"))) / "assets" / name


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        PowersteerError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PowersteerError(f"{path} cannot be read: it does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in its name
        raise PowersteerError(f"{path} cannot be read: {reason_of(error)}") from None


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have (too long, with NUL) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; see `is_file`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def write_whole(path: Path, content: bytes, writer: str = "") -> None:
    """Write a file under another name and rename it; what a kill left of it is written over the next time.

    Args:
        path: The file.
        content: All of it.
        writer: Tells apart those that may write the same file at once.

    Raises:
        PowersteerError: It cannot be written.
    """
    partial = path.with_name(f".{writer}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise PowersteerError(f"cannot write {path}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """Why an operation on a file failed, in one line: the operating system's words where it has some."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join((said or str(error)).split())[:200] or type(error).__name__
