"""What an adapter's config says of its condition, for whoever loads the weights."""

from __future__ import annotations

from typing import Any

POLARITY = {"sketch": "ink 1 on 0"}
"""Of the kinds that have one."""
LABEL_MAPS = ("segmentation", "layout")
"""Kinds whose colours are labels: a mixture of two of them means nothing."""


def conditioning_record(kind: str) -> dict[str, Any]:
    """Kind, value range, polarity and palette of a condition, as `BPSModel` keeps them in ``conditioning``."""
    return {"kind": kind, "range": [0, 1], "polarity": POLARITY.get(kind), "palette": None}
