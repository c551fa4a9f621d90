"""The one form in which every condition reaches the network."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from powersteer.conditions.kinds import FEATURE
from powersteer.conditions.layers import PIL_MODES, as_condition
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.images import in_srgb

Condition = torch.Tensor | Image.Image | npt.NDArray[Any] | Sequence[Image.Image | npt.NDArray[Any]]
"""What people have: see `to_condition`."""
_LARGEST = {"uint8": 255, "uint16": 65535, "bool": 1}
"""The value that stands for 1 in an array of whole numbers."""


def to_condition(
    condition: Condition,
    channels: int,
    bounds: Sequence[float] | None = (0, 1),
    kind: str | None = None,
) -> torch.Tensor:
    """Picture(s), array(s) or a tensor as a checked condition (N, C, H, W).

    Args:
        condition: A PIL picture, or an array (H, W) or (H, W, C) of bytes, of 16 bits or of floats, its channels red,
            green, blue (features: (C, h, w)); several of one size; or a tensor (N, C, H, W).
        channels: The channels that the network reads.
        bounds: Least and greatest value; None for any finite ones.
        kind: Of the network's condition; None where it is not known.

    Raises:
        PowersteerError: It is none of these, has a wrong number of channels or dimensions, sizes that differ, or values
            out of bounds.
    """
    if not isinstance(condition, torch.Tensor):
        given: Any = condition if _is_list(condition) else [condition]
        arrays = [_values(one, channels, kind) for one in given]
        if len({array.shape for array in arrays}) != 1:
            raise PowersteerError("conditions must be one or more pictures of one size")
        condition = torch.from_numpy(np.stack(arrays))
    if condition.ndim != 4 or condition.shape[1] != channels or not condition.numel():
        raise PowersteerError(f"the condition must have shape (N, {channels}, H, W), not {tuple(condition.shape)}")
    low, high = condition.min().item(), condition.max().item()
    least, greatest = (-sys.float_info.max, sys.float_info.max) if bounds is None else bounds
    if not (low >= least and high <= greatest):
        wanted = "be finite" if bounds is None else f"lie in [{least:g}, {greatest:g}]"
        hint = "; did you forget to divide by 255?" if greatest == 1 and high > 1 else ""
        raise PowersteerError(f"condition values must {wanted}, not [{low:g}, {high:g}]{hint}")
    return condition


def _is_list(condition: Any) -> bool:
    return isinstance(condition, Sequence) and not isinstance(condition, str | bytes)


def _values(one: Any, channels: int, kind: str | None) -> npt.NDArray[np.float32]:
    """One picture or array as (C, H, W)."""
    is_picture = isinstance(one, Image.Image)
    if not is_picture and not isinstance(one, np.ndarray):
        hint = "open it: Image.open(…)" if isinstance(one, str | bytes | Path) else "give a picture, array or tensor"
        raise PowersteerError(f"a {type(one).__name__} is no condition: {hint}")
    if kind == FEATURE or channels not in PIL_MODES:
        if is_picture or one.ndim != 3 or one.dtype.kind not in "fiu":
            raise PowersteerError(
                f"a condition of {channels} channels is no PIL picture: give a tensor, or an array (channels, h, w)"
            )
        return np.asarray(one, dtype=np.float32)
    if is_picture:
        return _picture_values(one, channels, kind)
    if one.ndim not in (2, 3) or (one.dtype.name not in _LARGEST and one.dtype.kind != "f"):
        raise PowersteerError(
            f"an array is a condition when it is (H, W) or (H, W, C), of uint8, uint16, bool or floats in [0, 1]; this "
            f"one is {one.shape}, {one.dtype}"
        )
    if one.dtype == np.uint8 and one.shape[2:] in ((), (3,), (4,)):
        return _picture_values(Image.fromarray(one), channels, kind)  # grey of colours, and what is transparent
    values = _scaled(one, _LARGEST.get(one.dtype.name, 1))
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _picture_values(picture: Image.Image, channels: int, kind: str | None) -> npt.NDArray[np.float32]:
    if picture.mode.startswith(("I", "F")):
        if picture.mode == "I":
            raise PowersteerError("a picture of mode I may hold anything: give 8 bits a channel, I;16, or an array")
        return _scaled(np.asarray(picture), 1 if picture.mode == "F" else _LARGEST["uint16"])[None]
    profile = picture.info.get("icc_profile")
    if profile and channels != 1:
        picture = in_srgb(picture, profile, "the condition")
    values = _scaled(np.asarray(as_condition(picture, channels, kind, "the condition")), 255)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


def _scaled(values: npt.NDArray[Any], largest: float) -> npt.NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32) / np.float32(largest)


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
