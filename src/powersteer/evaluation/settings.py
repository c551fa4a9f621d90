"""What `powersteer evaluate` can be asked: settings, their ranges and defaults, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from powersteer.backbones.options import EMBEDDED_BASE, Base, BaseConfig, Revision, Variant
from powersteer.core.config import StrictConfig
from powersteer.denoising.settings import (
    GUIDANCE_SCALE,
    MAX_GUIDANCE,
    MAX_PICTURES,
    MAX_STEPS,
    NUM_INFERENCE_STEPS,
    Scheduler,
)

FeatureName = Literal["clip", "hed", "inception"]


class MeasureSettings(StrictConfig):
    """How pictures are measured."""

    features: tuple[FeatureName, ...] | None = None
    """Features to compare distributions of pictures by. By default clip, where there is one."""
    clip: str | None = None
    """CLIP in transformers' format, or a base that has one. The base's own by default."""
    inception_weights: Path | None = None
    """File with Inception's weights. Downloaded by default."""
    lpips: bool = False
    """Measure LPIPS too; downloads its weights."""
    extractor: str | None = None
    """Extractor that finds edges or labels in pictures, to compare them with the condition's: hed, canny, model, …"""
    extractor_model: str | None = None
    """Model of the extractor, if it takes one."""
    batch_size: int = Field(default=20, gt=0, le=10_000)
    """Number of pictures to make or measure at once."""


class EvaluateSettings(MeasureSettings):
    """What is evaluated, and how pictures are made."""

    data: Path
    """Folder of pairs. Of a data set with splits, the held-out one is used."""
    adapter: str | None = "sketch"
    """Adapter to evaluate: 'sketch', a folder that `train` wrote, or a model of the Hub (user/name). 'none' evaluates
    the base alone."""
    base: Base = EMBEDDED_BASE
    variant: Variant = None
    revision: Revision = None
    base_config: BaseConfig = None
    pairs: int | None = Field(default=None, ge=2, le=MAX_PICTURES)
    """Number of held-out pairs to use, evenly spread. All by default."""
    pictures: int = Field(default=120, ge=0, le=MAX_PICTURES)
    """Number of pictures of each kind to make, evenly spread over the pairs. 0 makes none and measures the denoising
    only."""
    draws: int = Field(default=8, gt=0, le=10_000)
    """Number of draws of log-SNR and noise per pair, to measure the information."""
    diversity: int = Field(default=4, ge=0, le=MAX_PICTURES)
    """Number of conditions to make pictures of with several seeds. 0 for none."""
    diversity_seeds: int = Field(default=8, ge=2, le=1000)
    """Number of seeds for each of these conditions."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the noise, and of the first picture."""
    num_inference_steps: int = Field(default=NUM_INFERENCE_STEPS, gt=0, le=MAX_STEPS)
    """Number of denoising steps."""
    guidance_scale: float = Field(default=GUIDANCE_SCALE, ge=1, le=MAX_GUIDANCE)
    """Guidance scale: strength of the prompt. 1 turns guidance off."""
    scheduler: Scheduler | None = None
    """Scheduler. The base's own by default."""
    save_pictures: Path | None = None
    """Folder to write every picture, a grid and the spread over seeds to."""
