"""What a configuration would train, and the memory it would take, without loading weights or data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.protocol import Adapter
from powersteer.adapters.registry import make_adapter
from powersteer.backbones.load import base_configs
from powersteer.core.errors import PowersteerError, PowersteerWarning
from powersteer.core.files import reason_of
from powersteer.training.config import TrainConfig
from powersteer.training.memory import MemoryEstimate, Step, estimate_memory
from powersteer.training.setup import Setup, autocast_dtype, base_dtype, check_splits, read_pairs, update_count


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found."""

    config: dict[str, Any]
    """Every setting, with presets and defaults filled in."""
    facts: dict[str, Any]
    memory: MemoryEstimate
    """The memory that one process needs."""
    free_memory: int
    """Free bytes where it would run: on the GPU, or else in main memory."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        memory = {**self.memory.rows, "total": self.memory.total, "free": self.free_memory}
        return {"config": self.config, **self.facts, "memory": memory}


def dry_run(config: TrainConfig, processes: int = 1) -> DryRun:
    """Resolve a configuration; of the data, only rows are counted, and only where epochs are asked for.

    Args:
        config: The configuration.
        processes: How many it would be launched with.

    Raises:
        PowersteerError: There is no such base, the resolution does not fit it, or the training pairs are held out.
    """
    check_splits(config)
    for line in config.idle():
        warnings.warn(line, PowersteerWarning, stacklevel=2)
    base = _Base.read(config.pretrained_model_name_or_path)
    try:
        setup = Setup.read(config, base.unet, base.scheduler, base.vae_scale_factor)
    except (RuntimeError, TypeError, ValueError) as error:  # of a schedule that cannot be
        raise _unreadable(base.name, error) from None
    pairs: int | None = None
    if config.max_train_steps is None:
        folder = None if config.train_data_dir is None else Path(config.train_data_dir)
        pairs = len(read_pairs(setup, folder, plain=False))
    unet, others = base.imagined()
    model = _imagined_adapter(setup, unet)
    facts = _shapes(setup, base, model, [unet, *others]) | _amounts(setup, pairs, processes)
    if isinstance(model, BPSModel):
        facts["residuals"] = len(model.down_outputs) + 1 + len(model.up_outputs)
    if pairs is not None:
        facts["pairs"] = pairs
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    step = Step(
        batch_size=config.train_batch_size,
        size=setup.latents,
        text_length=base.text_encoders[0][1].max_position_embeddings,
        base_dtype=base_dtype(setup.precision, device_type),
        precision=autocast_dtype(setup.precision),
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_accumulation=config.gradient_accumulation_steps > 1,
        use_8bit_adam=config.use_8bit_adam,
        ema=config.ema_decay is not None,
        other_base_bytes=sum(4 * p.numel() for module in others for p in module.parameters()),
        device_type=device_type,
    )
    memory = estimate_memory(base.unet, setup.network, step)
    return DryRun(config.model_dump(mode="json"), facts, memory, free_memory())


def _imagined_adapter(setup: Setup, unet: Any) -> Adapter:
    with torch.device("meta"):
        try:
            return make_adapter(unet, **setup.network)
        except ValueError as error:
            raise PowersteerError(f"'weights': {error}") from None


def _shapes(setup: Setup, base: _Base, model: Adapter, frozen: Sequence[Any]) -> dict[str, Any]:
    """What goes in, and sizes of the networks."""
    network, latents = setup.network, setup.latents
    return {
        "base": base.name,
        "pictures": [3, *setup.size],
        "latents": [base.unet["in_channels"], *latents],
        "condition_kind": network["conditioning"]["kind"],
        "conditions": [network["conditioning_channels"], *(side * network["pixel_unshuffle"] for side in latents)],
        "network": setup.config.network,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen_parameters": sum(p.numel() for module in frozen for p in module.parameters()),
        "precision": setup.precision,
    }


def _amounts(setup: Setup, pairs: int | None, processes: int) -> dict[str, Any]:
    """How much is learned."""
    config = setup.config
    updates = update_count(config, pairs or 0, processes)
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    return {
        "processes": processes,
        "effective_batch_size": batch,
        "optimizer_updates": updates,
        "samples_seen": updates * batch,
    }


def free_memory() -> int:
    """Bytes, on the GPU where there is one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


@dataclass(frozen=True)
class _Base:
    """What a base's configurations say."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoders: list[tuple[Any, Any]]
    """(class, configuration)."""

    @classmethod
    def read(cls, name: str) -> _Base:
        """Read a base's configurations; see `powersteer.backbones.load.base_configs`."""
        configs = base_configs(name)
        unet, vae, scheduler = (configs[part] for part in ("unet", "vae", "scheduler"))
        try:
            text: list[tuple[Any, Any]] = [(CLIPTextModel, CLIPTextConfig.from_dict(configs["text_encoder"]))]
            if unet.get("addition_embed_type") == "text_time":
                text.append((CLIPTextModelWithProjection, CLIPTextConfig.from_dict(configs["text_encoder_2"])))
        except Exception as error:  # transformers raises whatever settings make it meet
            raise _unreadable(name, error) from None
        return cls(name, unet, vae, scheduler, text)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def imagined(self) -> tuple[Any, list[Any]]:
        """The U-Net, and the other networks, without memory for their weights."""
        with torch.device("meta"):
            try:
                unet = UNet2DConditionModel.from_config(self.unet)
                others = [AutoencoderKL.from_config(self.vae), *(kind(config) for kind, config in self.text_encoders)]
            except Exception as error:  # as above, and diffusers too
                raise _unreadable(self.name, error) from None
        return unet, others


def _unreadable(name: str, error: Exception) -> PowersteerError:
    return PowersteerError(f"cannot read the base '{name}': {reason_of(error)}")
