"""Label maps: the class of each pixel, in its palette's colour; black is no class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from powersteer.conditions.agreement import Agreement, Pictures
from powersteer.conditions.extractor import Extractor
from powersteer.conditions.fidelity.labels import extracted_labels, mean_iou, nearest_labels
from powersteer.conditions.kind import KINDS, Kind
from powersteer.core.pictures import by_batch


@dataclass(frozen=True)
class Segmentation(Kind):
    """Its colours are labels: a mixture of two of them means nothing."""

    resampling: Image.Resampling = Image.Resampling.NEAREST

    def fidelity(
        self,
        pictures: Pictures,
        conditions: torch.Tensor,
        *,
        palette: Mapping[str, Sequence[int]],
        extractor: Extractor | None = None,
        batch_size: int = 20,
    ) -> list[Agreement]:
        """Do pictures show the classes where they are wanted? Nothing is measured without a palette."""
        if not palette:
            return []

        def labels_of(images: torch.Tensor) -> torch.Tensor:
            if extractor is None:
                return nearest_labels((images + 1) / 2, palette)
            return extracted_labels(extractor, images, palette)

        wanted = nearest_labels(conditions, palette)
        found = {name: by_batch(labels_of, batch_size, images) for name, images in pictures.items()}
        protocol: dict[str, Any] = {"labels": "nearest colour of the palette", "classes": len(palette)}
        if extractor is not None:
            protocol |= {"labels": "the extractor's", "extractor": dict(extractor.record())}
        return [self.agreement(wanted, found, protocol)]

    def agreement(self, wanted: torch.Tensor, found: Pictures, protocol: Mapping[str, Any]) -> Agreement:
        """The figure of the labels (N, H, W) that are wanted, and those found in the pictures of each column."""
        classes = protocol["classes"]
        return Agreement("mIoU", "higher", {name: mean_iou(wanted, x, classes) for name, x in found.items()}, protocol)


KINDS.add(Segmentation("segmentation"))
