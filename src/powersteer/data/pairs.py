"""Pairs as tensors: one joint transform for picture and condition."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from powersteer.conditions.arrays import resized
from powersteer.conditions.kind import KINDS
from powersteer.core.errors import PowersteerError
from powersteer.data.contents import Contents
from powersteer.data.layouts import Columns, read_rows
from powersteer.data.rows import Row

ASPECT_TOLERANCE = 0.01
"""How far the aspect ratios of a picture and its condition may lie apart: a pixel in a hundred."""
WIDEST = 2.0
"""Aspect ratio of the widest bucket."""

Size = tuple[int, int]
"""Pixels or latents: (height, width)."""


@dataclass(frozen=True)
class Views:
    """The versions of each pair that are trained on: the plain one first."""

    random_flip: bool = False
    """Whether each version comes mirrored too."""
    crops: int = 0
    """How many versions are cut out at random, beside the plain one."""
    smallest_crop: float = 0.8
    """The smallest side of a cut-out, as a share of the picture's."""

    def __len__(self) -> int:
        return (1 + self.crops) * (1 + self.random_flip)

    def of(self, index: int, view: int) -> tuple[float, float, float, bool]:
        """Share of the side, shares of the slack left of and above it, mirrored or not."""
        crop, mirrored = divmod(view, 1 + self.random_flip)
        chance = random.Random(1_000_003 * index + crop)
        if crop == 0:
            return 1.0, 0.5, 0.5, bool(mirrored)
        return chance.uniform(self.smallest_crop, 1), chance.random(), chance.random(), bool(mirrored)


class Transform:
    """A row → tensors. Picture and condition are scaled to cover the size, cropped and mirrored alike.

    Args:
        conditioning_channels: 1 (grey), 3 (RGB), 4 (RGBA: colour and structure), or a feature map's.
        kind: Of the condition; label maps are scaled without interpolation, feature maps only mirrored.
        vae_scale_factor: Pixels a side of one latent, which is one of a feature map.
    """

    def __init__(self, conditioning_channels: int = 1, kind: str = "sketch", vae_scale_factor: int = 8) -> None:
        self.channels, self.vae_scale_factor = conditioning_channels, vae_scale_factor
        # All of these are part of the cache's keys: see `powersteer.data.encode`.
        self.mode = KINDS.find(kind).mode(conditioning_channels)
        """None for feature maps."""
        self.kind = kind
        self.resampling = KINDS.find(kind).resampling

    def __call__(
        self, row: Row, size: Size, view: tuple[float, float, float, bool] = (1.0, 0.5, 0.5, False)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The picture (3, H, W), float in [-1, 1], and its condition (C, H, W), uint8, where 255 stands for 1.

        Features (C, h, w) are float16 or float32, as they are in their file.

        Raises:
            PowersteerError: A picture cannot be read, or condition and picture differ in aspect ratio.
        """
        picture = row.image.picture()
        if self.mode is None:
            features = self._features(row, picture.size, size)
            image = _cut(picture, size, view, Image.Resampling.LANCZOS).float() / 127.5 - 1
            mirrored = view[3]
            return image, torch.from_numpy(features[..., ::-1].copy() if mirrored else features)
        condition = row.conditioning_image.condition(self.channels, self.kind)
        if not same_aspect(picture.size, condition.size):
            raise PowersteerError(
                f"{row.where}: {row.conditioning_image} is {condition.width}×{condition.height} pixels, its picture "
                f"{picture.width}×{picture.height}: they must have one aspect ratio, or the steering learns a shift"
            )
        image = _cut(picture, size, view, Image.Resampling.LANCZOS).float() / 127.5 - 1
        return image, _cut(condition, size, view, self.resampling)

    def condition_bytes(self, size: Size) -> int:
        """About how many bytes a cached condition takes: pictures compress well, features do not."""
        pixels = size[0] * size[1]
        return pixels // 4 if self.mode else 4 * self.channels * pixels // self.vae_scale_factor**2

    def _features(self, row: Row, picture: tuple[int, int], size: Size) -> npt.NDArray[np.floating[Any]]:
        features = row.conditioning_image.features()
        height, width = size
        wanted = (self.channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if features.shape != wanted:
            raise PowersteerError(
                f"{row.where}: {row.conditioning_image} has shape {features.shape}, not {wanted}: (channels, height, "
                f"width) of the latents of a {width}×{height} picture"
            )
        if not same_aspect(picture, (width, height)):
            raise PowersteerError(
                f"{row.where}: {row.image} is {picture[0]}×{picture[1]} pixels and would be cropped to the shape of "
                f"{width}×{height}, but its feature map cannot be: crop it first, or give another resolution"
            )
        return features


class Pairs:
    """The pairs of a folder, in any layout of `powersteer.data.layouts`, decoded when asked for.

    Args:
        folder: Where they lie; or the rows themselves.
        size: Pixels (height, width); the area and shape of the middle bucket when there are ``buckets``.
        conditioning_channels: See `Transform`.
        limit: Take only so many pairs, spread evenly over the folder.
        kind: Of the condition; see `powersteer.conditions.kinds`.
        columns: What the layout calls its columns.
        default_prompt: Caption of pairs that have none.
        buckets: Sizes to choose from, the nearest in aspect ratio for each picture; else all have ``size``.
        views: The versions of each pair.
        contents: Where the pictures' sizes are remembered.
        vae_scale_factor: See `Transform`.

    Raises:
        PowersteerError: The folder or a row is malformed, a picture is missing, or a pair has no caption; names row,
            file and column.
    """

    def __init__(  # the keys of a configuration that concern pairs
        self,
        folder: Path | Sequence[Row],
        size: Size,
        conditioning_channels: int = 1,
        limit: int | None = None,
        *,
        kind: str = "sketch",
        columns: Columns | None = None,
        default_prompt: str | None = None,
        buckets: Sequence[Size] | None = None,
        views: Views | None = None,
        contents: Contents | None = None,
        vae_scale_factor: int = 8,
    ) -> None:
        self.folder = folder if isinstance(folder, Path) else None
        self.transform = Transform(conditioning_channels, kind, vae_scale_factor)
        self.views = views or Views()
        rows = read_rows(folder, columns) if isinstance(folder, Path) else list(folder)
        if limit is not None:
            if limit > len(rows):
                raise PowersteerError(f"{folder} holds {len(rows)} pairs, {limit} were asked for")
            rows = [rows[i] for i in spread(len(rows), limit)]
        self.rows = [captioned(row, default_prompt) for row in rows]
        self.sizes = [size] * len(rows)
        """The size of each pair, (height, width)."""
        if buckets is not None:
            self.contents = contents or Contents()
            self.sizes = [nearest(buckets, *self.contents.size(row.image)) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain view; see `Transform`."""
        return self.view(index, 0)

    def view(self, index: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One version of a pair; see `Transform`."""
        return self.transform(self.rows[index], self.sizes[index], self.views.of(index, view))

    @property
    def texts(self) -> list[str]:
        """The first caption of each pair."""
        return [row.texts[0] for row in self.rows]

    def subset(self, indices: Iterable[int], *, plain: bool = False) -> Pairs:
        """Some of the pairs, with all views or (``plain``) the plain one only."""
        chosen = list(indices)
        part = object.__new__(Pairs)
        part.__dict__.update(self.__dict__)
        part.rows, part.sizes = [self.rows[i] for i in chosen], [self.sizes[i] for i in chosen]
        part.views = Views() if plain else self.views
        return part


def captioned(row: Row, default_prompt: str | None) -> Row:
    """The row with a caption.

    Raises:
        PowersteerError: It has none, and there is no default.
    """
    if row.texts:
        return row
    if default_prompt is None:
        why = f" ({row.no_text})" if row.no_text else ""
        raise PowersteerError(f"{row.where} has no caption{why}: write one, or give default_prompt='…' for all")
    return Row(row.where, row.image, row.conditioning_image, (default_prompt,), row.generated_text)


def bucket_sizes(size: Size, step: int) -> list[Size]:
    """Sizes of at most the area of ``size``, both sides multiples of ``step``, from 1:2 to 2:1."""
    area = size[0] * size[1]
    sizes: set[Size] = {size}
    for width in range(step, int(math.sqrt(area * WIDEST)) + 1, step):
        height = area // width // step * step
        if height and 1 / WIDEST <= width / height <= WIDEST:
            sizes.add((height, width))
    return sorted(sizes)


def nearest(buckets: Sequence[Size], width: int, height: int) -> Size:
    """The bucket nearest in aspect ratio, the largest of equals."""
    return min(buckets, key=lambda size: (abs(math.log(size[1] * height / (size[0] * width))), -size[0] * size[1]))


def spread(count: int, limit: int) -> list[int]:
    """``limit`` positions among ``count``, evenly spread; all of them when they are fewer."""
    limit = min(count, limit)
    return [i * count // limit for i in range(limit)]


def same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have one aspect ratio, to `ASPECT_TOLERANCE` or a pixel."""
    width = one[0] * other[1] / one[1]
    return abs(width - other[0]) <= max(1, ASPECT_TOLERANCE * other[0])


def condition_values(conditions: torch.Tensor) -> torch.Tensor:
    """Conditions as a network reads them, float: pictures (uint8) in [0, 1], features as they are."""
    return conditions.float() / 255 if conditions.dtype == torch.uint8 else conditions.float()


def cropped(picture: Image.Image, size: Size) -> torch.Tensor:
    """A picture as the plain view has it: scaled to cover the size and cropped about its middle, (3, H, W) in [-1, 1].

    Args:
        picture: RGB.
        size: Pixels (height, width).
    """
    return _cut(picture, size, Views().of(0, 0), Image.Resampling.LANCZOS).float() / 127.5 - 1


def _cut(
    picture: Image.Image, size: Size, view: tuple[float, float, float, bool], resampling: Image.Resampling
) -> torch.Tensor:
    height, width = size
    share, left, top, mirrored = view
    zoom = share * min(picture.width / width, picture.height / height)
    box_width, box_height = width * zoom, height * zoom
    x, y = left * (picture.width - box_width), top * (picture.height - box_height)
    pixels = np.array(resized(picture, (width, height), resampling, (x, y, x + box_width, y + box_height)))
    if mirrored:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)))
