"""Where pictures come from: one small class each, found out by looking at the root; a new source is one more class."""

from __future__ import annotations

from pathlib import Path

from powersteer.core.errors import PowersteerError
from powersteer.data.prepare.sources.ade20k import Ade20k
from powersteer.data.prepare.sources.base import Source
from powersteer.data.prepare.sources.coco import Coco
from powersteer.data.prepare.sources.folder import Folder
from powersteer.data.prepare.sources.openmoji import OpenMoji

OPENMOJI = "openmoji"
ROOTS = (Coco, Ade20k, Folder)
"""In the order in which a folder is looked at: any folder is the last."""


def find_source(source: str) -> Source:
    """The source of a word or a folder.

    Args:
        source: ``openmoji``, or a folder: a COCO 2017 or ADE20K root, or pictures.

    Raises:
        PowersteerError: There is no such folder.
    """
    if source == OPENMOJI:
        return OpenMoji()
    root = Path(source)
    found = next((kind for kind in ROOTS if kind.fits(root)), None)
    if found is None:
        raise PowersteerError(f"there is no folder {source}: give pictures, a COCO or ADE20K root, or openmoji")
    return found(root)
