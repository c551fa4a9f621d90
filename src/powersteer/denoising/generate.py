"""From drawings and prompts to pictures in files."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image
from rich.progress import Progress

from powersteer.adapters.attach import attach, check_fits
from powersteer.adapters.load import load_network
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.load import load_base
from powersteer.conditions import condition_picture
from powersteer.conditions.files import Fit, check_condition, fit_of, fitted, read_condition
from powersteer.conditions.sketch import open_picture
from powersteer.core.config import build_config
from powersteer.core.console import PlainConsole
from powersteer.core.digests import content_digest, weights_digest
from powersteer.core.errors import NonFiniteError, PowersteerError, PowersteerWarning
from powersteer.core.files import read_bytes, reason_of
from powersteer.core.hardware import best_device, native_precision
from powersteer.core.pictures import from_pil, save_grid
from powersteer.core.text import json_lines, parse_json, read_text
from powersteer.data.layouts import read_rows
from powersteer.data.pairs import captioned, same_aspect
from powersteer.denoising.metadata import read_metadata, save_picture
from powersteer.denoising.settings import (
    GUIDANCE_SCALE,
    MAX_PICTURES,
    NUM_INFERENCE_STEPS,
    SCHEDULERS,
    GenerateSettings,
    PictureJob,
    Scheduler,
)

GRID_PICTURES, GRID_COLUMNS = 24, 8


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


def pictures_of(folder: Path) -> list[Path]:
    """What `generate` has made in a folder, in order, without the grid."""
    return sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9]-seed*.png"))


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
    if not jobs:
        raise PowersteerError("no prompts: give at least one")
    for job in jobs:
        if not job.prompt.strip():
            raise PowersteerError("the prompt is empty: say what the drawing shows, such as --prompt 'a fox'")
        if len(job.condition) != len(settings.adapter):
            raise PowersteerError(f"{len(settings.adapter)} adapters need as many conditions, not {len(job.condition)}")
    # Fail on bad files before sampling starts.
    sizes = {file: check_condition(file) for file in dict.fromkeys(file for job in jobs for file in job.condition)}
    models = [load_network(name) for name in settings.adapter]
    fit = _common_fit(settings, models)
    pipe, inputs = _pipeline(settings, fit)
    for model in models:
        check_fits(model, pipe)
        model.to(pipe.device)
    check_steps(pipe, settings.num_inference_steps, 1.0 if settings.init_image is None else settings.strength)
    latents = pipe.unet.config.sample_size
    _warn_of_shapes(settings, sizes)

    @lru_cache(maxsize=64)
    def conditions_of(files: tuple[Path, ...]) -> list[tuple[torch.Tensor, bool]]:
        return [
            condition_of(file, model, latents, prepared=settings.prepared, fit=fit)
            for file, model in zip(files, models, strict=True)
        ]

    steering = {name: _for_each(name, getattr(settings, name), models) for name in ("scale", "start", "end")}
    first = 0 if resume else _next_number(out_dir)
    files = [out_dir / f"{first + i:05d}-seed{job.seed}.png" for i, job in enumerate(jobs)]
    records = [settings.model_dump(mode="json") | job.model_dump(mode="json") for job in jobs]
    if resume:  # then a picture that is there counts as made: it must be of these weights and files, too
        digests = _digests(settings, models, pipe, sizes)
        for record, job in zip(records, jobs, strict=True):
            record["digests"] = digests(job)
    missing = [i for i, (file, record) in enumerate(zip(files, records, strict=True)) if not _is_made(file, record)]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        console = PlainConsole(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("generating", total=len(jobs), completed=len(jobs) - len(missing))
            for begin in range(0, len(missing), batch_size):
                rows = missing[begin : begin + batch_size]
                part = [jobs[i] for i in rows]
                drawn = [conditions_of(job.condition) for job in part]
                alike = len({job.condition for job in part}) == 1  # then the network runs once for all of them
                pictures = steered_pictures(
                    pipe,
                    models,
                    [job.prompt for job in part],
                    [torch.stack([row[k][0] for row in (drawn[:1] if alike else drawn)]) for k in range(len(models))],
                    seeds=[job.seed for job in part],
                    negative_prompt=[job.negative_prompt for job in part],
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    **steering,
                    **{name: [value] * len(part) if name == "image" else value for name, value in inputs.items()},
                )
                for i, row, picture in zip(rows, drawn, pictures, strict=True):
                    record = records[i] | {"inverted": [inverted for _, inverted in row]}
                    save_picture(picture, files[i], record)
                progress.update(bar, advance=len(rows))
        kinds = [kind_of(model) for model in models]
        _save_grid(
            out_dir / "grid.png",
            jobs,
            files,
            lambda job: [(one, kind) for (one, _), kind in zip(conditions_of(job.condition), kinds, strict=True)],
        )
    except OSError as error:
        raise PowersteerError(f"cannot write to {out_dir}: {reason_of(error)}") from None
    return [*files, out_dir / "grid.png"]


def steered_pictures(
    pipe: DiffusionPipeline,
    model: Adapter | Sequence[Adapter] | None,
    prompts: Sequence[str],
    condition: Any,
    *,
    seeds: Sequence[int],
    negative_prompt: str | Sequence[str] = "",
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    scale: float | Sequence[float] = 1.0,
    start: float | Sequence[float] = 0.0,
    end: float | Sequence[float] = 1.0,
    **inputs: Any,
) -> list[Image.Image]:
    """One picture for each prompt and seed; without a model, the prior's.

    Args:
        pipe: The frozen base.
        model: The steering network, or several; or one of another kind, which steers alone and at full strength.
        prompts: One prompt a picture.
        condition: One condition for all, or one for each prompt; with several networks, a list of such.
        seeds: One seed a picture: the same seed starts from the same noise, steered or not.
        negative_prompt: What to keep away from; one, or one a picture.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of the text, as in diffusers; 1 is none.
        scale: Strength of the steering; see `powersteer.steer`.
        start: See `powersteer.steer`.
        end: See `powersteer.steer`.
        **inputs: Further arguments of the pipeline.

    Raises:
        PowersteerError: No prompts, not as many seeds as prompts, steps that the scheduler cannot take, what
            `powersteer.steer` refuses, or a strength of, or company for, a network that is not BPS.
        NonFiniteError: The pictures are not finite.
    """
    if not prompts or len(seeds) != len(prompts):
        raise PowersteerError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each, at least one")
    negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    run: Any = pipe
    check_steps(run, num_inference_steps, inputs.get("strength", 1.0) if "image" in inputs else 1.0)
    wanted = inputs.pop("output_type", "pil")
    with _steering(run, model, condition, {"scale": scale, "start": start, "end": end}):
        result = run(
            list(prompts),
            negative_prompt=negative,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator(pipe.device).manual_seed(seed) for seed in seeds],
            output_type="pt" if wanted == "pil" else wanted,
            **inputs,
        )
    made: Any = result.images
    if isinstance(result.images, torch.Tensor) and not bool(result.images.isfinite().all()):
        raise NonFiniteError(
            f"the pictures are not finite numbers, of {num_inference_steps} steps of {type(run.scheduler).__name__} in "
            f"{str(run.unet.dtype).removeprefix('torch.')}: take more steps, another scheduler, or float32 weights"
        )
    flagged = sum(getattr(result, "nsfw_content_detected", None) or [])
    if flagged:
        told = f"the base's safety checker made {flagged} of {len(prompts)} pictures black"
        warnings.warn(told, PowersteerWarning, stacklevel=2)
    processor = run.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(made)) if wanted == "pil" else made


def check_steps(pipe: Any, num_inference_steps: int, strength: float = 1.0) -> None:
    """Refuse a number of steps that leaves nothing to do, or that the scheduler cannot divide its noise into.

    Args:
        pipe: The pipeline, its scheduler chosen.
        num_inference_steps: Denoising steps.
        strength: The share of them that is done, where a picture is started from.

    Raises:
        PowersteerError: As said.
    """
    if int(num_inference_steps * strength) < 1:
        raise PowersteerError(
            f"{num_inference_steps} steps at a strength of {strength:g} leave none to do: give "
            f"{math.ceil(1 / strength)} steps or more, or a greater strength"
        )
    name = type(pipe.scheduler).__name__
    try:
        copy.deepcopy(pipe.scheduler).set_timesteps(num_inference_steps)
    except Exception as error:  # each scheduler has its own
        raise PowersteerError(
            f"{name} cannot take {num_inference_steps} steps ({reason_of(error)}): give more, or another scheduler"
        ) from None


def _steering(
    pipe: Any, model: Adapter | Sequence[Adapter] | None, condition: Any, strength: dict[str, Any]
) -> AbstractContextManager[None]:
    """`attach`, if there is anything to steer with."""
    nothing = model is None or (not isinstance(model, torch.nn.Module) and not model)
    return nullcontext() if nothing else attach(pipe, model, condition, **strength)


def make_scheduler(name: Scheduler, own: Any) -> Any:
    """A scheduler by name, for the noise that the base's own was made for."""
    return getattr(diffusers, SCHEDULERS[name]).from_config(own.config)


def _pipeline(settings: GenerateSettings, fit: Fit) -> tuple[Any, dict[str, Any]]:
    """The stock pipeline for the settings, and what it takes beyond prompts."""
    device = best_device()
    pipe: Any = load_base(settings.base, torch.float32 if device.type == "cpu" else native_precision(device))
    pipe.to(device)
    if settings.scheduler is not None:
        pipe.scheduler = make_scheduler(settings.scheduler, pipe.scheduler)
    if settings.init_image is None:
        if settings.mask_image is not None:
            raise PowersteerError("a mask needs the picture it masks: give --init-image too")
        return pipe, {}
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def opened(file: Path, mode: str, paper: str) -> Image.Image:
        return fitted(open_picture(file).convert(mode), (side, side), fit, where=str(file), paper=paper)

    inputs: dict[str, Any] = {"image": opened(settings.init_image, "RGB", "white"), "strength": settings.strength}
    kind = AutoPipelineForImage2Image
    if settings.mask_image is not None:
        inputs["mask_image"] = opened(settings.mask_image, "L", "black")
        kind = AutoPipelineForInpainting
    pipe = kind.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe, inputs


def _common_fit(settings: GenerateSettings, models: Sequence[Adapter]) -> Fit:
    """One for all conditions, init image and mask: what lies on one another must be cut alike."""
    fits = {fit_of(model.spec.channels, kind_of(model), prepared=settings.prepared) for model in models}
    return "pad" if fits == {"pad"} else "crop"


def _warn_of_shapes(settings: GenerateSettings, conditions: Mapping[Path, tuple[int, int] | None]) -> None:
    """Say when pictures that will lie on one another have other shapes."""
    sizes = {file: size for file, size in conditions.items() if size is not None}
    if settings.init_image is None:
        return
    sizes |= {file: open_picture(file).size for file in (settings.init_image, settings.mask_image) if file is not None}
    first = sizes[settings.init_image]
    other = next((file for file, size in sizes.items() if not same_aspect(size, first)), None)
    if other is not None:
        told = "{} is {}×{} pixels, {} {}×{}: their shapes differ, so they may not lie on one another as you mean"
        words = told.format(settings.init_image, *first, other, *sizes[other])
        warnings.warn(words, PowersteerWarning, stacklevel=3)


def _digests(
    settings: GenerateSettings, models: Sequence[Adapter], pipe: Any, files: Iterable[Path]
) -> Callable[[PictureJob], dict[str, Any]]:
    """What a job's picture depends on beside its settings."""
    parts = {part: weights_digest(getattr(pipe, part)) for part in ("unet", "vae", "text_encoder")}
    known: dict[str, Any] = {"base": parts, "adapter": [weights_digest(model) for model in models]}
    for name in ("init_image", "mask_image"):
        if (file := getattr(settings, name)) is not None:
            known[name] = content_digest(read_bytes(file))
    of_file = {file: content_digest(read_bytes(file)) for file in files}
    return lambda job: {**known, "condition": [of_file[file] for file in job.condition]}


def kind_of(model: Adapter) -> str | None:
    """The kind of a network's conditions, where it is recorded."""
    return model.spec.conditioning.get("kind")


def condition_of(
    file: Path, model: Adapter, latents: int, *, prepared: bool = False, fit: Fit | None = None
) -> tuple[torch.Tensor, bool]:
    """The file as ``model`` reads it (C, H, W), and whether it was inverted; ``latents`` are so many a side.

    Raises:
        PowersteerError: See `read_condition`.
    """
    side = latents * model.spec.factor
    return read_condition(file, model.spec.channels, kind_of(model), (side, side), prepared=prepared, fit=fit)


def _for_each(name: str, values: Sequence[float], models: Sequence[Adapter]) -> list[float]:
    if len(values) not in (1, len(models)):
        raise PowersteerError(f"{len(values)} times --{name} for {len(models)} adapters: give one, or one for each")
    return list(values) * (len(models) // len(values))


def _next_number(out_dir: Path) -> int:
    return max((int(file.name[:5]) for file in pictures_of(out_dir)), default=-1) + 1


def _is_made(file: Path, record: dict[str, Any]) -> bool:
    """Whether the picture is there; one of other settings is an error."""
    if not file.exists():
        return False
    try:
        made = read_metadata(file).settings
    except PowersteerError:
        raise PowersteerError(f"{file} is no picture of this command: give another folder") from None
    made.pop("inverted", None)
    if made != record:
        raise PowersteerError(f"{file} was made with other settings: give another folder")
    return True


def _save_grid(
    path: Path,
    jobs: Sequence[PictureJob],
    files: Sequence[Path],
    drawings: Callable[[PictureJob], list[tuple[torch.Tensor, str | None]]],
) -> None:
    """Conditions beside what was made of them: once where all pictures share them, else for each."""
    alike = len({job.condition for job in jobs}) == 1
    with Image.open(files[0]) as first:
        size = (first.height, first.width)
    cells = [condition_picture(one, size, kind) for one, kind in drawings(jobs[0])] if alike else []
    count = min(len(jobs), GRID_PICTURES)
    for i in (k * len(jobs) // count for k in range(count)):
        cells += [] if alike else [condition_picture(one, size, kind) for one, kind in drawings(jobs[i])]
        with Image.open(files[i]) as picture:
            cells.append(from_pil(picture))
    of_one = 1 + len(jobs[0].condition)
    columns = len(cells) if len(cells) <= GRID_COLUMNS else GRID_COLUMNS // of_one * of_one
    save_grid(torch.stack(cells), path, columns=columns, scale=max(1, 128 // size[1]))
