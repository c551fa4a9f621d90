"""The one form in which every condition reaches the network."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from powersteer.errors import PowersteerError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""PIL mode of a condition of so many channels; RGBA holds colour, and structure in alpha."""
NO_STRUCTURE = "has no alpha channel: a condition of 4 channels is colour in RGB and structure in alpha"


def to_condition(
    condition: torch.Tensor | Image.Image | Sequence[Image.Image],
    channels: int,
    bounds: Sequence[float] | None = (0, 1),
) -> torch.Tensor:
    """PIL picture(s) or a tensor as a checked condition (N, C, H, W).

    Args:
        condition: One picture, several of one size, or a tensor (N, C, H, W).
        channels: The channels that the network reads.
        bounds: Least and greatest value; None for any finite ones.

    Raises:
        PowersteerError: Wrong number of channels or dimensions, sizes that differ, or values out of bounds.
    """
    if not isinstance(condition, torch.Tensor):
        pictures = [condition] if isinstance(condition, Image.Image) else list(condition)
        if channels not in PIL_MODES:
            raise PowersteerError(f"a condition of {channels} channels is no PIL picture: give a tensor")
        if len({picture.size for picture in pictures}) != 1:
            raise PowersteerError("conditions must be one or more pictures of one size")
        if channels == 4 and not all(picture.has_transparency_data for picture in pictures):
            raise PowersteerError(f"the condition {NO_STRUCTURE}")
        arrays = [np.array(picture.convert(PIL_MODES[channels]), dtype=np.float32) / 255 for picture in pictures]
        condition = torch.from_numpy(np.stack(arrays))
        condition = condition[:, None] if channels == 1 else condition.permute(0, 3, 1, 2)
    if condition.ndim != 4 or condition.shape[1] != channels or not condition.numel():
        raise PowersteerError(f"the condition must have shape (N, {channels}, H, W), not {tuple(condition.shape)}")
    low, high = condition.min().item(), condition.max().item()
    least, greatest = (-sys.float_info.max, sys.float_info.max) if bounds is None else bounds
    if not (low >= least and high <= greatest):
        wanted = "be finite" if bounds is None else f"lie in [{least:g}, {greatest:g}]"
        hint = "; did you forget to divide by 255?" if greatest == 1 and high > 1 else ""
        raise PowersteerError(f"condition values must {wanted}, not [{low:g}, {high:g}]{hint}")
    return condition


def resized(
    picture: Image.Image,
    size: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """A picture, or a box of it, at a size (width, height); colour and structure of RGBA each for itself.

    PIL would weigh colour with alpha: where there is no structure, no colour would be left.
    """
    if picture.mode != "RGBA":
        return picture.resize(size, resampling, box)
    return Image.merge("RGBA", [band.resize(size, resampling, box) for band in picture.split()])


def read_features(content: bytes, name: str) -> npt.NDArray[np.floating[Any]]:
    """A feature map (C, h, w) of a ``.npy``: half precision stays, all else becomes single.

    Raises:
        PowersteerError: It is no such array, or holds values that are not finite.
    """
    try:
        array: Any = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError):
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise PowersteerError(f"{name} is not a readable .npy of numbers")
    if array.ndim != 3 or not array.size:
        raise PowersteerError(f"{name} must hold a feature map (C, h, w), not an array of shape {array.shape}")
    features = array if array.dtype == np.float16 else array.astype(np.float32)
    if not np.isfinite(features).all():
        raise PowersteerError(f"{name} holds values that are not finite")
    return features
