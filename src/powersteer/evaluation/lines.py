"""Line fidelity: does the picture have its dark lines where the drawing has ink?"""

from __future__ import annotations

import torch
import torch.nn.functional as F

INK = 0.5
"""A pixel of the drawing is ink from this value on."""
DARK = 0.4
"""A pixel of the picture is dark below this luminance."""


def line_f1(drawings: torch.Tensor, pictures: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """F1 (N,) between the drawings' ink and the pictures' dark lines, with a tolerance in pixels.

    Dark lines are dark pixels that a dark stroke explains: the inside of a dark area, two or more pixels from its
    rim, is fill and not counted. Precision is the share of dark line pixels within ``tolerance`` of ink, recall
    the share of ink within ``tolerance`` of a dark pixel.

    Args:
        drawings: (N, 1, H, W) in [0, 1], ink 1 on 0.
        pictures: (N, 3, H, W) in [-1, 1].
        tolerance: Pixels, in the maximum norm.
    """
    ink = (drawings > INK).float()
    dark = (luminance(pictures) < DARK).float()
    fill = 1 - _grow(1 - dark, 2)
    lines = dark - fill
    near_ink, near_dark = _grow(ink, tolerance), _grow(dark, tolerance)
    precision = (lines * near_ink).sum((1, 2, 3)) / lines.sum((1, 2, 3)).clamp_min(1)
    recall = (ink * near_dark).sum((1, 2, 3)) / ink.sum((1, 2, 3)).clamp_min(1)
    return 2 * precision * recall / (precision + recall).clamp_min(1e-8)


def luminance(pictures: torch.Tensor) -> torch.Tensor:
    """Luma (N, 1, H, W) in [0, 1] of pictures (N, 3, H, W) in [-1, 1] (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).to(pictures)[None, :, None, None]
    return ((pictures + 1) / 2 * weights).sum(1, keepdim=True)


def _grow(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return F.max_pool2d(mask, 2 * pixels + 1, 1, pixels)
