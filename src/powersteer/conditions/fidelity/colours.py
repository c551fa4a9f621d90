"""Colours of a picture against those of a condition, wherever they lie."""

from __future__ import annotations

import torch

DIRECTIONS = 64
"""Lines through CIELAB on which colours are compared."""


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
