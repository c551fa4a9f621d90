"""Which condition each row of a denoiser's batch follows: told from the call itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from powersteer.core.errors import PowersteerError


@dataclass(frozen=True)
class Guidance:
    """How a backbone's pipelines lay out classifier-free guidance, and what one call of it is."""

    last: bool = False
    """Whether the unconditional half of a batch comes second."""
    alone: bool | None = None
    """Whether this call is of the unconditional text alone; None where that is not known."""


@dataclass(frozen=True)
class Rows:
    """A batch: parts (of guidance) × images, and the condition of each image.

    Diffusers repeats the latents once for each part, and lays each prompt's images side by side.
    """

    batch: int
    conditions: int
    parts: int | None
    """None where nothing depends on it."""
    unconditional: tuple[bool, ...] | None
    """Whether each part is unconditional; None where it is not known."""

    @property
    def index(self) -> list[int] | None:
        """The condition of each row; None where there is one for all."""
        if self.conditions == 1 or self.parts is None:
            return None
        images = self.batch // self.parts
        return [row % images * self.conditions // images for row in range(self.batch)]

    def marks(self) -> list[bool]:
        """Whether each row is unconditional.

        Raises:
            PowersteerError: That is not known.
        """
        if self.unconditional is None:
            raise PowersteerError(
                f"which of the {self.batch} rows of this batch are unconditional cannot be told: steer both "
                "(steer_unconditional=True, no steering_guidance_scale); in a loop of your own, give the denoiser both "
                "halves at once, or say unconditional=[True, False]"
            )
        each = self.batch // len(self.unconditional)
        return [mark for mark in self.unconditional for _ in range(each)]


@dataclass(frozen=True)
class Caller:
    """The diffusers pipeline that makes a call, and its variables at this moment."""

    pipeline: DiffusionPipeline
    variables: dict[str, Any]

    @classmethod
    def find(cls, depth: int) -> Caller | None:
        """The nearest method of a pipeline on this thread's stack, from ``depth`` frames up."""
        frame = sys._getframe(depth)  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                variables = frame.f_locals
                if isinstance(variables.get("self"), DiffusionPipeline):
                    return cls(variables["self"], variables)
            frame = frame.f_back
        return None

    @property
    def latents(self) -> torch.Tensor | None:
        """What is being denoised, one row an image."""
        found = self.variables.get("latents")
        return found if isinstance(found, torch.Tensor) and found.ndim in (3, 4) else None

    @property
    def guided(self) -> bool | None:
        """Whether there is classifier-free guidance, as the pipeline calls it; None if it does not say."""
        names = ("apply_cfg", "do_true_cfg", "do_classifier_free_guidance")
        return next((said for name in names if (said := self.says(name)) is not None), None)

    def says(self, name: str) -> bool | None:
        """A variable of the method, or else a property of the pipeline; None if there is neither."""
        found = self.variables.get(name, getattr(self.pipeline, name, None))
        return None if found is None else bool(found)


def rows_of(
    sample: torch.Tensor,
    conditions: int,
    caller: Caller | None,
    unconditional: Sequence[bool] | None = None,
    *,
    guidance: Guidance = Guidance(),
    look: bool = False,
) -> Rows:
    """How the batch is laid out.

    Args:
        sample: Noisy latents (B, C, h, w), as the denoiser is given them.
        conditions: How many there are.
        caller: The pipeline that gives them; None on a bare denoiser.
        unconditional: Of each part of the batch; by default found out.
        guidance: How guidance is laid out.
        look: Whether to look at the latents' values too: a part must repeat the one before, and nothing else.

    Raises:
        PowersteerError: The conditions do not fit the batch, or which is whose cannot be told.
    """
    batch = len(sample)
    if unconditional is not None:
        return _fitting(batch, conditions, len(unconditional), tuple(unconditional))
    if caller is None:
        return _bare(batch, conditions)
    _check_whole(sample, caller)
    parts, marks = _parts(batch, caller, guidance)
    if look and parts is not None:
        _check_repeats(sample, parts, caller)
    if conditions == 1:
        return Rows(batch, 1, parts, marks)
    if parts is None:
        raise PowersteerError(
            f"{type(caller.pipeline).__name__} does not show which rows of its batch are whose: give one condition, "
            "and one picture at a time"
        )
    return _fitting(batch, conditions, parts, marks)


def _fitting(batch: int, conditions: int, parts: int, marks: tuple[bool, ...] | None) -> Rows:
    images, rest = divmod(batch, parts)
    if rest or images % conditions:
        raise PowersteerError(
            f"{conditions} conditions for {images} images: give one, one for each prompt, or one for each image"
        )
    return Rows(batch, conditions, parts, marks)


def _bare(batch: int, conditions: int) -> Rows:
    if batch == 2 * conditions:
        return Rows(batch, conditions, 2, (True, False))
    if batch == conditions:
        return Rows(batch, conditions, 1, None)
    if conditions == 1:
        return Rows(batch, 1, None, None)
    raise PowersteerError(f"{conditions} conditions for a U-Net batch of {batch}: give 1, {batch}, or half as many")


def _parts(batch: int, caller: Caller, guidance: Guidance) -> tuple[int | None, tuple[bool, ...] | None]:
    """How many times the images are in the batch, and which time is unconditional."""
    guided, perturbed = caller.guided, caller.says("do_perturbed_attention_guidance")
    usual = ((True,) if guided else ()) + (False,) + ((False,) if perturbed else ())
    usual = usual[::-1] if guidance.last else usual
    if caller.latents is not None:
        parts, rest = divmod(batch, len(caller.latents))
        if rest:
            return None, None
    elif guided is None or batch % len(usual):
        return None, None
    else:
        parts = len(usual)
    if parts == 1 and guided and guidance.alone is not None:
        return parts, (guidance.alone,)
    return parts, usual if guided is not None and parts == len(usual) else None


def _check_whole(sample: torch.Tensor, caller: Caller) -> None:
    name = type(caller.pipeline).__name__
    if caller.variables.get("crops_coords") is not None or caller.variables.get("padding_mask_crop") is not None:
        raise PowersteerError(
            f"{name} repaints a crop (padding_mask_crop), which the condition does not know of: cut picture, mask and "
            "condition out yourself, and leave padding_mask_crop out"
        )
    latents = caller.latents
    if latents is not None and latents.ndim == sample.ndim == 4 and latents.shape[-2:] != sample.shape[-2:]:
        (height, width), (of_height, of_width) = sample.shape[-2:], latents.shape[-2:]
        raise PowersteerError(
            f"{name} denoises {height}×{width} of {of_height}×{of_width} latents at a time: which part of the "
            "condition that is cannot be told, so it cannot be steered"
        )


def _check_repeats(sample: torch.Tensor, parts: int, caller: Caller) -> None:
    channels = sample.shape[1] if caller.latents is None else caller.latents.shape[1]
    each = sample[:, :channels].unflatten(0, (parts, -1))
    # Where the images' number is not shown, a part that itself repeats may be several.
    images = each.shape[1] if caller.latents is None else 1
    periods = [size for size in range(1, images) if not images % size]
    if not torch.equal(each, each[:1].expand_as(each)) or any(_repeats(each[0], size) for size in periods):
        raise PowersteerError(
            f"{type(caller.pipeline).__name__} does not repeat its latents part by part, so which row has which "
            "condition cannot be told: give one condition, and one picture at a time"
        )


def _repeats(images: torch.Tensor, size: int) -> bool:
    of_size = images.unflatten(0, (-1, size))
    return torch.equal(of_size, of_size[:1].expand_as(of_size))
