"""A base and adapters, loaded and checked, that make the pictures of jobs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from powersteer.adapters.attach import check_fits
from powersteer.adapters.load import load_network
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.load import load_base
from powersteer.backbones.options import base_options
from powersteer.backbones.protocol import base_of
from powersteer.conditions.files import Fit, fit_of, fitted, read_condition
from powersteer.conditions.sketch import open_picture
from powersteer.core.errors import PowersteerError, PowersteerWarning
from powersteer.core.hardware import best_device, native_precision
from powersteer.data.pairs import same_aspect
from powersteer.denoising.sampling.sample import check_steps, make_scheduler, steered_pictures
from powersteer.denoising.settings import GenerateSettings, PictureJob


class Sampler:
    """All that the jobs of one run share.

    Args:
        settings: Of the run.
        sizes: Each condition's file, and its (width, height) in pixels, where it is a picture.

    Raises:
        PowersteerError: Base or adapter are missing or do not fit, a picture cannot be read, the scheduler cannot take
            the steps, or a strength is given neither once nor for each adapter.
    """

    def __init__(self, settings: GenerateSettings, sizes: Mapping[Path, tuple[int, int] | None]) -> None:
        self.settings = settings
        self.models = [load_network(name) for name in settings.adapter]
        self.fit: Fit = _common_fit(settings, self.models)
        self.pipe, self.inputs = _pipeline(settings, self.fit)
        for model in self.models:
            check_fits(model, self.pipe)
            model.to(self.pipe.device)
        check_steps(self.pipe, settings.num_inference_steps, 1.0 if settings.init_image is None else settings.strength)
        _warn_of_shapes(settings, sizes)
        self.strength = {
            name: _for_each(name, getattr(settings, name), self.models) for name in ("scale", "start", "end")
        }
        self._conditions = lru_cache(maxsize=64)(self._read)

    def conditions(self, job: PictureJob) -> list[tuple[torch.Tensor, bool]]:
        """For each adapter, its condition (C, H, W), and whether it was inverted."""
        return self._conditions(job.condition)

    def pictures(self, jobs: Sequence[PictureJob]) -> list[Image.Image]:
        """One picture for each job, made at once."""
        drawn = [self.conditions(job) for job in jobs]
        alike = len({job.condition for job in jobs}) == 1  # then the networks run once for all of them
        shown = drawn[:1] if alike else drawn
        inputs = {name: [value] * len(jobs) if name == "image" else value for name, value in self.inputs.items()}
        return steered_pictures(
            self.pipe,
            self.models,
            [job.prompt for job in jobs],
            [torch.stack([row[k][0] for row in shown]) for k in range(len(self.models))],
            seeds=[job.seed for job in jobs],
            negative_prompt=[job.negative_prompt for job in jobs],
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            **self.strength,
            **inputs,
        )

    def _read(self, files: tuple[Path, ...]) -> list[tuple[torch.Tensor, bool]]:
        latents, prepared = base_of(self.pipe).sample_size, self.settings.prepared
        return [
            condition_of(file, model, latents, prepared=prepared, fit=self.fit)
            for file, model in zip(files, self.models, strict=True)
        ]


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


def _pipeline(settings: GenerateSettings, fit: Fit) -> tuple[Any, dict[str, Any]]:
    """The stock pipeline for the settings, and what it takes beyond prompts."""
    device = best_device()
    dtype = torch.float32 if device.type == "cpu" else native_precision(device)
    pipe: Any = load_base(settings.base, dtype, **base_options(settings))
    pipe.to(device)
    if settings.scheduler is not None:
        pipe.scheduler = make_scheduler(settings.scheduler, pipe.scheduler)
    if settings.init_image is None:
        if settings.mask_image is not None:
            raise PowersteerError("a mask needs the picture it masks: give --init-image too")
        return pipe, {}
    side = base_of(pipe).size

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
        warnings.warn(words, PowersteerWarning, stacklevel=4)


def _for_each(name: str, values: Sequence[float], models: Sequence[Adapter]) -> list[float]:
    if len(values) not in (1, len(models)):
        raise PowersteerError(f"{len(values)} times --{name} for {len(models)} adapters: give one, or one for each")
    return list(values) * (len(models) // len(values))
