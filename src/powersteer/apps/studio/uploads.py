"""What strangers send: pictures and zips, opened only after a look at their size and names."""

from __future__ import annotations

import base64
import io
import shutil
import stat
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import Image

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of, write_whole
from powersteer.core.images import picture_formats, picture_suffixes

MAX_PIXELS = 50_000_000
"""The most pixels that one picture may have: enough for a camera's, too few for a decompression bomb's."""
MAX_DRAWING_BYTES = 4_000_000
MAX_DRAWING_SIDE = 1024
MAX_FILES = 20_000
MAX_DEPTH = 20
MAX_UNPACKED_BYTES = 2_000_000_000
MAX_PACKING = 200
"""Times that a file may be smaller in its zip: drawings pack well, bombs a thousandfold."""
_CHUNK = 1 << 20
_SYSTEM = ("__MACOSX", ".DS_Store", "Thumbs.db")
"""Names that operating systems put into zips."""


def check_picture(file: Path) -> None:
    """Refuse what is no picture, or too large a one; no pixel is decoded.

    Raises:
        PowersteerError: It is of no format that is read here, or has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(file, formats=picture_formats()) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        raise PowersteerError(f"{file.name} is too large: give a picture of {MAX_PIXELS // 10**6} megapixels") from None
    except Exception:  # Pillow's readers raise whatever they meet
        raise PowersteerError(f"{file.name} is not a readable picture: give a PNG, JPEG or WebP") from None
    if width * height > MAX_PIXELS:
        raise PowersteerError(
            f"{file.name} is {width}×{height} pixels: give a picture of at most {MAX_PIXELS // 10**6} megapixels"
        )


def write_drawing(drawing: str | bytes, file: Path) -> Path:
    """Write a drawing from the canvas, or from a picture's metadata, as a PNG.

    Args:
        drawing: ``data:image/png;base64,…``, or a PNG's bytes.
        file: Where to.

    Raises:
        PowersteerError: It is no PNG, or larger than a canvas.
    """
    refusal = PowersteerError("the drawing could not be read: clear the canvas and draw again")
    if isinstance(drawing, str):
        head, comma, encoded = drawing.partition(",")
        if head != "data:image/png;base64" or not comma or len(encoded) > 2 * MAX_DRAWING_BYTES:
            raise refusal
        try:
            drawing = base64.b64decode(encoded, validate=True)
        except ValueError:
            raise refusal from None
    if len(drawing) > MAX_DRAWING_BYTES:
        raise refusal
    try:
        with Image.open(io.BytesIO(drawing), formats=["PNG"]) as picture:
            if max(picture.size) > MAX_DRAWING_SIDE:
                raise refusal
            picture.load()
    except Exception:  # Pillow's readers raise whatever they meet
        raise refusal from None
    write_whole(file, drawing)
    return file


def unpack_pairs(archive: Path, folder: Path) -> Path:
    """Unpack a zip of pairs; nothing is left of one that is refused.

    Args:
        archive: The zip.
        folder: A new folder.

    Returns:
        Where the pairs lie: the folder, or the only one in it.

    Raises:
        PowersteerError: It is no zip, is encrypted or damaged, a name leads out of the folder, it holds links, too
            many files, too many bytes, or a picture that `check_picture` refuses.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = _checked(packed.infolist())
            folder.mkdir(parents=True)
            left = MAX_UNPACKED_BYTES
            for member, path in members:
                left -= _unpack(packed, member, folder / path, left)
        for _, path in members:
            if path.suffix.lower() in picture_suffixes():
                check_picture(folder / path)
    except PowersteerError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception as error:  # zipfile and what it decompresses with raise whatever they meet
        shutil.rmtree(folder, ignore_errors=True)
        raise PowersteerError(
            f"{archive.name} cannot be unpacked ({reason_of(error)}): give a whole zip without a password"
        ) from None
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() and inside[0].name != "images" else folder


def _checked(members: list[zipfile.ZipInfo]) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files and their paths, all of them within the folder."""
    files: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in member.filename or "\0" in member.filename:
            raise PowersteerError(f"the zip holds '{member.filename}', which leads out of it: pack the folder anew")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise PowersteerError(f"the zip holds the link '{member.filename}': pack the files themselves")
        if not member.is_dir() and not any(part in _SYSTEM or part.startswith("._") for part in path.parts):
            if len(path.parts) > MAX_DEPTH:
                raise PowersteerError(f"the zip holds folders more than {MAX_DEPTH} deep: pack the pairs alone")
            files.append((member, path))
    twice = next((path for path, times in Counter(path for _, path in files).items() if times > 1), None)
    if twice is not None:
        raise PowersteerError(f"the zip holds '{twice}' twice: pack the folder anew")
    if not files:
        raise PowersteerError("the zip is empty: pack the folder of pairs")
    if len(files) > MAX_FILES:
        raise PowersteerError(f"the zip holds {len(files)} files, more than {MAX_FILES}: train from the command line")
    return files


def _unpack(packed: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path, left: int) -> int:
    """Write one file; what its header says of its size is not believed."""
    limit = min(left, max(_CHUNK, MAX_PACKING * member.compress_size))
    file.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with packed.open(member) as source, file.open("wb") as target:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > limit:
                raise PowersteerError(
                    f"'{member.filename}' unpacks to more than {limit / 1e6:.0f} MB: the zip is too large, or a trap"
                )
            target.write(chunk)
    return written
