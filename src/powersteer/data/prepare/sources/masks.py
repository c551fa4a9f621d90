"""COCO's segmentations → masks: polygons, and run lengths plain or packed into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from powersteer.core.errors import PowersteerError

FARTHEST = 1e6
"""Pixels of a polygon's corner from the origin."""


def to_mask(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The pixels (H, W) of a segmentation.

    Args:
        segmentation: Polygons ``[[x, y, x, y, …], …]``, or ``{"counts": …, "size": [height, width]}``.
        size: Of the picture (width, height).

    Raises:
        PowersteerError: It is neither, or of a picture of another size.
    """
    try:
        if isinstance(segmentation, dict):
            counts: Any = segmentation["counts"]
            if list(segmentation["size"]) != [size[1], size[0]]:
                raise PowersteerError(f"a mask of (height, width) {segmentation['size']} on a picture of {size[::-1]}")
            return _runs(counts if isinstance(counts, list) else unpack_runs(counts), size)
        return _polygons(segmentation, size)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, PowersteerError):
            raise
        raise PowersteerError("a segmentation is neither polygons nor run lengths as COCO has them") from None


def unpack_runs(packed: str) -> list[int]:
    """Run lengths of their text: five bits a character from ``0`` up, the sixth says that more follow; from the third
    on, each is told by its difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in packed:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift  # the highest bit is the sign
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("cut short")
    return runs


def _runs(runs: Sequence[int], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Background and mask by turns, down the columns."""
    width, height = size
    if sum(runs) != width * height or min(runs) < 0:
        raise PowersteerError(f"a mask's runs cover {sum(runs)} pixels of {width * height}")
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return values.reshape(width, height).T


def _polygons(polygons: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The pixels whose middle lies in any of the polygons, by the even-odd rule."""
    width, height = size
    mask = np.zeros((height, width), dtype=np.bool_)
    for polygon in polygons:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if not (np.abs(points) <= FARTHEST).all():
            raise ValueError
        # Where an edge crosses a row's middle, inside and outside change places from there to the right.
        changes = np.zeros((height, width + 1), dtype=np.uint8)
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
            first, last = np.clip(np.ceil(np.array([min(y1, y2), max(y1, y2)]) - 0.5), 0, height).astype(int)
            rows = np.arange(first, last)
            if rows.size:
                crossings = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)
                changes[rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)] ^= 1
        mask |= np.bitwise_xor.accumulate(changes[:, :width], axis=1).astype(np.bool_)
    return mask
