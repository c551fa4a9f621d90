"""What `powersteer train` can be told; names follow diffusers' training scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from powersteer.base import EMBEDDED_BASE
from powersteer.config import StrictConfig


class TrainConfig(StrictConfig):
    """One training run."""

    pretrained_model_name_or_path: str = EMBEDDED_BASE
    """The frozen base: ``powersteer-tiny``, a folder in diffusers' layout, or a model of the Hub."""
    train_data_dir: Path
    """A folder of pairs; `powersteer data check` says what it holds, and which layouts can be read."""
    validation_data_dir: Path | None = None
    """Held-out pairs, on which the best weights are chosen; without it, the last weights are kept."""
    output_dir: Path
    cache_dir: Path | None = None
    """Where encoded pairs are kept; ``output_dir/cache`` when not given."""
    image_column: str = "image"
    conditioning_image_column: str = "conditioning_image"
    caption_column: str = "text"
    default_prompt: str | None = None
    """Caption of pairs that have none."""
    max_train_samples: int | None = Field(default=None, gt=0)
    conditioning_channels: Literal[1, 3] = 1
    conditioning_kind: str = "sketch"
    weights: Literal["head-heavy", "uniform"] = "head-heavy"
    """Integration weights of the steering."""

    learning_rate: float = Field(default=1e-4, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_steps: int = Field(default=50, ge=0)
    """Counted in optimizer updates."""
    train_batch_size: int = Field(default=16, gt=0)
    max_train_steps: int = Field(default=1500, gt=0)
    max_train_minutes: float | None = Field(default=None, gt=0)
    """Stop at this time, if it comes before ``max_train_steps``."""
    adam_weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    proportion_empty_prompts: float = Field(default=0.1, ge=0, le=1)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """``auto``: bf16 where the hardware multiplies it natively. The trained weights stay in float32."""
    seed: int = 0

    validation_steps: int = Field(default=100, gt=0)
    checkpointing_steps: int = Field(default=500, gt=0)
    checkpoints_total_limit: int = Field(default=2, gt=0)
    resume_from_checkpoint: Literal["latest"] | None = "latest"
    """``latest`` goes on from the newest checkpoint in ``output_dir``, if there is one."""
