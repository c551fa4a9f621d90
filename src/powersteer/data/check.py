"""What a folder of pairs holds, and what is wrong with it, before any training."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from powersteer.conditions.kinds import FEATURE, INK, LABEL_MAPS
from powersteer.conditions.tensors import PIL_MODES
from powersteer.data.conditioning import Conditioning, conditioning_of
from powersteer.data.layouts import Columns, read_rows
from powersteer.data.pairs import same_aspect
from powersteer.data.rows import Row
from powersteer.errors import PowersteerError

ALIKE = 8
"""Bits of 256 in which the perceptual hashes of two pictures that look alike may differ."""
ALIKE_COLOURS = 4
"""And the most their thumbnails may, in 255ths, on average: flat pictures differ in little else."""


@dataclass(frozen=True)
class DataReport:
    """What `check_pairs` found."""

    facts: dict[str, Any]
    """Plain values: counts, sizes, aspect ratios, conditions, captions, look-alikes."""
    errors: list[str]
    """What training would stop at."""
    warnings: list[str]
    """What it would suffer from."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Scan:
    """The pairs of one folder that can be read, and their measures."""

    rows: list[Row]
    sizes: np.ndarray[Any, Any]
    """(N, 2): width, height."""
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]
    mean: np.ndarray[Any, Any]
    """(N,) each, of the conditions, in [0, 1]."""
    hashes: np.ndarray[Any, Any]
    """(N, 256), -1 or 1."""
    thumbnails: np.ndarray[Any, Any]
    """(N, 16, 16, 3)."""


def check_pairs(
    folder: Path,
    *,
    validation: Path | None = None,
    conditioning_channels: int | None = None,
    kind: str | None = None,
    columns: Columns | None = None,
    default_prompt: str | None = None,
) -> DataReport:
    """Read every pair of a folder and say what it holds.

    Args:
        folder: Pairs in any layout.
        validation: Held-out pairs: checked too, and compared with the folder's for leakage.
        conditioning_channels: 1 (grey), 3 (RGB), 4 (RGBA), or a feature map's; see `conditioning_of`.
        kind: Of the condition; see `conditioning_of`.
        columns: What the layout calls its columns.
        default_prompt: Caption of pairs that have none.

    Raises:
        PowersteerError: Nothing can be read at all.
    """
    errors: list[str] = []
    warnings: list[str] = []
    conditions = conditioning_of(str(folder), conditioning_channels, kind)
    train = _scan(folder, columns, conditions, default_prompt, errors)
    facts: dict[str, Any] = {"pairs": len(train.rows)}
    if train.rows:
        widths, heights = train.sizes.T
        facts["width"], facts["height"] = _spread(widths), _spread(heights)
        facts["aspect_ratio"] = _spread(widths / heights)
        facts["condition"] = {
            "kind": conditions.kind,
            "channels": conditions.channels,
            "low": float(train.low.min()),
            "high": float(train.high.max()),
            "mean": _spread(train.mean),
        }
        blank = [row.where for row, low, high in zip(train.rows, train.low, train.high, strict=True) if low == high]
        if blank:
            warnings.append(f"{len(blank)} conditions are blank, such as that of {blank[0]}")
        if conditions.kind == "sketch" and np.median(train.mean) > 0.5:
            share = f"{np.median(train.mean):.0%}"
            warnings.append(f"half of the conditions are {share} ink or more, {INK}: are they inverted?")
        facts["captions"] = _captions(train.rows, warnings)
        doubles = [(i, j) for i, j in _alike(train, train) if i < j]
        facts["look_alikes"] = len({j for _, j in doubles})
        if doubles:
            i, j = doubles[0]
            names = f"{train.rows[i].image.name} and {train.rows[j].image.name}"
            warnings.append(f"{facts['look_alikes']} pictures look like an earlier one, such as {names}")
    if validation is not None:
        held_out = _scan(validation, columns, conditions, default_prompt, errors)
        facts["validation_pairs"] = len(held_out.rows)
        leaks = _alike(train, held_out)
        facts["leaks"] = len({j for _, j in leaks})
        if leaks:
            i, j = leaks[0]
            names = f"{held_out.rows[j].image.name} and {train.rows[i].image.name}"
            warnings.append(f"{facts['leaks']} validation pictures look like training pictures, such as {names}")
    return DataReport(facts, errors, warnings)


def _scan(
    folder: Path, columns: Columns | None, conditions: Conditioning, default_prompt: str | None, errors: list[str]
) -> _Scan:
    rows: list[Row] = []
    measures: list[tuple[Any, ...]] = []
    for row in track(read_rows(folder, columns, errors), f"reading {folder.name}", transient=True):
        try:
            picture, (values, shape) = row.image.open("RGB"), _condition(row, conditions)
        except PowersteerError as error:
            errors.append(f"{row.where}: {error}")
            continue
        if not same_aspect(picture.size, shape):
            errors.append(
                f"{row.where}: the condition is {shape[0]}×{shape[1]} pixels, its picture "
                f"{picture.width}×{picture.height}: they must have one aspect ratio"
            )
            continue
        if row.text is None and default_prompt is None:
            errors.append(f"{row.where} has no caption: write one, or give default_prompt='…' for all")
        rows.append(row)
        thumbnail = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
        measures.append((picture.size, values.min(), values.max(), values.mean(), perceptual_hash(picture), thumbnail))
    if not measures:
        none = np.empty(0)
        return _Scan(rows, np.empty((0, 2)), none, none, none, np.empty((0, 256)), np.empty((0, 16, 16, 3)))
    sizes, low, high, mean, hashes, thumbnails = (np.array(column) for column in zip(*measures, strict=True))
    return _Scan(rows, sizes, low, high, mean, hashes, thumbnails)


def _condition(row: Row, conditions: Conditioning) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    """A condition's values, and its width and height.

    Raises:
        PowersteerError: It cannot be read, or is not what the data set says.
    """
    if conditions.kind != FEATURE:
        paper = "black" if conditions.kind in LABEL_MAPS else None
        picture = row.conditioning_image.open(PIL_MODES[conditions.channels], paper)
        return np.asarray(picture, dtype=np.float32) / 255, picture.size
    values, bounds = row.conditioning_image.features(), conditions.record["range"]
    channels, height, width = values.shape
    if channels != conditions.channels:
        raise PowersteerError(f"{row.conditioning_image} has {channels} channels, not {conditions.channels}")
    if bounds is not None and not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise PowersteerError(f"{row.conditioning_image} has values outside {bounds}")
    return values, (width, height)


def perceptual_hash(picture: Image.Image) -> np.ndarray[Any, Any]:
    """Difference hash: whether each of 16×16 cells is brighter than its right neighbour; (256,), -1 or 1."""
    cells = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.float32)
    return np.where(cells[:, :-1] > cells[:, 1:], 1, -1).ravel().astype(np.float32)


def _alike(one: _Scan, other: _Scan) -> list[tuple[int, int]]:
    """Pairs of indices whose pictures look alike: in shape by their hashes, in colour by their thumbnails."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(one.rows), 1024):
        agreement = one.hashes[start : start + 1024] @ other.hashes.T  # 256 − 2 × differing bits
        for row, j in np.argwhere(agreement >= 256 - 2 * ALIKE):
            i = start + int(row)
            if np.abs(one.thumbnails[i] - other.thumbnails[j]).mean() <= ALIKE_COLOURS:
                found.append((i, int(j)))
    return found


def _captions(rows: list[Row], warnings: list[str]) -> dict[str, Any]:
    texts = [row.text for row in rows if row.text is not None]
    counts = Counter(texts)
    common, times = counts.most_common(1)[0] if counts else ("", 0)
    if times > max(1, len(rows) // 2):
        warnings.append(f"{times} of {len(rows)} captions are '{common}': the base may forget its other prompts")
    words = [len(text.split()) for text in texts]
    return {
        "missing": len(rows) - len(texts),
        "empty": sum(not text.strip() for text in texts),
        "distinct": len(counts),
        "words": _spread(np.array(words)) if words else None,
    }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
