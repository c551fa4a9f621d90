"""Folders of (image, condition, caption) pairs: HF ImageFolder with ``metadata.jsonl``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from powersteer.conditions.tensors import PIL_MODES
from powersteer.errors import PowersteerError

IMAGE_COLUMN = "file_name"
CONDITIONING_COLUMN = "conditioning_image_file_name"
CAPTION_COLUMN = "text"


@dataclass(frozen=True)
class Pair:
    """One row: where its pictures lie, and its caption."""

    image: Path
    conditioning_image: Path
    text: str


class PairFolder:
    """The pairs of one folder, read when asked for.

    Args:
        folder: Holds ``metadata.jsonl``, a JSON object a line, with ``file_name``,
            ``conditioning_image_file_name`` (both relative to the folder) and ``text``.
        size: Pixels (height, width) that every picture must have.
        conditioning_channels: 1 (grey) or 3 (RGB).
        limit: Take only so many pairs, spread evenly over the folder.

    Raises:
        PowersteerError: The folder or a row is malformed, or a picture is missing; names row, file and column.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], conditioning_channels: int = 1, limit: int | None = None
    ) -> None:
        self.folder, self.size, self.channels = folder, size, conditioning_channels
        self.pairs = self._read()
        if limit is not None:
            if limit > len(self.pairs):
                raise PowersteerError(f"{folder} holds {len(self.pairs)} pairs, {limit} were asked for")
            self.pairs = [self.pairs[i * len(self.pairs) // limit] for i in range(limit)]

    def __len__(self) -> int:
        return len(self.pairs)

    def image(self, index: int) -> torch.Tensor:
        """Picture (3, H, W) in [-1, 1]."""
        pixels = self._open(index, self.pairs[index].image, "RGB", IMAGE_COLUMN)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1

    def condition(self, index: int) -> torch.Tensor:
        """Condition (C, H, W), uint8: 255 stands for 1."""
        pixels = self._open(index, self.pairs[index].conditioning_image, PIL_MODES[self.channels], CONDITIONING_COLUMN)
        return torch.from_numpy(pixels)[None] if self.channels == 1 else torch.from_numpy(pixels).permute(2, 0, 1)

    def _read(self) -> list[Pair]:
        metadata = self.folder / "metadata.jsonl"
        try:
            lines = metadata.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise PowersteerError(
                f"cannot read {metadata}: a folder of pairs has a metadata.jsonl with one JSON object a line: "
                f'{{"{IMAGE_COLUMN}": …, "{CONDITIONING_COLUMN}": …, "{CAPTION_COLUMN}": …}}'
            ) from None
        pairs: list[Pair] = []
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                columns = [row[column] for column in (IMAGE_COLUMN, CONDITIONING_COLUMN, CAPTION_COLUMN)]
            except (json.JSONDecodeError, TypeError):
                raise PowersteerError(f"{metadata}[{number}]: not a JSON object") from None
            except KeyError as missing:
                raise PowersteerError(f"{metadata}[{number}]: column {missing} is missing") from None
            pair = Pair(self.folder / str(columns[0]), self.folder / str(columns[1]), str(columns[2]))
            for path, column in ((pair.image, IMAGE_COLUMN), (pair.conditioning_image, CONDITIONING_COLUMN)):
                if not path.exists():
                    raise PowersteerError(f"{metadata}[{number}]: '{path}' not found (column {column})")
            pairs.append(pair)
        if not pairs:
            raise PowersteerError(f"{metadata} has no rows")
        return pairs

    def _open(self, index: int, path: Path, mode: str, column: str) -> np.ndarray:  # type: ignore[type-arg]
        where = f"{self.folder.name}[{index}]: '{path}' (column {column})"
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert(mode))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            raise PowersteerError(f"{where} is not a readable picture") from None
        if pixels.shape[:2] != self.size:
            raise PowersteerError(
                f"{where} is {pixels.shape[1]}×{pixels.shape[0]} pixels, not {self.size[1]}×{self.size[0]}"
            )
        return pixels
