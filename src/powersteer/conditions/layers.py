"""What is transparent: the one rule, for training, commands and `steer` alike.

In a picture it is white paper. In a condition it is 0: no ink, no label, no depth. A sketch that is mostly transparent
is ink without paper: whatever is opaque is ink, be it dark or light. The alpha of a style (four channels) is its
structure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def on_paper(picture: Image.Image, paper: str = "white") -> Image.Image:
    """A picture as RGB, what is transparent in the paper's colour."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, paper), layers).convert("RGB")


def is_ink_alone(picture: Image.Image) -> bool:
    """Whether more than half of a picture is transparent: then what is opaque is ink, not paper."""
    return _mean(picture.convert("RGBA").getchannel("A")) <= 127


def paper_of(picture: Image.Image) -> str:
    """What a drawing with transparency lies on: the opposite of its ink, or the same as the paper it shows."""
    layers = picture.convert("RGBA")
    opaque = np.asarray(layers.getchannel("A"), dtype=np.float64)
    shown = np.asarray(layers.convert("RGB").convert("L"), dtype=np.float64)
    is_bright = (shown * opaque).sum() > 127 * opaque.sum()
    return "white" if is_bright != is_ink_alone(picture) else "black"


def _mean(grey: Image.Image) -> Any:
    return np.asarray(grey).mean()
