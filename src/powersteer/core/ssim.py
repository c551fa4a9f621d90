"""Structural similarity of pictures, or of any maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from powersteer.core.errors import PowersteerError

WINDOW, SIGMA = 11, 1.5
"""Width and standard deviation of SSIM's Gaussian window, in pixels."""
K1, K2 = 0.01, 0.03
SSIM_WINDOW: dict[str, Any] = {"window": "Gaussian, 11 pixels, sigma 1.5"}
"""What is said of it beside a figure."""


def ssim(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (N,) of pictures (N, C, H, W) in [0, 1] (Wang et al., IEEE Trans. Image Process. 2004).

    A Gaussian window of 11 pixels, σ 1.5, wherever it lies within the picture; the mean over places and channels.

    Raises:
        PowersteerError: A picture is smaller than the window.
    """
    count, channels, height, width = pictures.shape
    if min(height, width) < WINDOW:
        raise PowersteerError(
            f"SSIM looks through {WINDOW}×{WINDOW} pixels: a picture of {width}×{height} is too small"
        )
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    window = (weights[:, None] * weights)[None, None]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.reshape(count * channels, 1, height, width), window)

    x, y = pictures.double().cpu(), references.double().cpu()
    mean_x, mean_y = mean(x), mean(y)  # (N·C, 1, H-10, W-10)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.reshape(count, -1).mean(1)
