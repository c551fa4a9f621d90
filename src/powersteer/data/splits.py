"""Folders that by their name hold a split, and what no training may see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]

SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation", "holdout", "held-out"),
    "test": ("test", "testing"),
}
"""What people call them, in lower case; ``val2017`` and ``held_out`` count as well."""
_NUMBER = re.compile(r"[-_ ]?\d+$")


def split_of(name: str) -> Split | None:
    """The split that a folder of this name holds; None of any other."""
    plain = _NUMBER.sub("", name.lower()).replace("_", "-")
    return next((split for split, names in SPLITS.items() if plain in names), None)


def is_held_out(name: str) -> bool:
    """Whether a folder of this name holds what no training may see."""
    return split_of(name) in ("validation", "test")


def held_out_folder(data: Path) -> Path:
    """The split of a data set that no training saw, ``test`` before ``validation``; a folder without splits is one."""
    splits = {split_of(path.name): path for path in sorted(data.glob("*"), reverse=True) if path.is_dir()}
    return splits.get("test") or splits.get("validation") or data
