"""How well pictures keep to their conditions: what a kind's measure is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from powersteer.conditions.extractor import Extractor, Subject
from powersteer.core.pictures import to_pil

Pictures = Mapping[str, torch.Tensor]
"""By column, such as ``steered``: (N, 3, H, W), uint8, a quarter of the memory of floats."""


@dataclass(frozen=True)
class Agreement:
    """One measure of pictures and their conditions."""

    name: str
    better: Literal["higher", "lower"]
    values: Mapping[str, torch.Tensor | float]
    """By column: one number for each picture (N,), or one for all of them."""
    protocol: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How it was measured."""


def extract(extractor: Extractor, pictures: torch.Tensor) -> torch.Tensor:
    """Conditions (N, C, H, W) in [0, 1] of pictures (N, 3, H, W) in [-1, 1], as the extractor sees them."""
    made = [np.array(extractor(Subject(to_pil(picture)))) for picture in pictures]
    conditions = torch.from_numpy(np.stack(made)).float() / 255
    return conditions[:, None] if conditions.ndim == 3 else conditions.permute(0, 3, 1, 2)
