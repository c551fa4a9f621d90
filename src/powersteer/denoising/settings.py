"""What can be asked of `powersteer.denoising.generate`: settings, jobs, their ranges and defaults, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from powersteer.backbones.embedded import EMBEDDED_BASE
from powersteer.core.config import StrictConfig

GUIDANCE_SCALE = 3.0
"""Default strength of the text."""
NUM_INFERENCE_STEPS = 30
MAX_STEPS, MAX_GUIDANCE, MAX_SCALE = 1000, 1000, 1000
"""Anything above is a slip of the hand."""
Share = Annotated[float, Field(ge=0, le=1)]

Scheduler = Literal["ddim", "ddpm", "dpm++", "euler", "euler-a", "heun", "lcm", "pndm", "unipc"]
SCHEDULERS: dict[Scheduler, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Names of diffusers' classes."""

LAST_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=LAST_SEED)]
MAX_PICTURES = 100_000
"""The most pictures that an option of one command may ask for."""


class PictureJob(StrictConfig):
    """One picture to make; a manifest holds one a line."""

    prompt: str
    condition: tuple[Path, ...]
    """One picture for each adapter."""
    negative_prompt: str = ""
    seed: Seed = 0


class GenerateSettings(StrictConfig):
    """What is common to all pictures of a run; written into every PNG."""

    adapter: tuple[str, ...] = Field(default=("sketch",), min_length=1)
    """Embedded ones by name, folders, or models of the Hub; several of BPS, or one of another kind."""
    base: str = EMBEDDED_BASE
    num_inference_steps: int = Field(default=NUM_INFERENCE_STEPS, gt=0, le=MAX_STEPS)
    guidance_scale: float = Field(default=GUIDANCE_SCALE, ge=1, le=MAX_GUIDANCE)
    scheduler: Scheduler | None = None
    """The base's own by default."""
    scale: tuple[Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)], ...] = Field(default=(1.0,), min_length=1)
    """Strength of each adapter's steering, or one for all; 0 is the prior."""
    start: tuple[Share, ...] = Field(default=(0.0,), min_length=1)
    """When each sets in, from noise (0) to picture (1)."""
    end: tuple[Share, ...] = Field(default=(1.0,), min_length=1)
    init_image: Path | None = None
    """Start from this picture."""
    mask_image: Path | None = None
    """Repaint only where this is white."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """How far from ``init_image``: 1 forgets it."""
    prepared: bool = False
    """The conditions are those of training pairs: cropped as in training, never inverted or padded."""
