"""Which pictures look alike: in shape by a hash, in colour by a thumbnail."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

ALIKE = 8
"""Bits of 256 in which the perceptual hashes of two pictures that look alike may differ."""
ALIKE_COLOURS = 4
"""And the most their thumbnails may, in 255ths, on average: flat pictures differ in little else."""

_AT_ONCE = 1024


def perceptual_hash(picture: Image.Image) -> npt.NDArray[np.float32]:
    """Difference hash: whether each of 16×16 cells is brighter than its right neighbour; (256,), -1 or 1."""
    # Own lines: imagehash would bring scipy and PyWavelets, and resamples otherwise than ALIKE was chosen for.
    cells = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.float32)
    return np.where(cells[:, :-1] > cells[:, 1:], 1, -1).ravel().astype(np.float32)


def thumbnail(picture: Image.Image) -> npt.NDArray[np.float32]:
    """(16, 16, 3), of an RGB picture."""
    return np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)


def first_alike(
    hashes: npt.NDArray[np.float32],
    thumbnails: npt.NDArray[np.float32],
    other_hashes: npt.NDArray[np.float32],
    other_thumbnails: npt.NDArray[np.float32],
    *,
    earlier: bool = False,
) -> dict[int, int]:
    """Pictures that look like one of the others: index → index of the first of these.

    Args:
        hashes: (N, 256), of `perceptual_hash`.
        thumbnails: (N, 16, 16, 3).
        other_hashes: (M, 256).
        other_thumbnails: (M, 16, 16, 3).
        earlier: The others are the same pictures, of which only those before each count.
    """
    found: dict[int, int] = {}
    for start in range(0, len(hashes), _AT_ONCE):
        agreement = hashes[start : start + _AT_ONCE] @ other_hashes.T  # 256 − 2 × differing bits
        for i, row in enumerate(agreement >= 256 - 2 * ALIKE, start):
            places = np.flatnonzero(row[:i] if earlier else row)
            at, step = 0, 16  # mostly the first is the one
            while at < len(places) and i not in found:
                part = places[at : at + step]
                near = np.abs(other_thumbnails[part] - thumbnails[i]).mean(axis=(1, 2, 3)) <= ALIKE_COLOURS
                if near.any():
                    found[i] = int(part[near.argmax()])
                at, step = at + step, min(4 * step, _AT_ONCE)
    return found
