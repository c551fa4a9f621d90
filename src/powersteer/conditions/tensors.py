"""The one form in which every condition reaches the network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from PIL import Image

from powersteer.conditions.kind import KINDS
from powersteer.core.errors import PowersteerError

Condition = torch.Tensor | Image.Image | npt.NDArray[Any] | Sequence[Image.Image | npt.NDArray[Any]]
"""What people have: see `to_condition`."""


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
        tensors = [KINDS.find(kind).to_tensor(one, channels) for one in given]
        if len({tensor.shape for tensor in tensors}) != 1:
            raise PowersteerError("conditions must be one or more pictures of one size")
        condition = torch.stack(tensors)
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


def condition_picture(condition: torch.Tensor, size: tuple[int, int], kind: str | None = None) -> torch.Tensor:
    """A condition (C, H, W) to look at, (3, height, width) in [-1, 1]; see `powersteer.conditions.kind.Kind`.

    Args:
        condition: As an adapter reads it.
        size: Pixels (height, width).
        kind: Of the condition; None where it is not known.
    """
    return KINDS.find(kind).to_picture(condition, size)
