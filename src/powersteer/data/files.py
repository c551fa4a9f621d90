"""Files that are there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

from powersteer.errors import PowersteerError


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
    except OSError as error:
        raise PowersteerError(f"cannot write {path}: {error.strerror}") from None
