"""Does a picture keep to its condition? Labels by classes, layouts by boxes, styles by colours; drawings: `lines`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from powersteer.conditions.extractors.extractor import Extractor, Subject
from powersteer.conditions.palettes import NO_LABEL, Palette
from powersteer.core.errors import PowersteerError
from powersteer.core.pictures import to_pil

TRIM = 0.01
"""Share of a class's pixels that may lie outside its box on each side: a stray pixel moves no box."""
DIRECTIONS = 64


def extract(extractor: Extractor, pictures: torch.Tensor) -> torch.Tensor:
    """Conditions (N, C, H, W) in [0, 1] of pictures (N, 3, H, W) in [-1, 1], as the extractor sees them."""
    made = [np.array(extractor(Subject(to_pil(picture)))) for picture in pictures]
    conditions = torch.from_numpy(np.stack(made)).float() / 255
    return conditions[:, None] if conditions.ndim == 3 else conditions.permute(0, 3, 1, 2)


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


def palette_distance(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """How far the colours of a picture are from another's, wherever they lie, (N,), in units of CIELAB (ΔE).

    Twice the sliced Wasserstein-1 distance of the pixels: all colours moved alike by ΔE are ΔE away.

    Args:
        pictures: (N, 3, H, W) in [0, 1], sRGB.
        references: Of the same shape.
    """
    golden = torch.arange(DIRECTIONS, dtype=torch.float64)
    height = 1 - (2 * golden + 1) / DIRECTIONS  # Fibonacci's sphere
    angle = golden * torch.pi * (3 - 5**0.5)
    ring = (1 - height**2).sqrt()
    directions = torch.stack([ring * angle.cos(), ring * angle.sin(), height], 1)  # (D, 3)
    one, other = ((directions @ lab(images).flatten(2)).sort(-1).values for images in (pictures, references))
    return 2 * (one - other).abs().mean((1, 2))


def lab(pictures: torch.Tensor) -> torch.Tensor:
    """CIELAB (N, 3, H, W), white D65, of sRGB pictures (N, 3, H, W) in [0, 1] (IEC 61966-2-1, CIE 15)."""
    pixels = pictures.double()
    linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=torch.float64,
    )
    relative = torch.einsum("ij,njhw->nihw", to_xyz / to_xyz.sum(1, keepdim=True), linear)
    root = torch.where(relative > (6 / 29) ** 3, relative ** (1 / 3), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
