"""What is written down of a condition: in a data set's dataset.json, and in an adapter's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INK = "ink 1 on 0"
PAPER = "ink 0 on 1"
POLARITY = {"sketch": INK, "depth": "near 1, far 0"}
"""The polarity of each kind that has one: what its values mean."""
LABEL_MAPS = ("segmentation", "layout")
"""Kinds whose colours are labels: a mixture of two of them means nothing. Black is no label."""
FEATURE = "feature"
"""The kind that is no picture: a map (C, h, w) of any numbers, at the latents' size."""
FEATURE_SUFFIX = ".npy"
"""The suffix of files of features."""
BLIND = "blind"
"""Key of a network's conditioning record: the network is shown empty conditions, in training and ever after. What it
gains all the same, it owes to the pictures it was trained on, not to the condition."""


def conditioning_record(kind: str) -> dict[str, Any]:
    """Kind, value range, polarity and palette of a condition, as `BPSModel` keeps them in ``conditioning``."""
    bounds = None if kind == FEATURE else [0, 1]
    return {"kind": kind, "range": bounds, "polarity": POLARITY.get(kind), "palette": None}


def extractor_record(
    kind: str,
    extractor: str,
    *,
    version: str,
    settings: Mapping[str, Any],
    channels: int | None,
    extracted_polarity: str | None = None,
    palette: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`conditioning_record` of what an extractor makes, and how it was made.

    Args:
        kind: The task.
        extractor: Its name.
        version: Of the package or weights that the result depends on.
        settings: Plain values.
        channels: Of its conditions; None where that depends on the data.
        extracted_polarity: What it gave before it was turned into the kind's own polarity.
        palette: Name → colour of label maps.
    """
    return conditioning_record(kind) | {
        "channels": channels,
        "extractor": extractor,
        "version": version,
        "settings": dict(settings),
        "extracted_polarity": extracted_polarity,
        "palette": None if palette is None else dict(palette),
    }
