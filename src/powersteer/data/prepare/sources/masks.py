"""COCO's segmentations → masks, by COCO's own tools: polygons, and run lengths plain or packed into text.

The tools are C and trust what they read: a damaged text or a polygon of endless length would end the process, and runs
that stop early leave pixels undefined. What they are given is checked here first.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from powersteer.core.errors import PowersteerError

FARTHEST = 1e6
"""Pixels of a polygon's corner from the origin."""
LONGEST = 1e6
"""Pixels along all outlines of one segmentation."""
_PACKED_RUNS = re.compile("(?:[P-o]{0,5}[0-O])+")
"""Five bits a character from ``0`` up; the sixth bit says that the number goes on."""


def coco_tools() -> Any:
    """The module ``pycocotools.mask``.

    Raises:
        PowersteerError: It is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise PowersteerError("COCO's masks need pycocotools: pip install 'powersteer[coco]'") from None
    return mask


def to_mask(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The pixels (H, W) of a segmentation.

    Args:
        segmentation: Polygons ``[[x, y, x, y, …], …]``, or ``{"counts": …, "size": [height, width]}``.
        size: Of the picture (width, height).

    Raises:
        PowersteerError: It is neither, or of a picture of another size; or pycocotools is missing.
    """
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [size[1], size[0]]:
                raise PowersteerError(f"a mask of (height, width) {segmentation['size']} on a picture of {size[::-1]}")
            return _runs(segmentation["counts"], size)
        return _polygons(segmentation, size)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, PowersteerError):
            raise
        raise PowersteerError("a segmentation is neither polygons nor run lengths as COCO has them") from None


def _runs(counts: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Background and mask by turns, down the columns."""
    tools, (width, height) = coco_tools(), size
    if isinstance(counts, list):
        if min(counts) < 0:
            raise ValueError("a run of fewer than no pixels")
        if sum(counts) != width * height:
            raise PowersteerError(f"a mask's runs cover {sum(counts)} pixels of {width * height}")
        counts = tools.frPyObjects({"counts": counts, "size": [height, width]}, height, width)["counts"].decode()
    if not _PACKED_RUNS.fullmatch(counts):
        raise ValueError("not packed runs")
    mask = tools.decode({"counts": counts, "size": [height, width]})
    try:
        tools.decode({"counts": counts, "size": [1, width * height - 1]})
    except ValueError:  # more than one pixel fewer: the runs reach the last pixel
        return mask.astype(np.bool_)
    raise PowersteerError(f"a mask's runs end before the last of {width * height} pixels")


def _polygons(polygons: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The pixels in any of the polygons."""
    tools, (width, height) = coco_tools(), size
    outlines = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    areas = [outline for outline in outlines if len(outline) > 2]
    if not all((np.abs(outline) <= FARTHEST).all() for outline in outlines):
        raise ValueError("a corner out of reach")
    if sum(np.abs(np.diff(outline, axis=0, append=outline[:1])).sum() for outline in areas) > LONGEST:
        raise ValueError("an outline without end")
    if not areas:
        return np.zeros((height, width), dtype=np.bool_)
    runs = tools.frPyObjects([outline.ravel().tolist() for outline in areas], height, width)
    return tools.decode(tools.merge(runs)).astype(np.bool_)
