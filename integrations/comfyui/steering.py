"""Steering of ComfyUI's U-Net: `powersteer.adapters.attach` in a wrapper of each call of the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from powersteer import BPSModel, PowersteerError
from powersteer.adapters.attach import attach, check_fits
from powersteer.conditions import to_condition
from powersteer.conditions.kind import KINDS

UNCONDITIONAL = 1
"""How ComfyUI marks a chunk of the negative prompt in ``cond_or_uncond``; 0 is the prompt's."""


def condition_of(adapter: BPSModel, image: torch.Tensor, latents: tuple[int, int]) -> torch.Tensor:
    """ComfyUI's image as the adapter reads it: (N, C, H, W).

    Sketches of dark lines on light are inverted. Pictures are scaled to the latents' size; label maps without
    interpolation.

    Args:
        adapter: The adapter.
        image: (N, height, width, 3 or 4) in [0, 1].
        latents: (height, width).

    Raises:
        PowersteerError: The adapter reads something else than grey, RGB or RGBA pictures, or the image has no alpha.
    """
    channels, said = adapter.config["conditioning_channels"], adapter.config["conditioning"] or {}
    kind = KINDS.find(said.get("kind", "sketch"))
    height, width = (adapter.config["pixel_unshuffle"] * side for side in latents)
    picture = image.movedim(-1, 1).float()
    if channels == 1:
        grey = torch.tensor([0.299, 0.587, 0.114]).to(picture)
        picture = (picture[:, :3] * grey[:, None, None]).sum(1, keepdim=True)
        if kind.line_art and picture.mean() > 0.5:
            picture = 1 - picture
    elif channels not in (3, 4) or picture.shape[1] < channels:
        raise PowersteerError(f"the adapter reads {channels} channels, the image has {picture.shape[1]}")
    how: dict[str, Any] = {"mode": "bilinear", "antialias": True}
    if kind.resampling == Image.Resampling.NEAREST:
        how = {"mode": "nearest-exact"}
    if tuple(picture.shape[-2:]) != (height, width):
        picture = F.interpolate(picture, (height, width), **how)
    return to_condition(picture[:, :channels].clamp(0, 1), channels)


def steered(
    patcher: Any,
    adapter: BPSModel,
    image: torch.Tensor,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    *,
    steer_unconditional: bool = True,
) -> Any:
    """A clone of ComfyUI's model that denoises under the condition; several may be chained.

    Args:
        patcher: A ``ModelPatcher``.
        adapter: The steering network.
        image: (N, height, width, channels): one for all pictures, or one for each picture of the batch.
        strength: 0 is the prior.
        start: Where steering sets in, from noise (0) to picture (1), by the timestep.
        end: Where it ends.
        steer_unconditional: Whether the negative prompt's half is steered too.

    Raises:
        PowersteerError: The adapter does not fit the model.
    """
    check_fits(adapter, patcher.model.diffusion_model)
    made = patcher.clone()
    inner: Callable[..., torch.Tensor] | None = made.model_options.get("model_function_wrapper")

    def wrapper(apply_model: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        model, noisy, sigma = made.model, given["input"], given["timestep"]
        way = 1 - model.model_sampling.timestep(sigma).float().flatten()[0].item() / 1000
        steering: AbstractContextManager[None] = nullcontext()
        if strength and way >= start and (way < end or end == 1):
            condition = condition_of(adapter, image, tuple(noisy.shape[-2:]))
            marks = [mark == UNCONDITIONAL for mark in given["cond_or_uncond"]]
            images = len(noisy) // len(marks)
            if len(condition) not in (1, images):
                raise PowersteerError(
                    f"{len(condition)} condition images for {images} pictures: give one, or one for each"
                )
            both = {"steer_unconditional": steer_unconditional, "unconditional": marks}
            steering = attach(model.diffusion_model, adapter.to(noisy.device), condition, strength, **both)
        with steering:
            if inner is not None:
                return inner(apply_model, given)
            return apply_model(noisy, sigma, **given["c"])

    made.set_model_unet_function_wrapper(wrapper)
    return made
