"""What a PNG says of how it was made."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from powersteer.errors import PowersteerError

SETTINGS_KEY = "powersteer"
CONDITIONS_KEY = "powersteer-conditions"


@dataclass(frozen=True)
class Metadata:
    """Of one picture."""

    settings: dict[str, Any]
    """The fields of `powersteer.generate.GenerateSettings` and `PictureJob`."""
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
    try:
        with Image.open(file) as picture:
            said: dict[str, Any] = {str(key): value for key, value in picture.info.items()}
        if not isinstance(said.get(SETTINGS_KEY), str):
            raise PowersteerError(f"{file.name} does not say how it was made: give a PNG that powersteer wrote")
        settings: Any = json.loads(said[SETTINGS_KEY])
        conditions: Any = json.loads(said.get(CONDITIONS_KEY, "[]"))
        if not isinstance(settings, dict):
            raise ValueError("no settings")
        return Metadata(settings, [base64.b64decode(condition, validate=True) for condition in conditions])
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise PowersteerError(f"{file.name} is not a readable picture ({error})") from None
    except PowersteerError:
        raise
    except (ValueError, TypeError, binascii.Error):
        raise PowersteerError(f"the settings in {file.name} are damaged: give a PNG as powersteer wrote it") from None
