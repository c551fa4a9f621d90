"""The loop that the pretraining stages share: seeded steps, EMA, mixed precision, resumable, bounded in time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import EMAModel
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from powersteer.apps.pretrain.muon import MuonAdamW
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of, write_whole
from powersteer.core.hardware import fast_attention, native_precision
from powersteer.core.weights import read_tensors, unpickle

Loss = Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Draws a batch for a step with that step's own generator, which is of the device; returns the loss and the figures to
log, all scalars on the device."""
CHECKPOINT, WEIGHTS, LOG = "checkpoint.pt", "weights.safetensors", "log.jsonl"
_LOOK = 10
"""Steps between looks at the figures: each look waits for the device."""
_SECONDS, _WARM_FROM, _STATE = "seconds", "warm_from", "state"


class FitConfig(StrictConfig):
    """How long and how fast a stage learns."""

    steps: int = Field(gt=0, le=10**9)
    minutes: float | None = Field(default=None, gt=0, le=1e6)
    """The stage ends after so long, if that comes before ``steps``."""
    batch_size: int = Field(gt=0, le=2**20)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon multiplies in bfloat16: where the processor has no units for it, a step takes several times as long."""
    warmup_steps: int = Field(default=200, ge=0, le=10**9)
    decay_share: float = Field(default=0.25, ge=0, le=1)
    """The last share of the stage over which the learning rate falls linearly to zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    report_every: int = Field(default=500, gt=0, le=10**9)
    """Steps between checkpoints, held-out figures and sample grids."""


@dataclass(frozen=True)
class Session:
    """What all stages of one command share."""

    seed: int
    """Step ``i`` draws from a generator seeded by (seed, i), so a resumed stage sees the same batches."""
    device: torch.device
    deadline: float | None = None
    """The value of `time.monotonic`, in seconds, at which the command's training ends; None for no such end."""
    saved: Callable[[], None] = lambda: None
    """Called whenever a stage has written its weights."""


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
    session: Session,
) -> None:
    """Train ``model`` in place, or go on where ``stage_dir`` stopped; ends with the EMA weights in it.

    ``stage_dir`` gets ``checkpoint.pt``, from which the stage goes on bit for bit; ``weights.safetensors``, the EMA
    weights in half precision, from which it goes on where there is no checkpoint, with a new optimizer; and
    ``log.jsonl``.

    Args:
        stage_dir: The stage's folder.
        config: Length and speed.
        model: What is trained.
        loss: One step's loss; see `Loss`.
        report: Called with the step, the model holding its EMA weights: writes a sample grid and returns
            held-out figures.
        session: What all stages share.

    Raises:
        PowersteerError: What ``stage_dir`` holds is damaged or of another recipe, or there was no time for one step.
        FloatingPointError: The loss is not finite.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    stage = _Stage(stage_dir, config, model, session)
    figures, clock = _Figures(stage_dir.name), _Clock(config.batch_size)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[figures]}")) as progress:
        bar = progress.add_task(stage_dir.name, total=config.steps, completed=stage.step, figures="")
        last = stage.is_done()
        while not last:
            figures.add(stage.update(loss))
            clock.tick()
            last = stage.is_done()
            reported = last or stage.step % config.report_every == 0
            if stage.step % _LOOK and not reported:
                continue
            read, rate = figures.read(stage.step), clock.pictures_per_second()
            shown = "  ".join(f"{name} {figure:.4f}" for name, figure in read.items())
            progress.update(bar, completed=stage.step, figures=f"{shown}  {rate:.0f} pictures/s")
            if not reported:
                continue
            seconds = stage.save()
            row = {"step": stage.step, "seen": stage.step * config.batch_size, **read, **stage.measure(report)}
            row |= {"pictures_per_second": round(rate, 1), _SECONDS: round(seconds, 1)}
            with (stage_dir / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            progress.console.print("  ".join(f"{k} {v:.5g}" for k, v in row.items()))
            clock.restart()
    if not stage.step:
        raise PowersteerError(f"there was no time for one step of {stage_dir.name}: give more minutes")
    stage.finish()


class _Stage:
    """A model, its optimizer and its EMA weights, put in place as ``folder`` left them."""

    def __init__(self, folder: Path, config: FitConfig, model: nn.Module, session: Session) -> None:
        self.folder, self.config, self.session = folder, config, session
        model.to(session.device)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # torch's stub lacks it
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(config, model, self.parameters)
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.step, spent, warm_from = _resume(folder, model, self.optimizer, self.ema, session.device)
        self.ema.to(session.device)
        self.pace = _Pace(config, session.deadline, spent, warm_from, time.monotonic())

    def is_done(self) -> bool:
        """Whether steps or time are used up."""
        return self.pace.done(self.step) >= 1

    def update(self, loss: Loss) -> dict[str, torch.Tensor]:
        """Take one step; returns its loss and figures."""
        device = self.session.device
        generator = torch.Generator(device).manual_seed(self.session.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.pace.rate(self.step)
        with autocast(device), fast_attention(device.type, native_precision(device)):
            value, figures = loss(self.step, generator)
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        self.step += 1
        return {"loss": value, **figures}

    def save(self) -> float:
        """Write the checkpoint and the EMA weights; returns the seconds that the stage has taken."""
        seconds = self.pace.seconds()
        parts = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}
        states = {name: part.state_dict() for name, part in parts.items()}
        numbers = {"step": self.step, _SECONDS: seconds, _WARM_FROM: self.pace.warm_from}
        _replace(self.folder / CHECKPOINT, {**states, **numbers})
        with self._averaged():
            _write_weights(self.folder / WEIGHTS, self.model, self.step, seconds)
        self.session.saved()
        return seconds

    def measure(self, report: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """What ``report`` says of the EMA weights."""
        with self._averaged(), torch.no_grad():
            return report(self.step)

    def finish(self) -> None:
        """Leave the EMA weights in the model."""
        self.ema.copy_to(self.parameters)
        self.model.eval()

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """The model in evaluation mode, with its EMA weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.model.eval()
        yield
        self.model.train()
        self.ema.restore(self.parameters)


class _Figures:
    """Running means of what the steps say, kept on the device until they are read.

    Args:
        name: What a message calls the stage.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._means: dict[str, torch.Tensor] = {}

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Take one step's figures in."""
        for name, figure in figures.items():
            self._means[name] = self._means.get(name, figure.detach()).lerp(figure.detach(), 0.02)

    def read(self, step: int) -> dict[str, float]:
        """The means, which waits for the device.

        Raises:
            FloatingPointError: One is not finite.
        """
        read = {name: mean.item() for name, mean in self._means.items()}
        if not all(abs(figure) < float("inf") for figure in read.values()):
            raise FloatingPointError(f"{self.name}: loss is {read['loss']} at step {step}")
        return read


class _Clock:
    """Pictures a second since the last restart."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Count anew."""
        self._since, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1

    def pictures_per_second(self) -> float:
        """The mean rate."""
        return self._steps * self.batch_size / (time.perf_counter() - self._since)


def _optimizer(config: FitConfig, model: nn.Module, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rates: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.9, 0.99), "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        return MuonAdamW(model, **rates)
    return torch.optim.AdamW(parameters, fused=True, **rates)


@dataclass(frozen=True)
class _Pace:
    """How far a stage is, in steps and in time, and the learning rate there."""

    config: FitConfig
    deadline: float | None
    spent: float
    """Seconds of earlier commands."""
    warm_from: int
    """The step at which the optimizer was new."""
    begun: float

    def seconds(self) -> float:
        """What the stage has taken, in this command and earlier ones."""
        return self.spent + time.monotonic() - self.begun

    def done(self, step: int) -> float:
        """The share that is done: 1 ends the stage."""
        shares = [step / self.config.steps]
        if self.config.minutes is not None:
            shares.append(self.seconds() / (60 * self.config.minutes))
        if self.deadline is not None:
            given = self.deadline - self.begun
            shares.append((time.monotonic() - self.begun) / given if given > 0 else 1.0)
        return max(shares)

    def rate(self, step: int) -> float:
        """Warm up, hold, fall to zero: the share of the learning rate."""
        warm = (step - self.warm_from + 1) / max(1, self.config.warmup_steps)
        fall = (1 - self.done(step)) / max(self.config.decay_share, 1 / self.config.steps)
        return min(1.0, warm, max(fall, 0.0))


def _resume(
    stage_dir: Path, model: nn.Module, optimizer: Any, ema: EMAModel, device: torch.device
) -> tuple[int, float, int]:
    """Put in place what was learned: steps done, seconds spent, and the step at which the optimizer was new."""
    checkpoint, weights = stage_dir / CHECKPOINT, stage_dir / WEIGHTS
    if checkpoint.exists():
        state = unpickle(checkpoint, device)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            ema.load_state_dict(state["ema"])
            return int(state["step"]), float(state[_SECONDS]), int(state[_WARM_FROM])
        except Exception as error:  # torch meets whatever the file says
            raise _foreign(checkpoint, error) from None
    if not weights.exists():
        return 0, 0.0, 0
    learned = read_tensors(weights)
    try:
        model.load_state_dict(learned)
        with safe_open(weights, "pt") as file:
            said = json.loads(file.metadata()[_STATE])
        ema.shadow_params = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        return int(said["step"]), float(said[_SECONDS]), int(said["step"])
    except Exception as error:
        raise _foreign(weights, error) from None


def _foreign(file: Path, error: Exception) -> PowersteerError:
    return PowersteerError(
        f"{file} is of another recipe, or damaged ({reason_of(error)}): give another output_dir, or remove it to begin "
        "the stage anew"
    )


def _write_weights(path: Path, model: nn.Module, step: int, seconds: float) -> None:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    kept = {name: tensor.cpu().contiguous() for name, tensor in halves.items()}
    write_whole(path, save(kept, {_STATE: json.dumps({"step": step, _SECONDS: seconds})}))


def _replace(path: Path, state: dict[str, Any]) -> None:
    """Write, then rename: an interrupted write leaves the previous checkpoint."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
