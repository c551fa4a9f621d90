"""Pairs as tensors: one joint transform for picture and condition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from powersteer.conditions.kinds import LABEL_MAPS
from powersteer.conditions.tensors import PIL_MODES
from powersteer.data.layouts import Columns, read_rows
from powersteer.errors import PowersteerError

ASPECT_TOLERANCE = 0.01
"""How far the aspect ratios of a picture and its condition may lie apart: a pixel in a hundred."""


class Pairs:
    """The pairs of a folder, in any layout of `powersteer.data.layouts`, decoded when asked for.

    ``pairs[i]`` is the picture (3, H, W), float in [-1, 1], and its condition (C, H, W), uint8, where 255 stands
    for 1. Both are scaled to cover the size and cropped around the centre, alike; label maps without interpolation.

    Args:
        folder: Where they lie.
        size: Pixels (height, width).
        conditioning_channels: 1 (grey) or 3 (RGB).
        limit: Take only so many pairs, spread evenly over the folder.
        kind: Of the condition; see `powersteer.conditions.kinds`.
        columns: What the layout calls its columns.
        default_prompt: Caption of pairs that have none.

    Raises:
        PowersteerError: The folder or a row is malformed, a picture is missing, or a pair has no caption; names row,
            file and column. On access: a picture cannot be read, or condition and picture differ in aspect ratio.
    """

    def __init__(
        self,
        folder: Path,
        size: tuple[int, int],
        conditioning_channels: int = 1,
        limit: int | None = None,
        *,
        kind: str = "sketch",
        columns: Columns | None = None,
        default_prompt: str | None = None,
    ) -> None:
        self.folder, self.size, self.channels = folder, size, conditioning_channels
        self.resampling = Image.Resampling.NEAREST if kind in LABEL_MAPS else Image.Resampling.LANCZOS
        rows = read_rows(folder, columns)
        if limit is not None:
            if limit > len(rows):
                raise PowersteerError(f"{folder} holds {len(rows)} pairs, {limit} were asked for")
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        self.rows = rows
        self.texts: list[str] = []
        for row in rows:
            text = row.text if row.text is not None else default_prompt
            if text is None:
                raise PowersteerError(f"{row.where} has no caption: write one, or give default_prompt='…' for all")
            self.texts.append(text)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[index]
        picture = row.image.open("RGB")
        condition = row.conditioning_image.open(PIL_MODES[self.channels])
        if not same_aspect(picture.size, condition.size):
            raise PowersteerError(
                f"{row.where}: {row.conditioning_image} is {condition.width}×{condition.height} pixels, its picture "
                f"{picture.width}×{picture.height}: they must have one aspect ratio, or the steering learns a shift"
            )
        image = self._fit(picture, Image.Resampling.LANCZOS).float() / 127.5 - 1
        return image, self._fit(condition, self.resampling)

    def _fit(self, picture: Image.Image, resampling: Image.Resampling) -> torch.Tensor:
        height, width = self.size
        pixels = np.array(ImageOps.fit(picture, (width, height), resampling))
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have one aspect ratio, to `ASPECT_TOLERANCE` or a pixel."""
    width = one[0] * other[1] / one[1]
    return abs(width - other[0]) <= max(1, ASPECT_TOLERANCE * other[0])
