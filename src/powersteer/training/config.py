"""What `powersteer train` can be told; names follow diffusers' training scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from powersteer.adapters.baselines import BASELINES
from powersteer.backbones.options import EMBEDDED_BASE, Base, BaseConfig, Revision, Variant
from powersteer.core.config import StrictConfig

PRESETS: dict[str, dict[str, Any]] = {
    # From forty pairs: some are held out to choose when to stop, then all are used. Uniform weights learn more from few
    # pairs than the method's head-heavy ones, and more again with gentle cut-outs and timesteps even in log-SNR
    # (docs/results.md).
    "few-shot": {
        "weights": "uniform",
        "validation_split": 0.2,
        "refit": True,
        "patience": 6,
        "validation_steps": 25,
        "random_flip": True,
        "random_crops": 3,
        "smallest_crop": 0.9,
        "log_snr_share": 0.4,
        "lr_scheduler": "cosine",
        "max_train_steps": 600,
        "adam_weight_decay": 0.05,
        "ema_decay": 0.99,
    },
    # The reference set-up of Huang, Li & Huang (ICML 2024).
    "paper": {
        "network": "paper",
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "train_batch_size": 16,
        "max_train_steps": None,
        "num_train_epochs": 16,
        "gradient_checkpointing": True,
        "prompt_mix": True,
        "proportion_empty_prompts": 0.0,
        "ema_decay": None,
    },
    "low-memory": {
        "network": "lite",
        "train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
        "use_8bit_adam": True,
        "ema_decay": None,
    },
}
"""What each preset sets; a key that is given all the same wins."""

TINY_LEARNING_RATE = 1e-3
"""The learning rate for uniform weights on powersteer-tiny (docs/results.md), whose widths are a fifth of Stable
Diffusion's."""


_BPS_KEYS = (
    "weights",
    "trainable_weights",
    "port_learning_rates",
    "hidden_channels",
    "up_channels",
    "ablation",
    "dropout",
)
NETWORK_KEYS = ("network", "weights", "trainable_weights", "hidden_channels", "up_channels", "ablation", "dropout")
"""What shapes a new network; with ``init_from``, the adapter's own shape holds."""

if TYPE_CHECKING:
    Network = str
else:
    Network = Literal[("paper", "lite", *BASELINES)]
"""``paper`` and ``lite`` are BPS."""

MAX_UPDATES = 10**9
Weight = Annotated[float, Field(ge=-1e4, le=1e4)]
Width = Annotated[int, Field(gt=0, le=65536)]
Side = Annotated[int, Field(gt=0, le=65536)]


class TrainConfig(StrictConfig):
    """One training run."""

    preset: Literal["few-shot", "paper", "low-memory"] | None = None
    """Set other keys at once; a key that you give yourself wins."""

    pretrained_model_name_or_path: Base = EMBEDDED_BASE
    variant: Variant = None
    revision: Revision = None
    base_config: BaseConfig = None
    init_from: str | None = None
    """Start from this adapter's weights: ``sketch``, a folder, or a model of the Hub."""
    network: Network = "paper"
    """Shape of the adapter: the paper's, or ``lite`` with a thirteenth of its parameters. The others are networks to
    compare with."""
    weights: Literal["head-heavy", "uniform"] | tuple[Weight, ...] = "head-heavy"
    """Integration weights of the steering: ``head-heavy``, ``uniform``, or one number per level of CP, then TP, then
    EP."""
    trainable_weights: bool = False
    """Train the integration weights, one per residual."""
    port_learning_rates: Literal["same", "head-heavy"] = "same"
    """Learning rates of the output convolutions. ``head-heavy`` multiplies each rate by what its integration weight
    would be: AdamW's step does not depend on the gradient's scale, so a weight of 16 also acts as a 16-fold rate."""
    hidden_channels: tuple[Width, ...] | None = None
    """Width of CP and TP at each level. The shape's own by default."""
    up_channels: tuple[Width, ...] | None = None
    """Width of EP at each level. The shape's own by default."""
    ablation: Literal["no-time", "added-once", "conditional-half", "no-latents", "blind"] | None = None
    """Leave something out: a part of the method, the latents of ControlNet (``no-latents``), or the condition of any
    network (``blind``)."""
    conditioning_channels: int | None = Field(default=None, gt=0, le=65536)
    """Channels of the condition: 1 (grey), 3 (RGB), 4 (RGBA: colour and structure), or a feature map's. By default what
    dataset.json says, else 1."""
    conditioning_kind: str | None = None
    """Kind of condition: sketch, segmentation, layout, … By default what dataset.json says, else sketch."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropout in the adapter's blocks."""

    train_data_dir: str | None = None
    """Folder of training pairs, in any layout that `powersteer data check` reads. With ``streaming``, shards: a folder,
    a pattern such as ``shards/{000..099}.tar``, or a URL of either."""
    dataset_name: str | None = None
    """Data set of the Hub to train on, instead of ``train_data_dir``."""
    dataset_config_name: str | None = None
    """Configuration of ``dataset_name``."""
    dataset_split: str = "train"
    """Split of ``dataset_name`` to train on."""
    streaming: bool = False
    """Read WebDataset shards in order, again and again; cache nothing."""
    image_column: str = "image"
    """Column of the pictures, where columns have names."""
    conditioning_image_column: str = "conditioning_image"
    """Column of the conditions."""
    caption_column: str = "text"
    """Column of the captions."""
    generated_caption_column: str = "generated_text"
    """Column of the generated captions, for ``prompt_mix``."""
    default_prompt: str | None = None
    """Caption of pairs that have none."""
    max_train_samples: int | None = Field(default=None, gt=0, le=MAX_UPDATES)
    """Maximum number of training pairs, evenly spread. All by default."""
    resolution: Side | tuple[Side, Side] | None = None
    """Size of the pictures in pixels: the side of a square, or [height, width]. The base's own by default."""
    aspect_ratio_buckets: bool = False
    """Train each picture at the size nearest in aspect ratio, with the area of ``resolution``."""
    random_flip: bool = False
    """Train on mirrored pairs too, as often as on plain ones."""
    random_crops: int = Field(default=0, ge=0, le=10_000)
    """Number of extra random crops per pair."""
    smallest_crop: float = Field(default=0.8, gt=0, le=1)
    """Smallest side of a crop, as a share of the picture's. Crops are enlarged to the full size, so lines grow thicker:
    by a fourth at 0.8."""
    cache_latents: bool = True
    """Encode pictures and captions once, and keep them."""
    cache_dir: Path | None = None
    """Folder for encoded pairs. ``output_dir/cache`` by default."""
    dataloader_num_workers: int = Field(default=0, ge=0, le=1024)
    """Number of processes that load data. 0 loads in the training process."""

    proportion_empty_prompts: float = Field(default=0.1, ge=0, le=1)
    """Probability of dropping the prompt, for classifier-free guidance."""
    proportion_empty_conditions: float = Field(default=0.0, ge=0, le=1)
    """Probability of dropping the condition: the adapter learns not to steer by a blank one."""
    prompt_mix: bool = False
    """Mix prompts as the method does: a third ``fixed_prompt``, a third the generated caption, a third the pair's own
    caption (half each where one is missing), drawn anew each time."""
    fixed_prompt: str = "a high-quality, detailed, and professional image"
    """Fixed prompt of ``prompt_mix``."""

    output_dir: Path
    """Folder for the adapter, checkpoints and logs. An interrupted run in it is resumed."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of pairs, and the noise."""
    max_train_steps: int | None = Field(default=1500, gt=0, le=MAX_UPDATES)
    """Number of optimizer updates. Wins over ``num_train_epochs`` if both are given."""
    num_train_epochs: int | None = Field(default=None, gt=0, le=MAX_UPDATES)
    """Number of passes over the pairs; replaces ``max_train_steps`` if given alone."""
    max_train_minutes: float | None = Field(default=None, gt=0, le=1e7)
    """Maximum training time in minutes. No limit by default."""
    train_batch_size: int = Field(default=16, gt=0, le=65536)
    """Samples per process and accumulation step."""
    gradient_accumulation_steps: int = Field(default=1, gt=0, le=65536)
    """Number of batches per optimizer update."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: a step takes about half as long again, with far less
    memory."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision to compute in. ``auto`` is bf16 where the hardware multiplies it natively. Trained weights stay in
    float32."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1e38)
    """Learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the learning rate changes over the run."""
    lr_warmup_steps: int = Field(default=50, ge=0, le=MAX_UPDATES)
    """Number of updates over which the learning rate rises to its full value."""
    use_8bit_adam: bool = False
    """Use the 8-bit AdamW of bitsandbytes; needs a GPU and the package."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """First beta of AdamW."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Second beta of AdamW."""
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Epsilon of AdamW."""
    adam_weight_decay: float = Field(default=0.01, ge=0, le=1000)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e12)
    """Clip gradients to this norm."""
    ema_decay: float | None = Field(default=0.998, ge=0, lt=1)
    """Decay of the running average of the weights, which is validated and saved. null turns it off."""
    log_snr_share: float = Field(default=0.0, ge=0, le=1)
    """Share of timesteps to draw evenly in log-SNR, not in t: more of them have little noise, where fine details are
    learned."""
    weighting_scheme: Literal["none", "logit_normal"] = Field(default="none", exclude_if=lambda value: value == "none")
    """How a base of flow matching draws its other times: evenly, or most often in the middle (Stable Diffusion 3)."""
    snr_gamma: float | None = Field(default=None, gt=0, le=1e12)
    """Gamma of the Min-SNR loss weighting; its authors use 5. Off by default."""

    validation_data_dir: Path | None = None
    """Folder of held-out pairs, to choose the best weights. Without held-out pairs the last weights are kept."""
    validation_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training pairs to hold out, instead of ``validation_data_dir``."""
    max_validation_samples: int = Field(default=256, gt=0, le=MAX_UPDATES)
    """Maximum number of held-out pairs to measure the loss on."""
    validation_steps: int = Field(default=100, gt=0, le=MAX_UPDATES)
    """Number of updates between validations."""
    validation_image_steps: int = Field(default=500, gt=0, le=MAX_UPDATES)
    """Number of updates between sheets of pictures (condition, generated, target)."""
    num_validation_images: int = Field(default=4, ge=0, le=1000)
    """Number of pictures on a sheet."""
    patience: int | None = Field(default=None, gt=0, le=MAX_UPDATES)
    """Stop after this many validations without a better one. Off by default."""
    refit: bool = False
    """Train again at the end on all pairs, the held-out ones too, for as many updates as were best."""

    checkpointing_steps: int = Field(default=500, gt=0, le=MAX_UPDATES)
    """Number of updates between checkpoints."""
    checkpoints_total_limit: int = Field(default=2, gt=0, le=MAX_UPDATES)
    """Number of checkpoints to keep; older ones are deleted."""
    resume_from_checkpoint: str | None = "latest"
    """Checkpoint to resume from: ``latest`` is the newest in ``output_dir``, if there is one; ``latest-intact`` the
    newest undamaged one; ``checkpoint-STEP`` that one. null refuses to resume."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Where to send curves and pictures, besides log.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The preset's keys, and of steps and epochs the one that is not given gives way, be it a default's."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        filled = dict(PRESETS.get(preset, {})) if isinstance(preset, str) else {}
        for given, other in (("num_train_epochs", "max_train_steps"), ("max_train_steps", "num_train_epochs")):
            if values.get(given) is not None and other not in values:
                filled[other] = None
        return filled | values

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # as YAML reads it

    @field_validator("resume_from_checkpoint")
    @classmethod
    def _known_checkpoint(cls, value: str | None) -> str | None:
        named = re.fullmatch(r"checkpoint-\d{1,12}", value or "", re.ASCII)
        if value is not None and value not in ("latest", "latest-intact") and not named:
            raise ValueError("give latest, latest-intact or checkpoint-<step>")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        own = [name for name in _BPS_KEYS if getattr(self, name) != type(self).model_fields[name].default]
        if self.ablation == "no-latents" and self.network != "controlnet":
            raise ValueError(f"ablation=no-latents is ControlNet's own: leave it out for network={self.network}")
        if self.ablation in ("no-latents", "blind"):
            own.remove("ablation")
        if own and self.network not in ("paper", "lite"):
            raise ValueError(f"{own[0]} is BPS's own: leave it out for network={self.network}")
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("give either train_data_dir or dataset_name")
        if self.dataset_name is None and self.asked("dataset_config_name", "dataset_split"):
            raise ValueError(
                "dataset_config_name and dataset_split are for dataset_name: train_data_dir is the folder of the pairs "
                "to train on"
            )
        if self.max_train_steps is None and self.num_train_epochs is None:
            raise ValueError("give max_train_steps or num_train_epochs")
        if self.validation_split and self.validation_data_dir is not None:
            raise ValueError("validation_split holds out training pairs: leave validation_data_dir out")
        if self.refit and not self.validation_split:
            raise ValueError("refit needs a validation_split, whose pairs it trains on in the end")
        if self.patience is not None and not (self.validation_split or self.validation_data_dir):
            raise ValueError("patience needs held-out pairs: give validation_data_dir or validation_split")
        if self.streaming and (self.validation_split or self.aspect_ratio_buckets or self.num_train_epochs):
            raise ValueError("streaming goes with neither validation_split, aspect_ratio_buckets nor num_train_epochs")
        if self.streaming and self.max_train_samples:
            raise ValueError("streaming takes all pairs of its shards: give fewer shards instead of max_train_samples")
        for name, value in self:
            if isinstance(value, str | Path) and "\0" in str(value):
                raise ValueError(f"{name} holds NUL, which no name does")
        return self

    def asked(self, *keys: str) -> list[str]:
        """Those of ``keys`` whose values somebody gave: they are neither the default nor the preset's."""
        preset = PRESETS.get(self.preset or "", {})
        defaults = {key: type(self).model_fields[key].default for key in keys}
        return [key for key in keys if getattr(self, key) not in (defaults[key], preset.get(key, defaults[key]))]

    def idle(self) -> list[str]:
        """What was asked for and has no effect beside the other settings, a line each."""
        held_out = self.validation_split or self.validation_data_dir is not None
        why = {
            "num_train_epochs": self.max_train_steps is not None and f"max_train_steps={self.max_train_steps} decides",
            "smallest_crop": not self.random_crops and "there are no cut-outs without random_crops",
            "fixed_prompt": not self.prompt_mix and "it is part of prompt_mix",
            "generated_caption_column": not self.prompt_mix and "generated captions are part of prompt_mix",
            "lr_warmup_steps": self.lr_scheduler == "constant"
            and "lr_scheduler=constant has no warm-up, constant_with_warmup has",
            "cache_dir": not self.cache_latents and "nothing is cached with cache_latents=false",
            "max_validation_samples": not held_out and "no pairs are held out",
            "validation_image_steps": not self.num_validation_images and "num_validation_images=0 makes no pictures",
        }
        told = {key: reason for key, reason in why.items() if reason and getattr(self, key)}
        return [f"{key}={getattr(self, key)} has no effect: {told[key]}" for key in self.asked(*told)]
