"""A training run: base, data, network, the loop; and for few pairs, once more on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from powersteer.adapters import load_network
from powersteer.base import load_base
from powersteer.card import write_card
from powersteer.config import save_config
from powersteer.data.encode import EncodedPairs, Encoder, encode_pairs
from powersteer.data.pairs import Pairs, Size, Transform, Views, spread
from powersteer.data.stream import StreamedPairs, list_shards, read_shard
from powersteer.errors import PowersteerError
from powersteer.training.checkpoint import save_adapter
from powersteer.training.config import TrainConfig
from powersteer.training.dry_run import dry_run, free_memory
from powersteer.training.heldout import HeldOut
from powersteer.training.loop import PROBE, Source, TrainState, fit
from powersteer.training.setup import (
    base_dtype,
    check_splits,
    columns_of,
    conditioning,
    make_accelerator,
    new_network,
    picture_size,
    precision_of,
    read_pairs,
    update_count,
)

MIN_HELD_OUT = 4


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    adapter_dir: Path
    """The best weights by held-out loss (the last, without held-out pairs)."""
    step: int
    """Optimizer updates done."""
    best_step: int
    seconds: float
    """Time spent in the loop, over all its resumptions."""
    control_step: int | None
    """When the condition was first seen to be used."""
    interrupted: bool
    """Told to stop, be it in the last update."""
    main_process: bool = True
    """Of several, the one that speaks."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "adapter_dir": str(self.adapter_dir)}


def train(config: TrainConfig) -> TrainResult:
    """Train a steering network, or go on training it, in ``config.output_dir``.

    Raises:
        PowersteerError: The base, the data or the output folder is unusable, or the loss became non-finite; or the
            training pairs are held out.
    """
    check_splits(config)
    accelerator = make_accelerator(config)
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            save_config(config, config.output_dir / "train.yaml")
    except OSError as error:
        raise PowersteerError(f"cannot write to {config.output_dir}: {error.strerror}") from None
    accelerator.init_trackers("powersteer")

    pipe = load_base(config.pretrained_model_name_or_path)
    torch.nn.Module.to(pipe.unet, base_dtype(precision_of(config), accelerator.device.type))
    pipe.to(accelerator.device)
    network = new_network(config, pipe).to(accelerator.device)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pairs, held_out_pairs, all_pairs, count = _data(config, pipe, accelerator)
    held_out = None
    if held_out_pairs is not None:
        held_out = HeldOut(pipe, held_out_pairs, limit=config.max_validation_samples, accelerator=accelerator)

    steps = update_count(config, count, accelerator.num_processes)
    try:
        state, interrupted = fit(config, accelerator, pipe, network, pairs, held_out, config.output_dir, steps)
        if config.refit and not interrupted:
            interrupted = _refit(config, accelerator, pipe, all_pairs, state)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise PowersteerError(_memory_advice(config)) from None
    accelerator.end_training()
    if accelerator.is_main_process and not interrupted:
        write_card(config.output_dir)
    return TrainResult(
        config.output_dir,
        state.step,
        state.best_step,
        state.seconds,
        state.control_step,
        interrupted=interrupted,
        main_process=accelerator.is_main_process,
    )


def _data(config: TrainConfig, pipe: Any, accelerator: Accelerator) -> tuple[Source, EncodedPairs | None, Source, int]:
    """What to train on, what to hold out, both together; and the number of pairs (0: not known)."""
    factor = pipe.vae_scale_factor
    size, step = picture_size(config, pipe.unet.config, factor)
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    cache_dir = (config.cache_dir or config.output_dir / "cache") if config.cache_latents else None
    dtype = torch.float32 if precision_of(config) == "no" else torch.float16

    def encoded(pairs: Pairs) -> EncodedPairs:
        prompts = [config.fixed_prompt] if config.prompt_mix else []
        return encode_pairs(pipe, pairs, cache_dir, prompts=prompts, dtype=dtype, console=console)

    validation = None
    if config.validation_data_dir is not None:
        validation = encoded(read_pairs(config, config.validation_data_dir, size, step, factor, plain=True))
    if config.streaming:
        stream = _stream(config, pipe, size, encoded)
        return stream, validation, stream, 0
    folder = None if config.train_data_dir is None else Path(config.train_data_dir)
    pairs = read_pairs(config, folder, size, step, factor, plain=False)
    if not config.validation_split:
        everything = encoded(pairs)
        return everything, validation, everything, len(pairs)
    count = max(MIN_HELD_OUT, round(config.validation_split * len(pairs)))
    if len(pairs) < 2 * MIN_HELD_OUT:
        raise PowersteerError(
            f"{len(pairs)} pairs are too few to hold some out: give {2 * MIN_HELD_OUT} or more, or validation_split=0 "
            "refit=false patience=null"
        )
    held_out = spread(len(pairs), count)
    rest = [i for i in range(len(pairs)) if i not in set(held_out)]
    return encoded(pairs.subset(rest)), encoded(pairs.subset(held_out, plain=True)), encoded(pairs), len(rest)


def _stream(config: TrainConfig, pipe: Any, size: Size, encoded: Callable[[Pairs], EncodedPairs]) -> StreamedPairs:
    shards, columns = list_shards(str(config.train_data_dir)), columns_of(config)
    conditions = conditioning(config)
    transform = Transform(conditions.channels, conditions.kind, pipe.vae_scale_factor)
    first = islice(read_shard(shards[0], columns), PROBE)
    probe = Pairs(
        list(first),
        size,
        conditions.channels,
        kind=conditions.kind,
        default_prompt=config.default_prompt,
        vae_scale_factor=pipe.vae_scale_factor,
    )
    return StreamedPairs(
        shards,
        Encoder(pipe),
        encoded(probe),
        transform=transform,
        size=size,
        views=Views(config.random_flip, config.random_crops, config.smallest_crop),
        columns=columns,
        default_prompt=config.default_prompt,
    )


def _refit(config: TrainConfig, accelerator: Accelerator, pipe: Any, pairs: Source, found: TrainState) -> bool:
    """Train on all pairs for as many updates as were best; whether that was interrupted."""
    if found.best_step == 0:
        return False  # nothing learned was better than the prior, whose network is kept
    output_dir = config.output_dir / "refit"
    output_dir.mkdir(exist_ok=True)
    network = new_network(config, pipe).to(accelerator.device)
    accelerator.free_memory()
    _, interrupted = fit(config, accelerator, pipe, network, pairs, None, output_dir, found.best_step, "on all pairs")
    if not interrupted and accelerator.is_main_process:
        save_adapter(config.output_dir, load_network(output_dir))
    return interrupted


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _memory_advice(config: TrainConfig) -> str:
    estimate, batch = dry_run(config).memory.total, config.train_batch_size * config.gradient_accumulation_steps
    advice = f"gradient_checkpointing=true train_batch_size=1 gradient_accumulation_steps={batch}"
    if config.gradient_checkpointing and config.train_batch_size == 1:
        advice = "network=lite use_8bit_adam=true ema_decay=null, or a smaller resolution"
    return f"out of memory (estimate {estimate / 1e9:.1f} GB, free {free_memory() / 1e9:.1f} GB): add {advice}"
