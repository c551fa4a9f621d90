"""The door for encoded pictures: bytes → a Pillow picture, upright, in sRGB, 8 bits a channel; or the one error."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image, ImageCms, ImageOps

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of

_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24
"""A PNG's first bytes, and the offset of its bit depth."""
_BITS_PER_SAMPLE = 258
"""TIFF's tag."""
_NOT_READ = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
"""They need another program, or hold no picture."""


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read: all it reads by itself; EPS, say, would run another program."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in _NOT_READ)


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes of those formats' files, in lower case: ``.png``, ``.jfif``, …"""
    formats = picture_formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def open_picture(content: bytes, where: str, formats: Sequence[str] | None = None) -> Image.Image:
    """Decode a picture.

    Args:
        content: The file.
        where: Its name, for messages.
        formats: Those that are taken; `picture_formats` by default.

    Returns:
        Mode L, RGB, or RGBA where it has transparency; upright by its EXIF orientation; in sRGB, whatever its colour
        profile.

    Raises:
        PowersteerError: It is no readable picture, is cut short, has too many pixels, more than 8 bits a channel, or a
            colour profile that cannot be read.
    """
    return normalised(decode_picture(content, where, formats), content, where)


def normalised(image: Image.Image, content: bytes, where: str) -> Image.Image:
    """What `open_picture` returns, of a picture that `decode_picture` gave."""
    if _is_deep(image, content):
        raise PowersteerError(f"{where} has 16 bits a channel or more: save it with 8 bits a channel")
    upright = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if profile:
        return in_srgb(upright, profile, where)
    if upright.has_transparency_data:
        return upright.convert("RGBA")
    return upright.convert("L" if upright.mode in ("1", "L") else "RGB")


def decode_picture(content: bytes, where: str, formats: Sequence[str] | None = None) -> Image.Image:
    """Decode a picture's pixels as they are stored; see `open_picture`.

    Raises:
        PowersteerError: It is no readable picture, is cut short, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=tuple(formats or picture_formats()))
        image.load()
        image.getexif()
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise PowersteerError(_told(content, where, error)) from None
    return image


def _told(content: bytes, where: str, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"{where} has too many pixels: scale it down to {most} million at most"
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheif"):
        return f"{where} is a HEIC picture, which is not read here: save it as PNG or JPEG"
    if isinstance(error, ValueError) and "MAX_TEXT" in str(error):
        return f"{where} carries too much text beside its pixels: save it without metadata"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{where} is not a readable picture: it is {'empty' if not content else 'of no known format'}"
    return f"{where} is not a readable picture ({reason_of(error)})"


def _is_deep(image: Image.Image, content: bytes) -> bool:
    """Whether it has more than 8 bits a channel, which Pillow may have dropped unseen."""
    if image.mode.startswith(("I", "F")):
        return True
    if content.startswith(_PNG):
        return content[_PNG_DEPTH] > 8
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, ())
    return any(depth > 8 for depth in (bits if isinstance(bits, tuple) else (bits,)))


def in_srgb(image: Image.Image, profile: bytes, where: str) -> Image.Image:
    """A picture whose colours its profile tells: L, RGB, or RGBA where it has transparency, in sRGB.

    Args:
        image: Any 8-bit mode.
        profile: ICC.
        where: Its name, for messages.

    Raises:
        PowersteerError: The profile cannot be read, or is of another kind of picture.
    """
    is_grey = image.mode in ("1", "L", "LA", "La")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    given = image if image.mode == "CMYK" else image.convert("L" if is_grey else "RGB")
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.mode != "CMYK" and "srgb" in ImageCms.getProfileDescription(source).lower():
            made = given
        else:
            space = source.profile.xcolor_space.strip()
            given = given.convert({"GRAY": "L", "RGB": "RGB"}.get(space, given.mode)) if given.mode != "CMYK" else given
            made = ImageCms.profileToProfile(given, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception as error:  # littlecms, and Pillow's glue to it
        raise PowersteerError(
            f"{where} has a colour profile that cannot be used ({reason_of(error)}): save it in sRGB, or without one"
        ) from None
    assert made is not None
    made = made.convert("RGB" if alpha is not None or not is_grey else "L")
    if alpha is not None:
        made.putalpha(alpha)
    made.info.pop("icc_profile", None)
    return made
