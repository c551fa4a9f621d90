"""The one form in which every condition reaches the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from powersteer.errors import PowersteerError

PIL_MODES = {1: "L", 3: "RGB"}
"""PIL mode of a condition of so many channels."""


def to_condition(condition: torch.Tensor | Image.Image | Sequence[Image.Image], channels: int) -> torch.Tensor:
    """PIL picture(s) or a tensor as a checked condition (N, C, H, W) in [0, 1].

    Args:
        condition: One picture, several of one size, or a tensor (N, C, H, W).
        channels: The channels that the network reads.

    Raises:
        PowersteerError: Wrong number of channels or dimensions, sizes that differ, or values outside [0, 1].
    """
    if not isinstance(condition, torch.Tensor):
        pictures = [condition] if isinstance(condition, Image.Image) else list(condition)
        if channels not in PIL_MODES:
            raise PowersteerError(f"a condition of {channels} channels is no PIL picture: give a tensor")
        if len({picture.size for picture in pictures}) != 1:
            raise PowersteerError("conditions must be one or more pictures of one size")
        arrays = [np.array(picture.convert(PIL_MODES[channels]), dtype=np.float32) / 255 for picture in pictures]
        condition = torch.from_numpy(np.stack(arrays))
        condition = condition[:, None] if channels == 1 else condition.permute(0, 3, 1, 2)
    if condition.ndim != 4 or condition.shape[1] != channels or not condition.numel():
        raise PowersteerError(f"the condition must have shape (N, {channels}, H, W), not {tuple(condition.shape)}")
    low, high = condition.min().item(), condition.max().item()
    if not (low >= 0 and high <= 1):
        hint = "; did you forget to divide by 255?" if high > 1 else ""
        raise PowersteerError(f"condition values must lie in [0, 1], not [{low:g}, {high:g}]{hint}")
    return condition
