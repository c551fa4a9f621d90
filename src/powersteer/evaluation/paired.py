"""Picture against picture: PSNR, LPIPS; and how far pictures of one condition spread."""

from __future__ import annotations

from typing import Any

import torch

from powersteer.core.errors import PowersteerError


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (N,) in dB of pictures (N, C, H, W) in [0, 1]; infinite for equal ones."""
    return -10 * (pictures.double() - references.double()).square().mean((1, 2, 3)).log10()


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
