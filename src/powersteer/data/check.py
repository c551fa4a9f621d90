"""What a folder of pairs holds, and what is wrong with it, before any training: all that it would stop at or cut."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.conditions.kind import KINDS
from powersteer.data.captions import cut_captions, token_limit
from powersteer.data.conditioning import Conditioning, conditioning_of
from powersteer.data.findings import SEVERITIES, DataReport, Finding, finding
from powersteer.data.layouts import Columns, look
from powersteer.data.limits import Limits, limits_of
from powersteer.data.looks import first_alike
from powersteer.data.scan import Measured, Scan, scan

CROPPED = 0.1
"""Share of a picture that may be cropped away without a word."""
_FAULTS = {
    "row": ("malformed_rows", "{} rows are malformed"),
    "picture": ("unreadable_pictures", "{} pairs cannot be read"),
    "caption": ("missing_captions", "{} pairs have no caption"),
}
_PARTICULARS = re.compile(r"'[^']*'|\S*/\S*|\S*\[[^\]]*\]|\d+")
"""What differs between two messages of one kind: names, places, numbers."""


def check_pairs(
    folder: Path,
    *,
    validation: Path | None = None,
    conditioning_channels: int | None = None,
    kind: str | None = None,
    columns: Columns | None = None,
    default_prompt: str | None = None,
    base: str = EMBEDDED_BASE,
    resolution: int | None = None,
) -> DataReport:
    """Read every pair of a folder and say what it holds.

    Args:
        folder: Pairs in any layout.
        validation: Held-out pairs: checked too, and compared with the folder's for leakage.
        conditioning_channels: 1 (grey), 3 (RGB), 4 (RGBA), or a feature map's; see `conditioning_of`.
        kind: Of the condition; see `conditioning_of`.
        columns: What the layout calls its columns.
        default_prompt: Caption of pairs that have none.
        base: What is to be steered: its tokenizers say which captions are cut.
        resolution: Pixels of the side that is to be trained at; the base's own by default.

    Raises:
        PowersteerError: Nothing can be read at all.
    """
    conditions = conditioning_of(str(folder), conditioning_channels, kind)
    limits = limits_of(base)
    train = scan(look(folder, columns), folder.name, conditions, default_prompt)
    held_out = None
    if validation is not None:
        held_out = scan(look(validation, columns), validation.name, conditions, default_prompt)
    both = [one for one in (train, held_out) if one is not None]
    faults = [fault for one in both for fault in one.faults]
    leaks = [] if held_out is None else _leaks(train, held_out)
    doubles, alike = _doubles(train), _look_alikes(train)
    findings = [
        *_faults(faults),
        *[one for part in both for one in _left_out(part)],
        *_conditions(train, conditions),
        *_captions(train, default_prompt),
        *_cut(both, limits),
        *_stored(train, conditions),
        *_sizes(train, resolution or limits.side),
        *finding("warning", "doubles", "{} pictures are the same file as an earlier one", doubles, "remove one"),
        *finding("warning", "look_alikes", "{} pictures look like an earlier one", alike, "they weigh twice"),
        *finding("warning", "leaks", "{} validation pictures look like training pictures", leaks, "remove one"),
    ]
    findings.sort(key=lambda one: SEVERITIES.index(one.severity))
    facts = _facts(train, conditions) | {"look_alikes": len(doubles) + len(alike)} if train.pairs else {"pairs": 0}
    if held_out is not None:
        facts |= {"validation_pairs": len(held_out.pairs), "leaks": len(leaks)}
    warnings = [one.line for one in findings if one.severity == "warning"]
    return DataReport(facts, [said for _, said in faults], warnings, findings)


def _facts(train: Scan, conditions: Conditioning) -> dict[str, Any]:
    widths, heights = train.sizes.T
    texts = [one.row.text for one in train.pairs if one.row.text is not None]
    words = [len(text.split()) for text in texts]
    return {
        "pairs": len(train.pairs),
        "width": _spread(widths),
        "height": _spread(heights),
        "aspect_ratio": _spread(widths / heights),
        "condition": {
            "kind": conditions.kind,
            "channels": conditions.channels,
            "low": min(one.low for one in train.pairs),
            "high": max(one.high for one in train.pairs),
            "mean": _spread(train.means),
        },
        "captions": {
            "missing": len(train.pairs) - len(texts),
            "empty": sum(not text.strip() for text in texts),
            "distinct": len(set(texts)),
            "words": _spread(np.array(words)) if words else None,
        },
    }


def _faults(faults: list[tuple[str, str]]) -> list[Finding]:
    """By kind, and by what is said but for names and numbers."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for kind, said in faults:
        kinds.setdefault((kind, _PARTICULARS.sub("", said)), []).append(said)
    return [one for (kind, _), said in kinds.items() for one in finding("error", *_FAULTS[kind], said)]


def _left_out(part: Scan) -> list[Finding]:
    found = part.found
    there = [str(row.image) for row in found.from_held_out]
    return [
        *finding("warning", "left_out", "{} files are in no pair", found.left_out),
        *finding("note", "held_out", "{} folders are left out: by their names they hold pairs out", found.held_out),
        *finding("warning", "from_held_out", "{} pairs lie in folders of held-out pictures", there, "hold them out"),
    ]


def _conditions(train: Scan, conditions: Conditioning) -> list[Finding]:
    blank = [f"that of {one.row.where}" for one in train.pairs if one.low == one.high]
    found = finding("warning", "blank_conditions", "{} conditions are blank", blank)
    kind = KINDS.find(conditions.kind)
    if kind.line_art and train.pairs:
        inky = [f"that of {one.row.where}" for one in train.pairs if one.mean > 0.5 and one.low < one.high]
        text = "{} conditions are more than half ink"
        if np.median(train.means) > 0.5:
            text = f"half of the conditions are {np.median(train.means):.0%} ink or more"
        text = f"{text}, {kind.polarity}: are they inverted?"
        found += finding("warning", "inverted_conditions", text, inky)
    return found


def _captions(train: Scan, default_prompt: str | None) -> list[Finding]:
    rows = [one.row for one in train.pairs]
    bare = [row.where for row in rows if row.text is None and default_prompt is not None]
    empty = [row.where for row in rows if any(not text.strip() for text in row.texts)]
    common, times = next(iter(Counter(row.text for row in rows if row.text is not None).most_common(1)), ("", 0))
    text = f"{{}} pairs have no caption but '{default_prompt}'"
    found = finding("note", "missing_captions", text, bare)
    found += finding("warning", "empty_captions", "{} captions are empty", empty)
    if times > max(1, len(rows) // 2):
        text = f"{times} of {len(rows)} captions are '{common}'"
        found.append(Finding("warning", "one_caption", times, text, "", "the base may forget its other prompts"))
    return found


def _cut(parts: list[Scan], limits: Limits) -> list[Finding]:
    rows = [one.row for part in parts for one in part.pairs]
    where = {text: row.where for row in rows for text in (*row.texts, row.generated_text) if text is not None}
    cut = [f"that of {where[text]}, {count} tokens" for text, count in cut_captions(limits.tokenizers, where)]
    text = f"{{}} captions are longer than the {token_limit(limits.tokenizers)} tokens that the base reads"
    return finding("warning", "long_captions", text, cut, "the rest is cut off; shorten them")


def _stored(train: Scan, conditions: Conditioning) -> list[Finding]:
    """What is put right when a picture is read."""
    both = [(f"{one.row.image}", one.picture) for one in train.pairs]
    shown = [(f"{one.row.conditioning_image}", one.condition) for one in train.pairs if one.condition is not None]
    profiles = [f"{name}, {one.profile}" for name, one in (*both, *shown) if one.profile]
    frames = [f"{name}, {one.frames} frames" for name, one in (*both, *shown) if one.frames > 1]
    on_paper = [name for name, one in both if one.transparent]
    on_nothing = [name for name, one in shown if one.transparent and conditions.channels != 4]
    text = "{} conditions are transparent in part: what is so is no ink and no label"
    return [
        *finding("note", "colour_profiles", "{} pictures have a colour profile: they are converted to sRGB", profiles),
        *finding("note", "transparent_pictures", "{} pictures are transparent in part: they lie on white", on_paper),
        *finding("note", "transparent_conditions", text, on_nothing),
        *finding("warning", "animations", "{} pictures are animations: the first frame alone is read", frames),
    ]


def _sizes(train: Scan, side: int) -> list[Finding]:
    small = [_sized(one) for one in train.pairs if min(one.size) < side]
    cropped = [_sized(one) for one in train.pairs if 1 - min(one.size) / max(one.size) > CROPPED]
    text = f"{{}} pictures lose more than {CROPPED:.0%} when they are cropped to a square"
    return [
        *finding("note", "small_pictures", f"{{}} pictures are enlarged to {side} pixels", small, "give larger ones"),
        *finding("note", "cropped_pictures", text, cropped, "aspect_ratio_buckets=true keeps their shapes"),
    ]


def _sized(one: Measured) -> str:
    return f"{one.row.image}, {one.size[0]}×{one.size[1]}"


def _doubles(train: Scan) -> list[str]:
    first: dict[str, Measured] = {}
    earlier = [(first.setdefault(one.digest, one), one) for one in train.pairs]
    return [f"{one.row.image.name} and {other.row.image.name}" for one, other in earlier if one is not other]


def _look_alikes(train: Scan) -> list[str]:
    """Pictures that look like an earlier one, and are not the same file as any."""
    found = first_alike(train.hashes, train.thumbnails, train.hashes, train.thumbnails, earlier=True)
    first: dict[str, int] = {}
    for i, one in enumerate(train.pairs):
        first.setdefault(one.digest, i)
    names = [one.row.image.name for one in train.pairs]
    return [f"{names[j]} and {names[i]}" for i, j in found.items() if first[train.pairs[i].digest] == i]


def _leaks(train: Scan, held_out: Scan) -> list[str]:
    found = first_alike(held_out.hashes, held_out.thumbnails, train.hashes, train.thumbnails)
    return [f"{held_out.pairs[i].row.image.name} and {train.pairs[j].row.image.name}" for i, j in found.items()]


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
