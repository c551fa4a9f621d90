"""What is to be made: prompts, conditions and seeds, of options, manifests or pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from powersteer.core.config import build_config
from powersteer.core.errors import PowersteerError
from powersteer.core.text import json_lines, parse_json, read_text
from powersteer.data.layouts import read_rows
from powersteer.data.pairs import captioned
from powersteer.denoising.settings import MAX_PICTURES, PictureJob


def jobs_of(
    prompt: str, condition: Sequence[Path], negative_prompt: str = "", seed: int = 0, num_images: int = 4
) -> list[PictureJob]:
    """One prompt under ``num_images`` seeds."""
    if not condition:
        raise PowersteerError("no condition: give --condition my-drawing.png, or --manifest FILE.jsonl")
    if not 0 < num_images <= MAX_PICTURES:
        raise PowersteerError(f"--num-images must be from 1 to {MAX_PICTURES:,}, not {num_images}")
    values = {"prompt": prompt, "condition": tuple(condition), "negative_prompt": negative_prompt}
    return [build_config(values | {"seed": seed + i}, PictureJob, where="generate") for i in range(num_images)]


def read_manifest(path: Path) -> list[PictureJob]:
    """The jobs of a JSONL file.

    A line has ``prompt``, ``condition`` (a path, or one for each adapter) and, if wanted, ``negative_prompt`` and
    ``seed``. Paths are relative to the file's folder.

    Raises:
        PowersteerError: Unreadable, empty, or a line that is no such object; the line is named.
    """
    jobs: list[PictureJob] = []
    for number, line in json_lines(read_text(path), str(path)):
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if isinstance(row, dict) and isinstance(row.get("condition"), str):
            row["condition"] = [row["condition"]]
        job = build_config(row, PictureJob, where=where)
        jobs.append(job.model_copy(update={"condition": tuple(path.parent / file for file in job.condition)}))
    if not jobs:
        raise PowersteerError(f"{path} is empty: give one JSON object a line")
    return jobs


def jobs_of_pairs(folder: Path, negative_prompt: str = "", seed: int = 0) -> list[PictureJob]:
    """Each pair's first caption under its own condition, to be made with ``prepared``; seeds count up from ``seed``.

    Args:
        folder: Pairs in files, in any layout of `powersteer.data.layouts`.
        negative_prompt: Of all pictures.
        seed: Of the first.

    Raises:
        PowersteerError: The folder is malformed, a pair has no caption, or its condition is no file of its own.
    """
    jobs: list[PictureJob] = []
    for i, row in enumerate(read_rows(folder)):
        file = row.conditioning_image.file
        if file is None or file.suffix == ".tar":
            raise PowersteerError(f"{row.conditioning_image} is no file of its own: prepare the pairs without --shards")
        values = {"prompt": captioned(row, None).texts[0], "condition": (file,), "negative_prompt": negative_prompt}
        jobs.append(build_config(values | {"seed": seed + i}, PictureJob, where="generate"))
    return jobs


def check_jobs(jobs: Sequence[PictureJob], adapters: int) -> None:
    """Refuse jobs of which nothing can be made.

    Args:
        jobs: What to make.
        adapters: How many adapters steer.

    Raises:
        PowersteerError: No jobs, an empty prompt, or not as many conditions as adapters.
    """
    if not jobs:
        raise PowersteerError("no prompts: give at least one")
    for job in jobs:
        if not job.prompt.strip():
            raise PowersteerError("the prompt is empty: say what the drawing shows, such as --prompt 'a fox'")
        if len(job.condition) != adapters:
            raise PowersteerError(f"{adapters} adapters need as many conditions, not {len(job.condition)}")
