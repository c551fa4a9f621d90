"""The loop that the pretraining stages share: seeded steps, EMA, mixed precision, resumable, sample grids."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import EMAModel
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from powersteer.config import StrictConfig
from powersteer.core.files import reason_of
from powersteer.core.weights import unpickle
from powersteer.errors import PowersteerError
from powersteer.hardware import fast_attention, native_precision
from powersteer.pretrain.muon import MuonAdamW

Loss = Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]
"""Draws a batch for a step with that step's own generator; returns the loss and the figures to log."""


class FitConfig(StrictConfig):
    """How long and how fast a stage learns."""

    steps: int = Field(gt=0, le=10**9)
    batch_size: int = Field(gt=0, le=2**20)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon multiplies in bfloat16: where the processor has no units for it, a step takes several times as long."""
    warmup_steps: int = Field(default=200, ge=0, le=10**9)
    decay_share: float = Field(default=0.25, ge=0, le=1)
    """The last share of the steps over which the learning rate falls linearly to zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    report_every: int = Field(default=500, gt=0, le=10**9)
    """Steps between checkpoints, held-out figures and sample grids."""


def autocast(device: torch.device) -> Any:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere."""
    dtype = native_precision(device)
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def fit(
    stage_dir: Path,
    config: FitConfig,
    model: nn.Module,
    loss: Loss,
    report: Callable[[int], dict[str, float]],
    *,
    seed: int,
    device: torch.device,
) -> None:
    """Train ``model`` in place, or go on where ``stage_dir`` stopped; ends with the EMA weights in it.

    Args:
        stage_dir: Holds ``checkpoint.pt`` and ``log.jsonl``.
        config: Length and speed.
        model: What is trained.
        loss: One step's loss; see `Loss`.
        report: Called with the step, the model holding its EMA weights: writes a sample grid and returns
            held-out figures.
        seed: Step ``i`` draws from a generator seeded by (seed, i), so a resumed run sees the same batches.
        device: Where to train.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    model.to(device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch's stub lacks it
    parameters = [p for p in model.parameters() if p.requires_grad]
    rates: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        optimizer = MuonAdamW(model, **rates)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **rates)
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    checkpoint = stage_dir / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        state = unpickle(checkpoint, device)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
            start = int(state["step"])
        except Exception as error:  # torch meets whatever the file says
            raise PowersteerError(
                f"{checkpoint} is of another recipe, or damaged ({reason_of(error)}): give another output_dir, or "
                "remove it to begin the stage anew"
            ) from None
    ema.to(device)

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    since, seen, running = time.perf_counter(), 0, dict[str, float]()
    with Progress(*columns, TextColumn("{task.fields[figures]}")) as progress:
        bar = progress.add_task(stage_dir.name, total=config.steps, completed=start, figures="")
        for step in range(start, config.steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config)
            with autocast(device), fast_attention(device.type, native_precision(device)):
                value, figures = loss(step, generator)
            if not torch.isfinite(value):
                raise FloatingPointError(f"{stage_dir.name}: loss is {value.item()} at step {step}")
            value.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(parameters)
            seen += config.batch_size
            for name, figure in {"loss": value.item(), **figures}.items():
                running[name] = running.get(name, figure) + 0.02 * (figure - running.get(name, figure))
            shown = "  ".join(f"{name} {figure:.4f}" for name, figure in running.items())
            rate = seen / (time.perf_counter() - since)
            progress.update(bar, advance=1, figures=f"{shown}  {rate:.0f} pictures/s")

            if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _replace(checkpoint, {**state, "ema": ema.state_dict(), "step": step + 1})
                ema.store(parameters)
                ema.copy_to(parameters)
                model.eval()
                with torch.no_grad():
                    held_out = report(step + 1)
                model.train()
                ema.restore(parameters)
                row = {"step": step + 1, "seen": (step + 1) * config.batch_size, **running, **held_out}
                row["pictures_per_second"] = round(rate, 1)
                with (stage_dir / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(row) + "\n")
                progress.console.print("  ".join(f"{k} {v:.5g}" for k, v in row.items()))
                since, seen = time.perf_counter(), 0
    ema.copy_to(parameters)
    model.eval()


def _schedule(step: int, config: FitConfig) -> float:
    """Warm up, hold, fall to zero: the share of the learning rate at ``step``."""
    fall = max(1, round(config.steps * config.decay_share))
    return min(1.0, (step + 1) / max(1, config.warmup_steps), (config.steps - step) / fall)


def _replace(path: Path, state: dict[str, Any]) -> None:
    """Write, then rename: an interrupted write leaves the previous checkpoint."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
