"""One batch of pictures: a pipeline's call, steered, and the schedulers it may have."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from powersteer.adapters.attach import attach
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.protocol import base_of
from powersteer.core.errors import NonFiniteError, PowersteerError, PowersteerWarning
from powersteer.core.files import reason_of
from powersteer.denoising.objective import objective_of
from powersteer.denoising.settings import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, SCHEDULERS, Scheduler


def steered_pictures(  # the pipeline's arguments and those of the steering, as diffusers' own calls have them
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
        model: The steering network, or several.
        prompts: One prompt a picture.
        condition: One condition for all, or one for each prompt; with several networks, a list of such.
        seeds: One seed a picture: the same seed starts from the same noise, steered or not.
        negative_prompt: Negative prompt; one, or one a picture.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of the text, as in diffusers; 1 is none.
        scale: Strength of the steering; see `powersteer.steer`.
        start: See `powersteer.steer`.
        end: See `powersteer.steer`.
        **inputs: Further arguments of the pipeline.

    Raises:
        PowersteerError: No prompts, not as many seeds as prompts, steps that the scheduler cannot take, or
            what `powersteer.steer` refuses.
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
    _check_finite(result.images, run, num_inference_steps)
    flagged = sum(getattr(result, "nsfw_content_detected", None) or [])
    if flagged:
        told = f"the base's safety checker made {flagged} of {len(prompts)} pictures black"
        warnings.warn(told, PowersteerWarning, stacklevel=2)
    made, processor = result.images, run.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(made)) if wanted == "pil" else made


def _steering(
    pipe: Any, model: Adapter | Sequence[Adapter] | None, condition: Any, strength: dict[str, Any]
) -> AbstractContextManager[None]:
    """`attach`, if there is anything to steer with."""
    if model is None or (not isinstance(model, torch.nn.Module) and not model):
        return nullcontext()
    return attach(pipe, model, condition, **strength)


def _check_finite(made: Any, pipe: Any, num_inference_steps: int) -> None:
    if isinstance(made, torch.Tensor) and not bool(made.isfinite().all()):
        scheduler, dtype = type(pipe.scheduler).__name__, str(base_of(pipe).module.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"the pictures are not finite numbers, of {num_inference_steps} steps of {scheduler} in {dtype}: take more "
            "steps, another scheduler, or float32 weights"
        )


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


def make_scheduler(name: Scheduler, own: Any) -> Any:
    """A scheduler by name, for the noise that the base's own was made for.

    Raises:
        PowersteerError: It does not sample what the base predicts.
    """
    made = getattr(diffusers, SCHEDULERS[name]).from_config(own.config)
    predicted, sampled = (objective_of(scheduler).prediction_type for scheduler in (own, made))
    if predicted != sampled:
        raise PowersteerError(
            f"scheduler={name} samples from {sampled}, and the base predicts {predicted}: leave scheduler out"
        )
    return made
