"""Pictures and arrays of a user, and feature maps of a file, as numbers: what they must be, whatever their kind."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.images import in_srgb

FEATURE_SUFFIX = ".npy"
"""Suffix of files of feature maps."""
_LARGEST = {"uint8": 255, "uint16": 65535, "bool": 1}
"""The value that stands for 1 in an array of whole numbers."""


def picture_or_values(one: Any, channels: int) -> Image.Image | torch.Tensor:
    """An 8-bit picture, of a user's picture or array; its values (C, H, W) where 8 bits cannot hold them.

    Raises:
        PowersteerError: It is neither picture nor array, or may hold anything.
    """
    if isinstance(one, Image.Image):
        if one.mode == "I":
            raise PowersteerError("a picture of mode I may hold anything: give 8 bits a channel, I;16, or an array")
        if one.mode.startswith(("I", "F")):
            return _scaled(np.asarray(one), 1 if one.mode == "F" else _LARGEST["uint16"])[None]
        profile = one.info.get("icc_profile")
        return in_srgb(one, profile, "the condition") if profile and channels != 1 else one
    array = _array(one)
    if array.ndim not in (2, 3) or (array.dtype.name not in _LARGEST and array.dtype.kind != "f"):
        raise PowersteerError(
            f"an array is a condition when it is (H, W) or (H, W, C), of uint8, uint16, bool or floats in [0, 1]; this "
            f"one is {array.shape}, {array.dtype}"
        )
    if array.dtype == np.uint8 and array.shape[2:] in ((), (3,), (4,)):
        return Image.fromarray(array)  # grey of colours, and what is transparent
    values = _scaled(array, _LARGEST.get(array.dtype.name, 1))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def map_values(one: Any, channels: int) -> torch.Tensor:
    """A user's array as a map of numbers (C, h, w).

    Raises:
        PowersteerError: It is no such array.
    """
    array = None if isinstance(one, Image.Image) else _array(one)
    if array is None or array.ndim != 3 or array.dtype.kind not in "fiu":
        raise PowersteerError(
            f"a condition of {channels} channels is no PIL picture: give a tensor, or an array (channels, h, w)"
        )
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def pixel_values(picture: Image.Image) -> torch.Tensor:
    """A picture of 8 bits a channel as (C, H, W) in [0, 1]."""
    values = _scaled(np.asarray(picture), 255)
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


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
        _check_size(content)
        array: Any = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # of a header that is forged, cut short, or asks for more memory than there is
        raise PowersteerError(f"{name} is not a readable .npy of numbers ({reason_of(error)})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise PowersteerError(f"{name} is not a readable .npy of numbers")
    if array.ndim != 3 or not array.size:
        raise PowersteerError(f"{name} must hold a feature map (C, h, w), not an array of shape {array.shape}")
    features = array if array.dtype == np.float16 else array.astype(np.float32)
    if not np.isfinite(features).all():
        raise PowersteerError(f"{name} holds values that are not finite")
    return features


def _check_size(content: bytes) -> None:
    """Refuse a header that tells of more numbers than follow: NumPy would make room for them first."""
    file = io.BytesIO(content)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(content) - file.tell():
        raise ValueError("its size is not what its header says")


def _array(one: Any) -> npt.NDArray[Any]:
    if isinstance(one, np.ndarray):
        return one
    hint = "open it: Image.open(…)" if isinstance(one, str | bytes | Path) else "give a picture, array or tensor"
    raise PowersteerError(f"a {type(one).__name__} is no condition: {hint}")


def _scaled(values: npt.NDArray[Any], largest: float) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(values, dtype=np.float32) / np.float32(largest)))
