"""Styles: where which colour is (RGB), and structure (alpha)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from powersteer.conditions.agreement import Agreement, Pictures
from powersteer.conditions.extractor import Extractor
from powersteer.conditions.fidelity.colours import palette_distance
from powersteer.conditions.kind import KINDS, Kind
from powersteer.core.pictures import by_batch


@dataclass(frozen=True)
class Style(Kind):
    """Colour and structure."""

    def fidelity(
        self,
        pictures: Pictures,
        conditions: torch.Tensor,
        *,
        palette: Mapping[str, Sequence[int]],
        extractor: Extractor | None = None,
        batch_size: int = 20,
    ) -> list[Agreement]:
        """Do pictures have the condition's colours, wherever they lie?"""

        def distance(images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return palette_distance((images + 1) / 2, wanted[:, :3])

        protocol = {"of": "the condition's colours and the picture's", "distance": "sliced Wasserstein-1 in CIELAB"}
        values = {name: by_batch(distance, batch_size, images, conditions) for name, images in pictures.items()}
        return [Agreement("palette distance, ΔE", "lower", values, protocol)]


KINDS.add(Style("style"))
