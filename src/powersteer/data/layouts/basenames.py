"""``images/`` and ``conditioning_images/`` with the same base names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from powersteer.conditions.kind import KINDS
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, is_folder
from powersteer.core.text import read_text
from powersteer.data.layouts.base import Columns, ReadRow, Seen, alone, pictures_in
from powersteer.data.rows import Picture, Row

IMAGES, CONDITIONS = "images", "conditioning_images"


class Basenames:
    """``images/`` and ``conditioning_images/`` with the same base names, in the same subfolders; captions in
    ``images/*.txt``.
    """

    def fits(self, folder: Path) -> bool:
        """Whether both folders are there."""
        return is_folder(folder / IMAGES) and is_folder(folder / CONDITIONS)

    def rows(self, folder: Path, columns: Columns, seen: Seen) -> Iterator[ReadRow]:
        """By name."""
        if not columns.is_default:
            raise PowersteerError(
                f"{folder} has pictures by name, no columns: leave the columns' names out, or write a metadata.jsonl"
            )
        images, conditions = _by_name(folder / IMAGES), _by_name(folder / CONDITIONS, *KINDS.suffixes)
        for i, (name, files) in enumerate(images.items()):
            yield partial(_row, f"{folder.name}[{i}]", name, files, conditions.get(name, []), seen)


def _row(where: str, name: str, images: list[Path], conditions: list[Path], seen: Seen) -> Row:
    caption = images[0].with_suffix(".txt")
    for file in (caption, *images, *conditions):
        seen.take(file)
    for files in (images, conditions):
        alone(where, name, [str(file) for file in files])
    if not conditions:
        raise PowersteerError(f"{where}: '{images[0]}' has no partner of its name in {CONDITIONS}")
    (image,), (condition,) = images, conditions
    for file in (image, condition):
        if not is_file(file):
            raise PowersteerError(f"{where}: '{file}' not found: it is a link to nothing")
    texts = (read_text(caption).strip(),) if is_file(caption) else ()
    return Row(
        where,
        Picture(str(image), IMAGES, image.read_bytes, image),
        Picture(str(condition), CONDITIONS, condition.read_bytes, condition),
        texts,
        no_text="" if texts else f"there is no {caption}",
    )


def _by_name(folder: Path, *others: str) -> dict[str, list[Path]]:
    """Path within the folder, without suffix → the files that claim it."""
    found: dict[str, list[Path]] = {}
    for file in pictures_in(folder, *others, held_out=False):
        found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return found
