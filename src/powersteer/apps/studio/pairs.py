"""Pairs that a visitor brings: a zip, or a folder of this machine. Nothing outside of it is read."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from powersteer.apps.studio.folders import bytes_in
from powersteer.apps.studio.uploads import unpack_pairs
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes
from powersteer.core.text import decode_text, json_lines, parse_object
from powersteer.data.check import DataReport, check_pairs
from powersteer.data.layouts import LAYOUTS, read_rows

SHOWN_PAIRS = 12
KEPT_ZIPS = 32
"""Unpacked; older ones make room."""
KEPT_BYTES = 4_000_000_000
_METADATA = ("metadata.jsonl", "prompt.json")
_PATHS = ("file_name", "conditioning_image_file_name", "conditioning_image", "source", "target")
"""Columns of those files that name other files."""
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""A data set of `datasets` may name files in its tables, which are not looked through here."""


@dataclass(frozen=True)
class PairsFound:
    """A folder of pairs, looked through."""

    folder: Path
    report: DataReport
    shown: list[tuple[Image.Image, str]]
    """Condition beside picture, and the caption, of some."""


class Unpacked:
    """Zips that were unpacked: one for each visitor, bounded in all.

    Args:
        place: Where.
        in_use: The folder of pairs that must stay, if there is one.
    """

    def __init__(self, place: Path, in_use: Callable[[], Path | None]) -> None:
        self.place, self.in_use = place, in_use
        self._kept: dict[Path, tuple[str, int]] = {}
        """Whose, and how many bytes; oldest first."""

    def look(self, archive: Path, who: str, default_prompt: str | None) -> PairsFound:
        """Unpack a zip and look through it; the visitor's older one goes, and the oldest of all where it is too much.

        Args:
            archive: The zip.
            who: The visitor.
            default_prompt: See `look_through`.

        Raises:
            PowersteerError: See `unpack_pairs` and `look_through`; then nothing is left of it, and the older one stays.
        """
        root = self.place / uuid.uuid4().hex
        try:
            found = look_through(unpack_pairs(archive, root), archive.name, default_prompt)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        for older in [one for one, (owner, _) in self._kept.items() if owner == who]:
            self._drop(older)
        self._kept[root] = who, bytes_in(root)
        for older in [one for one in self._kept if one != root]:
            if len(self._kept) > KEPT_ZIPS or sum(size for _, size in self._kept.values()) > KEPT_BYTES:
                self._drop(older)
        return found

    def _drop(self, root: Path) -> None:
        """Unless it is in use: then it goes another time."""
        used = self.in_use()
        if used is None or not used.is_relative_to(root):
            self._kept.pop(root, None)
            shutil.rmtree(root, ignore_errors=True)


def named_folder(name: str, work_dir: Path) -> Path:
    """The folder that a person of this machine named.

    Args:
        name: As it was typed.
        work_dir: The studio's own folder, where uploads lie: none of its folders may be named.

    Raises:
        PowersteerError: There is no such folder, or it is one of the studio's.
    """
    folder = Path(name.strip())
    try:
        folder = folder.expanduser()
        there, inside = folder.is_dir(), folder.resolve().is_relative_to(work_dir.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, with NUL, of no such user
        there, inside = False, False
    if inside:
        raise PowersteerError("that is a folder of the studio itself: drop a zip, or name a folder of your own")
    if not there:
        raise PowersteerError(f"there is no folder of pairs {name.strip()[:200]!r}")
    return folder


def look_through(folder: Path, name: str, default_prompt: str | None) -> PairsFound:
    """Look through a folder of pairs, which may come from anybody.

    Args:
        folder: The folder.
        name: What a message calls it.
        default_prompt: Caption of pairs that have none.

    Raises:
        PowersteerError: It holds no pairs, or leads out of itself.
    """
    try:
        confine(folder, name)
        rows = read_rows(folder, None, [])
        for picture in (picture for row in rows for picture in (row.image, row.conditioning_image)):
            if picture.file is None or not _is_in(folder, picture.file):
                raise _elsewhere(name)
        report = check_pairs(folder, default_prompt=default_prompt)
    except PowersteerError as error:
        raise PowersteerError(str(error).replace(f"{folder}/", "").replace(str(folder), name)) from None
    shown: list[tuple[Image.Image, str]] = []
    for row in rows[:SHOWN_PAIRS]:
        with suppress(PowersteerError):
            pair = _side_by_side(row.conditioning_image.picture(), row.image.picture())
            shown.append((pair, row.text or default_prompt or ""))
    return PairsFound(folder, _without_place(report, folder), shown)


def _without_place(report: DataReport, folder: Path) -> DataReport:
    """The report, which names files from the folder on."""

    def short(text: str) -> str:
        return text.replace(f"{folder}/", "")

    findings = [
        replace(one, text=short(one.text), example=short(one.example), remedy=short(one.remedy))
        for one in report.findings
    ]
    errors, warnings = ([short(line) for line in part] for part in (report.errors, report.warnings))
    return DataReport(report.facts, errors, warnings, findings)


def confine(folder: Path, name: str) -> None:
    """Refuse a folder of pairs in which a link or a row leads out of it, before anything else of it is read.

    Raises:
        PowersteerError: One does, or there is what is neither file nor folder.
    """
    if not any(layout.fits(folder) for layout in LAYOUTS):
        return  # which reading it says; it may be a whole disk
    if any((folder / file).exists() for file in _SAVED):
        raise PowersteerError(f"{name} is a data set that `datasets` saved: train on it with `powersteer train`")
    for place, folders, files in os.walk(folder):
        for one in (Path(place, part) for part in (*folders, *files)):
            if one.is_symlink() and not _is_in(folder, one):
                raise _elsewhere(name)
            if one.exists() and not one.is_file() and not one.is_dir():
                raise PowersteerError(f"{name} holds '{one.name}', which is neither a file nor a folder: take it out")
    for file in (folder / file for file in _METADATA if (folder / file).exists()):
        for _, line in json_lines(decode_text(read_bytes(file), file.name), file.name):
            if not all(_is_in(folder, folder / path) for path in _paths_in(line)):
                raise _elsewhere(name)


def _paths_in(line: str) -> list[str]:
    try:
        row = parse_object(line, "a row")
    except PowersteerError:
        return []  # that it is none is told when the rows are read
    return [row[column] for column in _PATHS if isinstance(row.get(column), str)]


def _is_in(folder: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        return False


def _elsewhere(name: str) -> PowersteerError:
    return PowersteerError(f"{name} names pictures that are not in it: pack them too, or train from the command line")


def _side_by_side(condition: Image.Image, picture: Image.Image, height: int = 160) -> Image.Image:
    parts = [part.resize((max(1, part.width * height // part.height), height)) for part in (condition, picture)]
    sheet = Image.new("RGB", (sum(part.width for part in parts) + 4, height), "#888888")
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (parts[0].width + 4, 0))
    return sheet
