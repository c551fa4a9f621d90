"""The training loop, top to bottom: the denoising loss of the steered U-Net, the base frozen."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from powersteer.base import load_base
from powersteer.conditions.kinds import conditioning_record
from powersteer.config import save_config
from powersteer.data.encode import EncodedPairs, encode_pairs
from powersteer.data.layouts import Columns
from powersteer.data.pairs import Pairs
from powersteer.errors import PowersteerError
from powersteer.hardware import native_precision
from powersteer.model import BPSModel
from powersteer.steering import steer
from powersteer.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from powersteer.training.config import TrainConfig
from powersteer.training.heldout import HeldOut
from powersteer.training.objective import denoising_target


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    adapter_dir: Path
    """The best weights by held-out loss (the last, without validation data)."""
    step: int
    """Optimizer updates done."""
    best_step: int
    seconds: float
    """Time spent in the loop, over all its resumptions."""
    interrupted: bool


def train(config: TrainConfig) -> TrainResult:
    """Train a steering network, or go on training it, in ``config.output_dir``.

    Raises:
        PowersteerError: The base, the data or the output folder is unusable, or the loss became non-finite.
    """
    # Accelerate keeps the first precision for the whole process; an earlier run here may have had another.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    accelerator = Accelerator(mixed_precision=_precision(config.mixed_precision))
    try:
        save_config(config, config.output_dir / "train.yaml")
    except OSError as error:
        raise PowersteerError(f"cannot write to {config.output_dir}: {error.strerror}") from None

    pipe = load_base(config.pretrained_model_name_or_path).to(accelerator.device)
    train_pairs = _encode(config, pipe, config.train_data_dir, config.max_train_samples)
    held_out = None
    if config.validation_data_dir is not None:
        held_out = HeldOut(pipe, _encode(config, pipe, config.validation_data_dir, None))

    torch.manual_seed(config.seed)
    model = BPSModel.from_unet(
        pipe.unet,
        conditioning_channels=config.conditioning_channels,
        pixel_unshuffle=pipe.vae_scale_factor,
        weights=config.weights,
        prediction_type=pipe.scheduler.config.prediction_type,
        conditioning=conditioning_record(config.conditioning_kind),
    )
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.adam_weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    network: BPSModel = accelerator.unwrap_model(model)
    parameters = [p for p in network.parameters() if p.requires_grad]
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )

    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "best_step": 0, "best_loss": float("inf")}
    checkpoints = list_checkpoints(config.output_dir)
    if config.resume_from_checkpoint == "latest" and checkpoints:
        state = load_checkpoint(checkpoints[-1], network, ema, optimizer)
        lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "last_epoch": state["step"]})
    ema.to(accelerator.device)
    prior_loss = held_out.losses(None).mean().item() if held_out is not None else float("nan")

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    figures = ""
    since = time.perf_counter() - state["seconds"]
    with Progress(*columns, TextColumn("{task.fields[figures]}")) as progress, _stop_on_signal() as stop:
        bar = progress.add_task("training", total=config.max_train_steps, completed=state["step"], figures=figures)
        while not _finished(config, state) and not stop.is_set():
            # 1. A batch: the step's own generator, so that a resumed run sees the same one.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state["step"])
            rows = torch.randint(len(train_pairs), (config.train_batch_size,), generator=generator)
            latents = train_pairs.latents[rows]  # (B, C, h, w)
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
            noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
            text_rows = train_pairs.text_rows[rows].clone()
            text_rows[torch.rand(len(rows), generator=generator) < config.proportion_empty_prompts] = 0

            # 2. The loss ‖ε − ε̄(z_t, t, text, c)‖², or its like for a base that predicts v.
            to = accelerator.device
            with accelerator.autocast(), steer(pipe.unet, network, train_pairs.condition(rows).to(to)):
                guess = pipe.unet(noisy.to(to), timesteps.to(to), train_pairs.text_states[text_rows].to(to)).sample
            target = denoising_target(pipe.scheduler, latents, noise, timesteps)
            loss = F.mse_loss(guess.float(), target.to(to))
            if not torch.isfinite(loss):
                raise PowersteerError(
                    f"the loss is {loss.item()} at step {state['step']}: nothing was saved over the last "
                    "checkpoint; try a lower learning_rate, or mixed_precision=no"
                )

            # 3. An update.
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(parameters)
            state["step"] += 1
            state["seconds"] = time.perf_counter() - since
            progress.update(bar, advance=1, figures=f"loss {loss.item():.4f}  {figures}")

            # 4. Held-out loss, the best weights, checkpoints.
            last = _finished(config, state)
            if state["step"] % config.validation_steps == 0 or last:
                ema.store(parameters)
                ema.copy_to(parameters)
                row = {"step": state["step"], "seconds": round(state["seconds"], 1), "loss": loss.item()}
                if held_out is not None:
                    row["prior"] = prior_loss
                    row["steered"] = held_out.losses(network).mean().item()
                    row["shuffled"] = held_out.losses(network, shuffled=True).mean().item()
                    figures = f"held-out {row['steered']:.4f} (prior {prior_loss:.4f})"
                if row.get("steered", -state["step"]) < state["best_loss"]:
                    state["best_loss"] = row.get("steered", -state["step"])
                    state["best_step"] = state["step"]
                    network.save_pretrained(config.output_dir)
                ema.restore(parameters)
                with (config.output_dir / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
            if state["step"] % config.checkpointing_steps == 0 or last or stop.is_set():
                save_checkpoint(config.output_dir, network, ema, optimizer, state, config.checkpoints_total_limit)
    finished = _finished(config, state)
    return TrainResult(config.output_dir, state["step"], state["best_step"], state["seconds"], interrupted=not finished)


def _encode(config: TrainConfig, pipe: StableDiffusionPipeline, folder: Path, limit: int | None) -> EncodedPairs:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pairs = Pairs(
        folder,
        (side, side),
        config.conditioning_channels,
        limit,
        kind=config.conditioning_kind,
        columns=Columns(config.image_column, config.conditioning_image_column, config.caption_column),
        default_prompt=config.default_prompt,
    )
    return encode_pairs(pipe, pairs, config.cache_dir or config.output_dir / "cache")


@contextmanager
def _stop_on_signal() -> Generator[threading.Event]:
    """Ctrl-C and SIGTERM end the loop after the step under way; a second one ends it at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(*_: Any) -> None:
        stop.set()
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _finished(config: TrainConfig, state: dict[str, Any]) -> bool:
    out_of_time = config.max_train_minutes is not None and state["seconds"] >= 60 * config.max_train_minutes
    return state["step"] >= config.max_train_steps or out_of_time


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[native_precision(device)]
