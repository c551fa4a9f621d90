"""Picture against picture: PSNR, SSIM, LPIPS; and how far pictures of one condition spread."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from powersteer.core.errors import PowersteerError

WINDOW, SIGMA = 11, 1.5
"""Width and standard deviation of SSIM's Gaussian window, in pixels."""
K1, K2 = 0.01, 0.03


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (N,) in dB of pictures (N, C, H, W) in [0, 1]; infinite for equal ones."""
    return -10 * (pictures.double() - references.double()).square().mean((1, 2, 3)).log10()


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


def lpips(pictures: torch.Tensor, references: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """Learned perceptual distance (N,) of pictures (N, 3, H, W) in [0, 1] (Zhang et al., CVPR 2018), on VGG-16.

    Raises:
        PowersteerError: torch-fidelity, which has the network, is not installed, or its weights cannot be had.
    """
    try:
        from torch_fidelity import SampleSimilarityLPIPS  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PowersteerError("LPIPS needs torch-fidelity: pip install 'powersteer[fid]'") from None
    try:
        network: Any = SampleSimilarityLPIPS("lpips-vgg16")
    except OSError as error:
        raise PowersteerError(f"the weights of LPIPS are not here and cannot be fetched: {error}") from None
    pixels = [(images * 255).round().to(torch.uint8) for images in (pictures, references)]
    with torch.no_grad():
        parts = [network(a, b).flatten() for a, b in zip(*(p.split(batch_size) for p in pixels), strict=True)]
    return torch.cat(parts).double()


def spread_map(pictures: torch.Tensor) -> torch.Tensor:
    """Standard deviation (H, W) over pictures (S, 3, H, W) of one condition, root mean square over the channels.

    In the units of the pictures. Dark where the condition decides, bright where it leaves freedom.
    """
    return pictures.double().var(0).mean(0).sqrt()
