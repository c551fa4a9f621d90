"""The files of a run: their numbers, what they say, which are there already, and the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from powersteer.backbones.protocol import base_of
from powersteer.conditions import condition_picture
from powersteer.core.digests import content_digest, weights_digest
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes
from powersteer.core.pictures import from_pil, save_grid
from powersteer.denoising.sampling.metadata import read_metadata
from powersteer.denoising.sampling.sampler import Sampler, kind_of
from powersteer.denoising.settings import PictureJob

GRID = "grid.png"
GRID_PICTURES, GRID_COLUMNS = 24, 8


def pictures_of(folder: Path) -> list[Path]:
    """What `powersteer.denoising.sampling.generate` has made in a folder, in order, without the grid."""
    return sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9]-seed*.png"))


@dataclass(frozen=True)
class Target:
    """One picture: its job, its file, and what the file is to say."""

    job: PictureJob
    file: Path
    record: dict[str, Any]

    def is_made(self) -> bool:
        """Whether it is there.

        Raises:
            PowersteerError: Something else is there.
        """
        if not self.file.exists():
            return False
        try:
            made = read_metadata(self.file).settings
        except PowersteerError:
            raise PowersteerError(f"{self.file} is no picture of this command: give another folder") from None
        made.pop("inverted", None)
        if made != self.record:
            raise PowersteerError(f"{self.file} was made with other settings: give another folder")
        return True


def targets_of(
    sampler: Sampler, jobs: Sequence[PictureJob], out_dir: Path, conditions: Iterable[Path], *, resume: bool
) -> list[Target]:
    """The pictures of a run.

    Args:
        sampler: What makes them.
        jobs: What to make.
        out_dir: Where.
        conditions: The files of all conditions.
        resume: Number by the job's place; else from the first number that is free.
    """
    first = 0 if resume else _next_number(out_dir)
    files = [out_dir / f"{first + i:05d}-seed{job.seed}.png" for i, job in enumerate(jobs)]
    settings = sampler.settings.model_dump(mode="json")
    records = [settings | job.model_dump(mode="json") for job in jobs]
    if resume:  # then a picture that is there counts as made: it must be of these weights and files, too
        digests = _digests(sampler, conditions)
        records = [record | {"digests": digests(job)} for record, job in zip(records, jobs, strict=True)]
    return [Target(*one) for one in zip(jobs, files, records, strict=True)]


def save_grid_of(targets: Sequence[Target], sampler: Sampler, path: Path) -> None:
    """Conditions beside what was made of them: once where all pictures share them, else for each.

    Args:
        targets: The pictures, all made.
        sampler: Reads the conditions.
        path: The PNG.

    Raises:
        OSError: It cannot be written.
    """
    kinds = [kind_of(model) for model in sampler.models]
    with Image.open(targets[0].file) as first:
        size = (first.height, first.width)

    def drawings(job: PictureJob) -> list[torch.Tensor]:
        shown = zip(sampler.conditions(job), kinds, strict=True)
        return [condition_picture(condition, size, kind) for (condition, _), kind in shown]

    alike = len({target.job.condition for target in targets}) == 1
    cells = drawings(targets[0].job) if alike else []
    count = min(len(targets), GRID_PICTURES)
    for target in (targets[k * len(targets) // count] for k in range(count)):
        cells += [] if alike else drawings(target.job)
        with Image.open(target.file) as picture:
            cells.append(from_pil(picture))
    of_one = 1 + len(targets[0].job.condition)
    columns = len(cells) if len(cells) <= GRID_COLUMNS else GRID_COLUMNS // of_one * of_one
    save_grid(torch.stack(cells), path, columns=columns, scale=max(1, 128 // size[1]))


def _next_number(out_dir: Path) -> int:
    return max((int(file.name[:5]) for file in pictures_of(out_dir)), default=-1) + 1


def _digests(sampler: Sampler, files: Iterable[Path]) -> Callable[[PictureJob], dict[str, Any]]:
    """What a job's picture depends on beside its settings."""
    parts = {name: weights_digest(part) for name, part in base_of(sampler.pipe).parts.items()}
    known: dict[str, Any] = {"base": parts, "adapter": [weights_digest(model) for model in sampler.models]}
    for name in ("init_image", "mask_image"):
        if (file := getattr(sampler.settings, name)) is not None:
            known[name] = content_digest(read_bytes(file))
    of_file = {file: content_digest(read_bytes(file)) for file in files}
    return lambda job: {**known, "condition": [of_file[file] for file in job.condition]}
