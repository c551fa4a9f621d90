"""Pictures in and out: tensors in [-1, 1] to PNG grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw


def to_pil(image: torch.Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] as PIL."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    """A PIL picture as (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def as_floats(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes as [-1, 1]; anything else as it is."""
    return tensor.float() / 127.5 - 1 if tensor.dtype == torch.uint8 else tensor


def as_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as bytes."""
    return ((pictures + 1) * 127.5).round().to(torch.uint8)


def by_batch(measure: Callable[..., torch.Tensor], size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """A measure of tensors (N, …), so many at once; bytes become pictures in [-1, 1]."""
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([measure(*(as_floats(part) for part in batch)) for batch in parts])


def save_grid(
    images: torch.Tensor, path: Path, columns: int, *, gap: int = 2, scale: int = 1, headings: Sequence[str] = ()
) -> None:
    """Write pictures as one PNG, row by row; it is never seen half-written.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        path: The PNG.
        columns: Pictures a row.
        gap: Pixels between pictures.
        scale: Enlarge every picture so many times.
        headings: A word above each column.
    """
    count, _, height, width = images.shape
    height, width = height * scale, width * scale
    top = 18 if headings else 0
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, top + rows * (height + gap) - gap), "#bbbbbb")
    if headings:
        pen = ImageDraw.Draw(sheet)
        pen.rectangle((0, 0, sheet.width, top - gap), fill="white")
        for column, heading in enumerate(headings):
            pen.text((column * (width + gap) + width / 2, top / 2), heading, fill="#333333", anchor="mm")
    for i, image in enumerate(images):
        picture = to_pil(image).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, ((i % columns) * (width + gap), top + (i // columns) * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    sheet.save(partial, format="PNG")
    partial.replace(path)
