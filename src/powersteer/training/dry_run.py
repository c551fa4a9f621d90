"""What a configuration would train, and the memory it would take, without loading weights or data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.load import imagine_base
from powersteer.backbones.options import base_options
from powersteer.backbones.protocol import PipelineBackbone, base_of
from powersteer.core.errors import PowersteerWarning
from powersteer.training.config import TrainConfig
from powersteer.training.memory import MemoryEstimate, Step, estimate_memory
from powersteer.training.setup import (
    Setup,
    autocast_dtype,
    base_dtype,
    check_base,
    check_splits,
    read_pairs,
    untrained,
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
        PowersteerError: There is no such base, it cannot be trained on, the resolution does not fit it, or the training
            pairs are held out.
    """
    check_splits(config)
    for line in config.idle():
        warnings.warn(line, PowersteerWarning, stacklevel=2)
    pipe = imagine_base(config.pretrained_model_name_or_path, **base_options(config))
    check_base(pipe)
    base, setup = base_of(pipe), Setup.of(config, pipe)
    pairs: int | None = None
    if config.max_train_steps is None:
        folder = None if config.train_data_dir is None else Path(config.train_data_dir)
        pairs = len(read_pairs(setup, folder, plain=False))
    with torch.device("meta"):
        model = untrained(setup, base)
    facts = _shapes(setup, base, model) | _amounts(setup, pairs, processes)
    if isinstance(model, BPSModel):
        facts["residuals"] = len(model.down_outputs) + 1 + len(model.up_outputs)
    if pairs is not None:
        facts["pairs"] = pairs
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    step = Step(
        batch_size=config.train_batch_size,
        size=setup.latents,
        text_length=base.tokens,
        base_dtype=base_dtype(setup.precision, device_type),
        precision=autocast_dtype(setup.precision),
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_accumulation=config.gradient_accumulation_steps > 1,
        use_8bit_adam=config.use_8bit_adam,
        ema=config.ema_decay is not None,
        other_base_bytes=4 * (_count(base.parts.values()) - _count([base.module])),
        device_type=device_type,
    )
    memory = estimate_memory(base, setup.network, step)
    return DryRun(config.model_dump(mode="json"), facts, memory, free_memory())


def _shapes(setup: Setup, base: PipelineBackbone, model: Adapter) -> dict[str, Any]:
    """What goes in, and sizes of the networks."""
    network, latents = setup.network, setup.latents
    return {
        "base": setup.config.pretrained_model_name_or_path,
        "pictures": [3, *setup.size],
        "latents": [base.pipe.vae.config["latent_channels"], *latents],
        "condition_kind": network["conditioning"]["kind"],
        "conditions": [network["conditioning_channels"], *(side * network["pixel_unshuffle"] for side in latents)],
        "network": setup.config.network,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen_parameters": _count(base.parts.values()),
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


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
