"""From prompts and conditions to pictures in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from powersteer.conditions.files import check_condition
from powersteer.core.console import PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.denoising.sampling.files import GRID, Target, save_grid_of, targets_of
from powersteer.denoising.sampling.jobs import check_jobs
from powersteer.denoising.sampling.metadata import save_picture
from powersteer.denoising.sampling.sampler import Sampler
from powersteer.denoising.settings import GenerateSettings, PictureJob


def generate(
    settings: GenerateSettings, jobs: Sequence[PictureJob], out_dir: Path, *, batch_size: int = 4, resume: bool = False
) -> list[Path]:
    """Make the pictures, and a grid of them beside their conditions.

    Args:
        settings: What all pictures share.
        jobs: What to make.
        out_dir: Files are named by a running number and the seed; a picture that is there is never overwritten.
        batch_size: Pictures made at once; which ones share a batch changes none of them.
        resume: The number is the job's place, and a picture that is there already is not made again.

    Returns:
        The pictures' files, then the grid's.

    Raises:
        PowersteerError: No jobs, empty prompt, unreadable picture, missing base or adapter, not as many conditions as
            adapters, an unwritable folder, or (``resume``) one with pictures of other settings.
    """
    check_jobs(jobs, len(settings.adapter))
    # Fail on bad files before sampling starts.
    sizes = {file: check_condition(file) for file in dict.fromkeys(file for job in jobs for file in job.condition)}
    sampler = Sampler(settings, sizes)
    targets = targets_of(sampler, jobs, out_dir, sizes, resume=resume)
    missing = [target for target in targets if not target.is_made()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        console = PlainConsole(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("generating", total=len(jobs), completed=len(jobs) - len(missing))
            for begin in range(0, len(missing), batch_size):
                batch = missing[begin : begin + batch_size]
                _make(sampler, batch)
                progress.update(bar, advance=len(batch))
        save_grid_of(targets, sampler, out_dir / GRID)
    except OSError as error:
        raise PowersteerError(f"cannot write to {out_dir}: {reason_of(error)}") from None
    return [*(target.file for target in targets), out_dir / GRID]


def _make(sampler: Sampler, batch: Sequence[Target]) -> None:
    """Make some pictures at once, and write them."""
    pictures = sampler.pictures([target.job for target in batch])
    for target, picture in zip(batch, pictures, strict=True):
        inverted = [inverted for _, inverted in sampler.conditions(target.job)]
        save_picture(picture, target.file, target.record | {"inverted": inverted})
