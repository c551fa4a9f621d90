"""Pictures in and out: tensors in [-1, 1] to PNG grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def to_pil(image: torch.Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] as PIL."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    """A PIL picture as (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def save_grid(images: torch.Tensor, path: Path, columns: int, gap: int = 2) -> None:
    """Write pictures (N, 3, H, W) in [-1, 1] as one PNG, row by row."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "#bbbbbb")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
