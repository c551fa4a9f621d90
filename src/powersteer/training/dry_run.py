"""What a configuration would train, and the memory it would take, without loading weights or data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from powersteer.adapters.attach import make_adapter
from powersteer.adapters.bps.model import BPSModel
from powersteer.backbones.load import base_configs
from powersteer.core.errors import PowersteerError, PowersteerWarning
from powersteer.core.files import reason_of
from powersteer.training.config import TrainConfig
from powersteer.training.memory import MemoryEstimate, estimate_memory
from powersteer.training.setup import (
    autocast_dtype,
    base_dtype,
    check_splits,
    network_arguments,
    picture_size,
    precision_of,
    read_pairs,
    update_count,
)


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
    unet, vae, scheduler, text_encoders = _base_configs(config.pretrained_model_name_or_path)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    size, step = picture_size(config, unet, factor)
    latents = (size[0] // factor, size[1] // factor)
    precision, device_type = precision_of(config), "cuda" if torch.cuda.is_available() else "cpu"
    network = network_arguments(config, scheduler.get("prediction_type", "epsilon"), factor)
    with torch.device("meta"):
        try:
            frozen: Any = UNet2DConditionModel.from_config(unet)
            others: list[Any] = [AutoencoderKL.from_config(vae), *(kind(encoder) for kind, encoder in text_encoders)]
        except Exception as error:  # diffusers and transformers raise whatever settings make them meet
            raise _unreadable(config.pretrained_model_name_or_path, error) from None
        try:
            model = make_adapter(frozen, **network)
        except ValueError as error:
            raise PowersteerError(f"'weights': {error}") from None
    pairs: int | None = None
    if config.max_train_steps is None:
        folder = None if config.train_data_dir is None else Path(config.train_data_dir)
        pairs = len(read_pairs(config, folder, size, step, factor, plain=False))
    updates = update_count(config, pairs or 0, processes)
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {
        "base": config.pretrained_model_name_or_path,
        "pictures": [3, *size],
        "latents": [unet["in_channels"], *latents],
        "condition_kind": network["conditioning"]["kind"],
        "conditions": [network["conditioning_channels"], *(side * network["pixel_unshuffle"] for side in latents)],
        "network": config.network,
        "trainable_parameters": trainable,
        "frozen_parameters": sum(p.numel() for module in (frozen, *others) for p in module.parameters()),
        "precision": precision,
        "processes": processes,
        "effective_batch_size": batch,
        "optimizer_updates": updates,
        "samples_seen": updates * batch,
    }
    if isinstance(model, BPSModel):
        facts["residuals"] = len(model.down_outputs) + 1 + len(model.up_outputs)
    if pairs is not None:
        facts["pairs"] = pairs
    memory = estimate_memory(
        unet,
        network,
        batch_size=config.train_batch_size,
        size=latents,
        text_length=text_encoders[0][1].max_position_embeddings,
        base_dtype=base_dtype(precision, device_type),
        precision=autocast_dtype(precision),
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_accumulation=config.gradient_accumulation_steps > 1,
        use_8bit_adam=config.use_8bit_adam,
        ema=config.ema_decay is not None,
        other_base_bytes=sum(4 * p.numel() for module in others for p in module.parameters()),
        device_type=device_type,
    )
    return DryRun(config.model_dump(mode="json"), facts, memory, free_memory())


def free_memory() -> int:
    """Bytes, on the GPU where there is one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def _base_configs(name_or_path: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    """Configurations of U-Net, VAE, scheduler and text encoders."""
    configs = base_configs(name_or_path)
    unet, vae, scheduler = (configs[part] for part in ("unet", "vae", "scheduler"))
    try:
        text: list[tuple[Any, Any]] = [(CLIPTextModel, CLIPTextConfig.from_dict(configs["text_encoder"]))]
        if unet.get("addition_embed_type") == "text_time":
            text.append((CLIPTextModelWithProjection, CLIPTextConfig.from_dict(configs["text_encoder_2"])))
    except Exception as error:  # as above
        raise _unreadable(name_or_path, error) from None
    return unet, vae, scheduler, text


def _unreadable(name: str, error: Exception) -> PowersteerError:
    return PowersteerError(f"cannot read the base '{name}': {reason_of(error)}")
