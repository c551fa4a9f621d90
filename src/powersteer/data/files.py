"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from powersteer.errors import PowersteerError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it.

    Raises:
        PowersteerError: It cannot be written.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name[-100:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise PowersteerError(f"cannot write {path}: {error.strerror}") from None
