"""What can be asked of `powersteer.denoising.sampling`: settings, jobs, their ranges and defaults, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from powersteer.backbones.options import EMBEDDED_BASE, Base, BaseConfig, Revision, Variant
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


OPTIONS = {"num_inference_steps": "--steps"}
"""Options of `powersteer generate` that are not called like their field."""


class PictureJob(StrictConfig):
    """One picture to make; each line of a manifest holds one."""

    prompt: str
    """Prompt."""
    condition: tuple[Path, ...]
    """Condition to follow: a picture (PNG, JPEG, …) or features (.npy). One per adapter."""
    negative_prompt: str = ""
    """Negative prompt."""
    seed: Seed = 0
    """Seed of the noise. Several pictures take this seed and the next ones."""


class GenerateSettings(StrictConfig):
    """What is common to all pictures of a run; written into every PNG."""

    adapter: tuple[str, ...] = Field(default=("sketch",), min_length=1)
    """Adapter: an embedded one by name, a folder that `train` wrote, or a model of the Hub (user/name). Several BPS
    adapters, or one of another kind."""
    base: Base = EMBEDDED_BASE
    variant: Variant = None
    revision: Revision = None
    base_config: BaseConfig = None
    num_inference_steps: int = Field(default=NUM_INFERENCE_STEPS, gt=0, le=MAX_STEPS)
    """Number of denoising steps."""
    guidance_scale: float = Field(default=GUIDANCE_SCALE, ge=1, le=MAX_GUIDANCE)
    """Guidance scale: strength of the prompt. 1 turns guidance off."""
    scheduler: Scheduler | None = None
    """Scheduler. The base's own by default."""
    scale: tuple[Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)], ...] = Field(default=(1.0,), min_length=1)
    """Strength of the steering: one value per adapter, or one for all. 0 turns steering off."""
    start: tuple[Share, ...] = Field(default=(0.0,), min_length=1)
    """When steering starts, as a share of the denoising: 0 is pure noise, 1 is the finished picture. One value per
    adapter, or one for all."""
    end: tuple[Share, ...] = Field(default=(1.0,), min_length=1)
    """When steering ends, as a share of the denoising. One value per adapter, or one for all."""
    init_image: Path | None = None
    """Start from this picture instead of noise."""
    mask_image: Path | None = None
    """Repaint only where this picture is white."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """How much to change the init image: 1 ignores it."""
    prepared: bool = False
    """Read conditions as training does: crop them, never invert or pad them."""
