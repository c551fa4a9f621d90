"""The kinds of condition, one module each; and what dataset.json and an adapter's config say of a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powersteer.conditions.kind import KINDS

BLIND = "blind"
"""Key of a network's conditioning record: the network is shown empty conditions, in training and ever after. What it
gains all the same, it owes to the pictures it was trained on, not to the condition."""


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
    """`Kind.record` of what an extractor makes, and how it was made.

    Args:
        kind: The task.
        extractor: Its name.
        version: Of the package or weights that the result depends on.
        settings: Plain values.
        channels: Of its conditions; None where that depends on the data.
        extracted_polarity: What it gave before it was turned into the kind's own polarity.
        palette: Name → colour of label maps.
    """
    return KINDS.find(kind).record() | {
        "channels": channels,
        "extractor": extractor,
        "version": version,
        "settings": dict(settings),
        "extracted_polarity": extracted_polarity,
        "palette": None if palette is None else dict(palette),
    }
