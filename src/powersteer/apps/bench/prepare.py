"""How many pictures a second `powersteer prepare` makes pairs of, by extractor, and what a second process adds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from rich.progress import track

from powersteer.conditions.extractor import EXTRACTORS, Box, Registered, Subject
from powersteer.core.console import PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.hardware import machine
from powersteer.data.prepare.make import HeldOut, Job, Outcome, Recipe
from powersteer.data.prepare.sources.base import Item, Loaded
from powersteer.data.prepare.workers import pooled

LATENT = 8
"""Pixels a side of a latent, for feature maps."""


@dataclass(frozen=True)
class Row:
    """One extractor."""

    task: str
    extractor: str
    one: float = 0.0
    """Pictures a second with one process."""
    two: float = 0.0
    """With two."""
    reason: str | None = None
    """Why it could not be measured."""

    @property
    def scaling(self) -> float:
        """From one process to two."""
        return self.two / self.one if self.one else 0.0


@dataclass(frozen=True)
class PrepareBench:
    """The rows, and what they were measured on."""

    pictures: int
    side: int
    machine: str
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "rows": [{**asdict(row), "scaling": row.scaling} for row in self.rows]}


def bench_prepare(task: str | None = None, *, pictures: int = 64, side: int = 512) -> PrepareBench:
    """Measure every extractor that can be built here without settings, on noise that looks like clouds.

    What is counted is all that is done for a picture: decoding, the comparison with held-out pictures, the condition,
    encoding and writing; the start of the processes is not. Each process has one thread.

    Args:
        task: Of this task only.
        pictures: So many for each extractor.
        side: Of each picture, in pixels.

    Raises:
        PowersteerError: There is no such task.
    """
    import_module("powersteer.conditions.extractors.catalogue")
    chosen = [one for one in EXTRACTORS.known.values() if task in (None, one.task)]
    if not chosen:
        tasks = ", ".join(dict.fromkeys(one.task for one in EXTRACTORS.known.values()))
        raise PowersteerError(f"there is no task '{task}': give one of {tasks}")
    with tempfile.TemporaryDirectory() as folder:
        shown = track(chosen, "extractors", console=PlainConsole(stderr=True), transient=True)
        rows = [_measure(one, Path(folder), pictures, side) for one in shown]
    return PrepareBench(pictures, side, machine("cpu"), rows)


def _measure(registered: Registered, folder: Path, pictures: int, side: int) -> Row:
    recipe = Recipe(folder, registered, {}, HeldOut({}, []))
    try:
        recipe.build()  # says what is missing
        one, two = (_rate(recipe, pictures, side, processes) for processes in (1, 2))
    except (PowersteerError, ImportError) as error:
        return Row(registered.task, registered.name, reason=str(error))
    return Row(registered.task, registered.name, one, two)


def _rate(recipe: Recipe, pictures: int, side: int, processes: int) -> float:
    """Pictures a second, from when every process is at work."""
    made = pooled(partial(_signed, recipe), _jobs(side), processes)
    at_work: set[int] = set()
    while len(at_work) < processes:
        at_work.add(_whole(*next(made)))
    since = time.perf_counter()
    for process, outcome in islice(made, pictures):
        _whole(process, outcome)
    rate = pictures / (time.perf_counter() - since)
    made.close()  # ends the processes
    return rate


def _signed(recipe: Recipe) -> Callable[[Job], tuple[int, Outcome]]:
    """The work, with the process that did it."""
    work = recipe.build()
    return lambda job: (os.getpid(), work(job))


def _whole(process: int, outcome: Outcome) -> int:
    if outcome.reason is not None:
        raise PowersteerError(outcome.reason)
    return process


def _jobs(side: int) -> Iterator[Job]:
    for i in count():
        yield Job(Item(str(i), "train", partial(_clouds, i, side)), str(i))


def _clouds(seed: int, side: int) -> Loaded:
    """A picture with all that a source may know of it."""
    cells = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)
    file = BytesIO()
    picture.save(file, "JPEG", quality=95)
    subject = Subject(
        Image.open(file).convert("RGB"),
        drawing=picture.convert("L").filter(ImageFilter.FIND_EDGES),
        labels=np.asarray(picture.convert("L"), dtype=np.int64) % 100,
        boxes=(Box("person", 0, 0, side / 2, side / 2), Box("dog", side / 4, side / 4, side, side)),
        features=np.zeros((24, side // LATENT, side // LATENT), dtype=np.float32),
    )
    return Loaded(subject, file.getvalue(), ".jpg")
