"""Line fidelity: does the picture have its dark lines where the drawing has ink?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

INK = 0.5
"""A pixel of the drawing is ink from this value on."""
DARK = 0.4
"""A pixel of the picture is dark below this luminance."""
TOLERANCE = 1
"""Pixels."""


@dataclass(frozen=True)
class EdgeScores:
    """How well edges agree, of each picture (N,)."""

    precision: torch.Tensor
    recall: torch.Tensor

    @property
    def f1(self) -> torch.Tensor:
        """Harmonic mean of both."""
        return 2 * self.precision * self.recall / (self.precision + self.recall).clamp_min(1e-8)


def edge_scores(
    wanted: torch.Tensor, found: torch.Tensor, tolerance: int = TOLERANCE, *, present: torch.Tensor | None = None
) -> EdgeScores:
    """Precision and recall of edges, with a tolerance in pixels.

    Precision is the share of found edge pixels within ``tolerance`` of a wanted one, recall the share of wanted ones
    within ``tolerance`` of what is present.

    Args:
        wanted: The condition's edges (N, 1, H, W), 1 on 0.
        found: The picture's, likewise.
        tolerance: Pixels, in the maximum norm.
        present: What can answer for a wanted edge, where that is more than ``found``.
    """
    near_wanted, near_present = _grow(wanted, tolerance), _grow(found if present is None else present, tolerance)
    return EdgeScores(
        precision=(found * near_wanted).sum((1, 2, 3)) / found.sum((1, 2, 3)).clamp_min(1),
        recall=(wanted * near_present).sum((1, 2, 3)) / wanted.sum((1, 2, 3)).clamp_min(1),
    )


def line_scores(drawings: torch.Tensor, pictures: torch.Tensor, tolerance: int = TOLERANCE) -> EdgeScores:
    """Between the drawings' ink and the pictures' dark lines; all that is dark can answer for ink.

    Args:
        drawings: (N, 1, H, W) in [0, 1], ink 1 on 0.
        pictures: (N, 3, H, W) in [-1, 1].
        tolerance: Pixels, in the maximum norm.
    """
    return edge_scores((drawings > INK).float(), dark_lines(pictures), tolerance, present=_dark(pictures))


def ink_scores(drawings: torch.Tensor, found: torch.Tensor, tolerance: int = TOLERANCE) -> EdgeScores:
    """Between the ink of drawings (N, 1, H, W) in [0, 1] and that of others, which an extractor made of pictures."""
    return edge_scores((drawings > INK).float(), (found > INK).float(), tolerance)


def line_f1(drawings: torch.Tensor, pictures: torch.Tensor, tolerance: int = TOLERANCE) -> torch.Tensor:
    """F1 (N,) of `line_scores`."""
    return line_scores(drawings, pictures, tolerance).f1


def dark_lines(pictures: torch.Tensor) -> torch.Tensor:
    """Dark lines (N, 1, H, W), 1 on 0, of pictures (N, 3, H, W) in [-1, 1].

    They are dark pixels that a dark stroke explains: the inside of a dark area, two or more pixels from its rim, is
    fill and not counted.
    """
    dark = _dark(pictures)
    return dark - (1 - _grow(1 - dark, 2))


def luminance(pictures: torch.Tensor) -> torch.Tensor:
    """Luma (N, 1, H, W) in [0, 1] of pictures (N, 3, H, W) in [-1, 1] (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).to(pictures)[None, :, None, None]
    return ((pictures + 1) / 2 * weights).sum(1, keepdim=True)


def _dark(pictures: torch.Tensor) -> torch.Tensor:
    return (luminance(pictures) < DARK).float()


def _grow(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return F.max_pool2d(mask, 2 * pixels + 1, 1, pixels)
