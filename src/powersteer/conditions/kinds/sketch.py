"""Sketches: line art, ink 1 on 0, of one channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps

from powersteer.conditions.agreement import Agreement, Pictures, extract
from powersteer.conditions.extractor import Extractor
from powersteer.conditions.fidelity.lines import TOLERANCE, dark_lines, ink_scores, line_scores
from powersteer.conditions.kind import INK, KINDS, Fit, Kind
from powersteer.conditions.layers import is_ink_alone, on_paper, paper_of
from powersteer.conditions.sketch import sketch_condition
from powersteer.core.pictures import by_batch
from powersteer.core.ssim import SSIM_WINDOW, ssim


@dataclass(frozen=True)
class Sketch(Kind):
    """Ink on paper. One channel may come in either polarity, and without paper; several are a plain picture."""

    def as_condition(self, picture: Image.Image, channels: int, where: str) -> Image.Image:
        """Ink without paper is ink, whatever its colour; see `Kind.as_condition`."""
        if channels == 1 and picture.has_transparency_data and is_ink_alone(picture) and paper_of(picture) == "white":
            return ImageOps.invert(on_paper(picture, "white").convert("L"))
        return super().as_condition(picture, channels, where)

    def from_user(self, picture: Image.Image, channels: int, where: str) -> tuple[Image.Image, bool]:
        """Most of a drawing is paper: what is mostly bright is inverted."""
        if channels != 1:
            return super().from_user(picture, channels, where)
        return sketch_condition(picture, (picture.height, picture.width), where)

    def fit(self, channels: int) -> Fit:
        """A drawing stays whole, on more of its paper."""
        return "pad" if channels == 1 else super().fit(channels)

    def fidelity(
        self,
        pictures: Pictures,
        conditions: torch.Tensor,
        *,
        palette: Mapping[str, Sequence[int]],
        extractor: Extractor | None = None,
        batch_size: int = 20,
    ) -> list[Agreement]:
        """Do pictures have their dark lines, or what an extractor draws of them, where the sketch has ink?"""

        def scores(images: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
            if extractor is None:
                lines, agreement = dark_lines(images), line_scores(drawings, images)
            else:
                lines = extract(extractor, images)
                agreement = ink_scores(drawings, lines)
            columns = (agreement.f1, agreement.precision, agreement.recall, ssim(lines, drawings))
            return torch.stack(columns, 1).double()  # (N, 4)

        table = {name: by_batch(scores, batch_size, images, conditions) for name, images in pictures.items()}
        edges: dict[str, Any] = {"edges": "dark lines"}
        if extractor is not None:
            edges = {"edges": "ink of the extractor's drawing", "extractor": dict(extractor.record())}
        within = edges | {"tolerance_pixels": TOLERANCE}
        names = {"edge F1": within, "edge precision": within, "edge recall": within, "edge SSIM": edges | SSIM_WINDOW}
        return [
            Agreement(name, "higher", {column: of_one[:, i] for column, of_one in table.items()}, protocol)
            for i, (name, protocol) in enumerate(names.items())
        ]


KINDS.add(Sketch("sketch", polarity=INK, line_art=True))
