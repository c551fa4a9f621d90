"""Conditions of other kinds than sketches, as files."""

import json

import numpy as np
from PIL import Image, ImageDraw


def styled(size=(32, 32)):
    """Red over blue; structure is one line across, and else 0."""
    picture = Image.new("RGB", size, (200, 30, 40))
    ImageDraw.Draw(picture).rectangle((0, size[1] // 2, *size), fill=(10, 60, 220))
    structure = Image.new("L", size)
    ImageDraw.Draw(structure).line((0, 8, size[0], 8), fill=255, width=4)
    picture.putalpha(structure)
    return picture


def write_conditions(folder, make, suffix):
    """Other conditions for the pairs of a folder."""
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["conditioning_image_file_name"] = f"drawings/{i}{suffix}"
        made = make(i)
        if suffix == ".npy":
            np.save(folder / "drawings" / f"{i}.npy", made)
        else:
            made.save(folder / "drawings" / f"{i}{suffix}")
    path.write_text("\n".join(map(json.dumps, rows)))
    return folder


def features(i, dtype=np.float32):
    return np.random.default_rng(i).normal(0, 3, (5, 8, 8)).astype(dtype)
