"""What a PNG says of how it was made."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes
from powersteer.core.images import decode_picture
from powersteer.core.text import parse_json, parse_object

SETTINGS_KEY = "powersteer"
CONDITIONS_KEY = "powersteer-conditions"


@dataclass(frozen=True)
class Metadata:
    """What one picture carries: how it was made, and from what."""

    settings: dict[str, Any]
    """The fields of `powersteer.denoising.settings.GenerateSettings` and `PictureJob`."""
    conditions: list[bytes]
    """The files that it was made to follow, where the picture carries them."""


def save_picture(picture: Image.Image, file: Path, settings: dict[str, Any], conditions: Sequence[Path] = ()) -> None:
    """Write a PNG that carries its settings: whole, or not at all.

    Args:
        picture: What to write.
        file: The PNG.
        settings: Plain values.
        conditions: Files to carry along, so that the picture can be made again from itself alone.

    Raises:
        OSError: A file cannot be read or written.
    """
    metadata = PngInfo()
    metadata.add_text(SETTINGS_KEY, json.dumps(settings))
    if conditions:
        encoded = [base64.b64encode(condition.read_bytes()).decode() for condition in conditions]
        metadata.add_text(CONDITIONS_KEY, json.dumps(encoded), zip=True)
    partial = file.with_suffix(".partial")
    picture.save(partial, format="PNG", pnginfo=metadata)
    partial.replace(file)


def read_metadata(file: Path) -> Metadata:
    """What `save_picture` wrote.

    Raises:
        PowersteerError: It is no picture, or says nothing that can be understood.
    """
    image = decode_picture(read_bytes(file), file.name, ["PNG"])
    said = {name: value for name, value in image.info.items() if isinstance(value, str)}
    if SETTINGS_KEY not in said:
        raise PowersteerError(f"{file.name} does not say how it was made: give a PNG that powersteer wrote")
    settings = parse_object(said[SETTINGS_KEY], f"the text of the settings in {file.name}")
    conditions = parse_json(said.get(CONDITIONS_KEY, "[]"), f"the text of the conditions in {file.name}")
    try:
        return Metadata(settings, [base64.b64decode(condition, validate=True) for condition in conditions])
    except (ValueError, TypeError):
        raise PowersteerError(f"the conditions in {file.name} are damaged: give a PNG as powersteer wrote it") from None
