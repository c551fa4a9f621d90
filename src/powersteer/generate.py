"""From a drawing and a prompt to pictures in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from powersteer.base import EMBEDDED_BASE, load_adapter, load_base
from powersteer.conditions.sketch import open_picture, sketch_condition
from powersteer.errors import PowersteerError
from powersteer.model import BPSModel
from powersteer.pictures import from_pil, save_grid
from powersteer.steering import Condition, check_fits, steer

GUIDANCE_SCALE = 3.0
"""Default strength of the text."""
NUM_INFERENCE_STEPS = 30


@dataclass(frozen=True)
class GenerateSettings:
    """What a picture was made with; written into its PNG."""

    prompt: str
    condition: str
    adapter: str = "sketch"
    base: str = EMBEDDED_BASE
    negative_prompt: str = ""
    seed: int = 0
    num_images: int = 4
    num_inference_steps: int = NUM_INFERENCE_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    scale: float = 1.0


def generate(settings: GenerateSettings, out_dir: Path) -> list[Path]:
    """Make the pictures, one seed each, and a grid: condition | pictures.

    Returns:
        The pictures' files, then the grid's.

    Raises:
        PowersteerError: Empty prompt, unreadable condition, missing base or adapter, unwritable folder.
    """
    if not settings.prompt.strip():
        raise PowersteerError("the prompt is empty: say what the drawing shows, such as --prompt 'a fox'")
    drawing = open_picture(Path(settings.condition))
    model = load_adapter(settings.adapter)
    pipe = load_base(settings.base)
    check_fits(model, pipe.unet)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if model.config["conditioning_channels"] == 1:
        condition, inverted = sketch_condition(drawing, (side, side))
    else:
        condition, inverted = drawing.resize((side, side), Image.Resampling.LANCZOS), False
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        pictures = steered_pictures(
            pipe,
            model,
            [settings.prompt] * settings.num_images,
            condition,
            seeds=range(settings.seed, settings.seed + settings.num_images),
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            scale=settings.scale,
        )
        files = [
            _save(picture, out_dir, {**asdict(settings), "seed": settings.seed + i, "inverted": inverted})
            for i, picture in enumerate(pictures)
        ]
        shown = [from_pil(condition), *[from_pil(picture) for picture in pictures]]
        save_grid(torch.stack(shown), out_dir / "grid.png", columns=len(shown), scale=2)
    except OSError as error:
        raise PowersteerError(f"cannot write to {out_dir}: {error.strerror}") from None
    return [*files, out_dir / "grid.png"]


def steered_pictures(
    pipe: StableDiffusionPipeline,
    model: BPSModel | None,
    prompts: Sequence[str],
    condition: Condition | None,
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    scale: float = 1.0,
) -> list[Image.Image]:
    """One picture for each prompt and seed; without a model, the prior's.

    Args:
        pipe: The frozen base.
        model: The steering network.
        prompts: One prompt a picture.
        condition: One condition for all, or one for each prompt.
        seeds: One seed a picture: the same seed starts from the same noise, steered or not.
        negative_prompt: What to keep away from.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of the text, as in diffusers; 1 is none.
        scale: Strength of the steering.
    """
    generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]

    def run() -> list[Image.Image]:
        made: Any = pipe(
            list(prompts),
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        )
        return made.images

    if model is None or condition is None:
        return run()
    with steer(pipe, model, condition, scale):
        return run()


def _save(picture: Image.Image, out_dir: Path, settings: dict[str, object]) -> Path:
    """Write a PNG that carries its settings; an existing picture is never overwritten."""
    number = 0
    while (path := out_dir / f"{number:05d}-seed{settings['seed']}.png").exists():
        number += 1
    metadata = PngInfo()
    metadata.add_text("powersteer", json.dumps(settings))
    picture.save(path, pnginfo=metadata)
    return path
