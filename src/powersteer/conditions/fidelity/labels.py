"""Label maps in pictures: the class of each pixel, and the box of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from powersteer.conditions.agreement import extract
from powersteer.conditions.extractor import Extractor
from powersteer.conditions.palettes import NO_LABEL, Palette
from powersteer.core.errors import PowersteerError
from powersteer.core.pictures import to_pil

TRIM = 0.01
"""Share of a class's pixels that may lie outside its box on each side: a stray pixel moves no box."""


def extracted_labels(
    extractor: Extractor, pictures: torch.Tensor, palette: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """Labels (N, H, W) that an extractor of label maps finds in pictures (N, 3, H, W) in [-1, 1].

    Its classes and the palette's go together by name; what it alone knows is `NO_LABEL`.

    Raises:
        PowersteerError: It shares no class with the palette.
    """
    own: Mapping[str, Sequence[int]] = extractor.record().get("palette") or {}
    order = list(palette)
    places = torch.tensor([order.index(name) if name in palette else NO_LABEL for name in own] + [NO_LABEL])
    if not set(own) & set(palette):
        raise PowersteerError("the extractor's classes have none of the palette's names: give another one")
    return places[nearest_labels(extract(extractor, pictures), own)]  # label -1 is the last


def nearest_labels(pictures: torch.Tensor, palette: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """Labels (N, H, W) of pictures (N, 3, H, W) in [0, 1]; see `Palette.labels_of`."""
    colours = Palette.of_table(palette)
    return torch.from_numpy(np.stack([colours.labels_of(to_pil(2 * picture - 1)) for picture in pictures]))


def mean_iou(wanted: torch.Tensor, found: torch.Tensor, classes: int) -> float:
    """Intersection over union of label maps (N, H, W), over all pixels, averaged over the classes that are wanted.

    Pixels for which nothing is wanted (`NO_LABEL`) are not counted.
    """
    counted = wanted >= 0
    wanted, found = wanted[counted], torch.where(found < 0, classes, found)[counted]
    confusion = torch.bincount(wanted * (classes + 1) + found, minlength=classes * (classes + 1))
    confusion = confusion.view(classes, classes + 1).double()  # the last column: no class at all
    shared = confusion.diagonal()
    union = confusion.sum(1) + confusion[:, :classes].sum(0) - shared
    present = confusion.sum(1) > 0
    return (shared[present] / union[present]).mean().item() if present.any() else 0.0


def class_boxes(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """The box of each class's pixels (N, K, 4) in label maps (N, H, W): left, top, right, bottom; NaN without a pixel.

    It leaves out `TRIM` of them on each side.
    """
    masks = labels[:, None] == torch.arange(classes)[:, None, None]  # (N, K, H, W)
    sides: list[torch.Tensor] = []
    for axis in (2, 3):  # pixels of each column, then of each row
        counts = masks.sum(axis).double()
        share = counts.cumsum(-1) / counts.sum(-1, keepdim=True)  # NaN without a pixel
        first = (share <= TRIM).sum(-1).double()
        last = counts.shape[-1] - (share >= 1 - TRIM).sum(-1).double() + 1
        sides += [torch.where(share[..., -1].isnan(), torch.nan, side) for side in (first, last)]
    left, right, top, bottom = sides
    return torch.stack([left, top, right, bottom], -1)


def box_iou(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (…, 4), one by one; 0 where none is found, NaN where none is wanted."""
    low, high = torch.maximum(wanted[..., :2], found[..., :2]), torch.minimum(wanted[..., 2:], found[..., 2:])
    shared = (high - low).clamp_min(0).prod(-1)

    def area(boxes: torch.Tensor) -> torch.Tensor:
        return (boxes[..., 2:] - boxes[..., :2]).prod(-1)

    iou = (shared / (area(wanted) + area(found) - shared)).nan_to_num(0)
    return torch.where(wanted[..., 0].isnan(), torch.nan, iou)
