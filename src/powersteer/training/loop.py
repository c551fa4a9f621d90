"""The training loop, top to bottom: the denoising loss of the steered U-Net, the base frozen."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from powersteer.adapters.attach import Adapter, attach
from powersteer.core.errors import NonFiniteError, PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.hardware import fast_attention
from powersteer.data.encode import EncodedPairs, Sample, TextStates, conditions_of, pixels_of, unet_inputs
from powersteer.data.order import Share
from powersteer.denoising.heldout import HeldOut
from powersteer.denoising.objective import denoising_target, min_snr_weights, noise_schedule, timestep_probabilities
from powersteer.training import setup
from powersteer.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    save_adapter,
    save_checkpoint,
    set_aside_later,
    step_of,
)
from powersteer.training.config import TrainConfig
from powersteer.training.draws import draw, noise, prompt_of, seed_dropout
from powersteer.training.folder import StillThere
from powersteer.training.monitor import Monitor, Validation
from powersteer.training.optimizer import Average, make_optimizer
from powersteer.training.sharding import Whole, gathered, load_optimizer_state, optimizer_state

PROBE = 64
"""Training pairs that are watched on fixed noise."""


class Source(Protocol):
    """What is trained on: `EncodedPairs`, or `powersteer.data.stream.StreamedPairs`."""

    @property
    def probe(self) -> EncodedPairs:
        """Some of the pairs, to be watched on fixed noise."""
        ...

    def micro_batches(self, share: Share, seed: int, first: int, workers: int) -> Iterator[list[Sample]]:
        """This process's samples of each accumulation step, from update ``first`` on, without end."""
        ...

    def latents(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(N, C, h, w)."""
        ...

    def texts(self, prompts: Sequence[str]) -> TextStates:
        """Text states of prompts."""
        ...


class SteeredUNet(nn.Module):
    """The frozen U-Net and the network that steers it, as one module: processes share its gradients."""

    def __init__(self, unet: nn.Module, network: Adapter) -> None:
        super().__init__()
        self.unet, self.network = unet, network

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The prediction (B, C, h, w); within `attach`, the posterior's."""
        return self.unet(noisy, timesteps, **inputs).sample


@dataclass
class TrainState:
    """How far a run is: what a checkpoint keeps beside the tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: int = 0
    """Optimizer updates done."""
    seconds: float = 0.0
    """In the loop, over all its resumptions."""
    loss: float = math.nan
    best_step: int = 0
    best_loss: float = math.inf
    best_probe: float = math.inf
    """Loss on training pairs when the best was found."""
    validations_since: int = 0
    """Without a better one."""
    control_step: int | None = None
    """When the condition was first seen to be used."""
    order: str = field(default_factory=lambda: hashlib.sha256().hexdigest())
    """Digest of all samples trained on, in order."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: Path) -> TrainState:
        """What a checkpoint kept; a number that was not finite is None there.

        Raises:
            PowersteerError: It is no state of a run.
        """
        optional = {"control_step"}
        given = {key: value for key, value in values.items() if value is not None or key in optional}
        try:
            state = _STATES.validate_json(json.dumps(given))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            what = f"state.json: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            raise PowersteerError(f"{where} is damaged ({what}): it was not loaded") from None
        if state.step != step_of(where) or not 0 <= state.best_step <= state.step or state.validations_since < 0:
            raise PowersteerError(f"{where} is damaged (state.json: its steps cannot be): it was not loaded")
        return state

    def saw(self, names: list[str]) -> None:
        """Take note of what was trained on."""
        self.order = hashlib.sha256("\n".join([self.order, *names]).encode()).hexdigest()


_STATES: TypeAdapter[TrainState] = TypeAdapter(TrainState)


@dataclass(frozen=True)
class Place:
    """Where a run writes, and what it goes on from."""

    folder: Path
    """Checkpoints, weights and log go here."""
    still_there: StillThere
    """Asked before anything is written."""
    checkpoint: Checkpoint | None = None
    """Whose weights are in the network already."""
    kept: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What every checkpoint keeps beside: the run's record, by its file's name."""


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    pipe: Any,
    network: Adapter,
    pairs: Source,
    held_out: HeldOut | None,
    place: Place,
    last_step: int,
    description: str = "training",
) -> tuple[TrainState, bool]:
    """Train a network, or go on training it; the best weights (the last, without held-out pairs) end in its folder.

    Args:
        config: How.
        accelerator: The processes.
        pipe: The frozen base, on its device.
        network: The network that steers it.
        pairs: What to train on.
        held_out: On what to choose the best weights.
        place: Where to write, and what to go on from.
        last_step: Optimizer updates in all.
        description: For the progress bar.

    Returns:
        How far it came, and whether it was told to stop: then what comes after the loop must not begin either.

    Raises:
        PowersteerError: The output folder or a checkpoint is unusable, or a loss or gradient became non-finite.
    """
    output_dir, checkpoint = place.folder, place.checkpoint
    whole = Whole(network, accelerator)
    bare = make_optimizer(config, network)
    steered, optimizer = accelerator.prepare(SteeredUNet(pipe.unet, network), bare)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    average = Average(parameters, config.ema_decay, accelerator.device)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        bare,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps or last_step,
    )
    schedule, precision = noise_schedule(pipe), setup.precision_of(config)
    probabilities = timestep_probabilities(schedule, config.log_snr_share)
    autocast = partial(setup.autocast, accelerator.device.type, precision)
    attention = fast_attention(accelerator.device.type, setup.autocast_dtype(precision))
    accumulation = config.gradient_accumulation_steps
    share = Share(config.train_batch_size, accumulation, accelerator.num_processes, accelerator.process_index)

    state = TrainState()
    if checkpoint is not None:
        state, tensors = TrainState.of(checkpoint.state, checkpoint.folder), checkpoint.tensors
        try:
            load_optimizer_state(optimizer, tensors["optimizer"])
            average.load_state_dict(tensors["average"], parameters)
            if accelerator.scaler is not None and tensors["scaler"]:
                accelerator.scaler.load_state_dict(tensors["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PowersteerError(
                f"{checkpoint.folder} holds another optimizer's state ({reason_of(error)}): give another output_dir"
            ) from None
        if accelerator.is_main_process:
            set_aside_later(output_dir, checkpoint.folder)
        lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "last_epoch": state.step})
    network.train()
    # Without held-out pairs, some of the training pairs are watched in their place; they choose nothing.
    probe = HeldOut(pipe, pairs.probe, limit=PROBE, accelerator=accelerator)
    watched = held_out or probe
    prior = watched.losses(None, autocast=autocast)
    warned_of = -1

    def validate(measured: Adapter) -> None:
        nonlocal warned_of
        validation = Validation.of(watched, prior, measured, autocast)
        row: dict[str, Any] = {"step": state.step, "seconds": round(state.seconds, 1), **validation.row()}
        row["on"] = "training pairs" if held_out is None else "held-out pairs"
        untrained = state.step == 0 and config.init_from is None
        if untrained and not math.isclose(row["steered"], row["prior"], rel_tol=1e-4):
            raise PowersteerError(f"at step 0 the loss is {row['steered']}, not the prior's {row['prior']}: a defect")
        if state.step > 0:
            row |= {"loss": state.loss, "learning_rate": lr_scheduler.get_last_lr()[0]}
        if held_out is None:
            state.best_step = state.step
        else:
            row["train_probe"] = probe.losses(measured, autocast=autocast).mean().item()
            if row["steered"] < state.best_loss:
                state.best_loss, state.best_step, state.validations_since = row["steered"], state.step, 0
                state.best_probe = row["train_probe"]
            else:
                state.validations_since += 1
        if state.best_step == state.step and accelerator.is_main_process:
            save_adapter(output_dir, measured)
        monitor.record(row)
        if state.control_step is None and validation.control.certain and validation.gain.certain:
            state.control_step = state.step
            monitor.say(f"step {state.step}: control switched on; the condition is used")
        over_fitting = state.validations_since >= 3 and row["train_probe"] < state.best_probe
        if over_fitting and warned_of != state.best_step:
            warned_of = state.best_step
            monitor.say(
                f"step {state.step}: the loss on training pairs still falls, the held-out loss has risen since step "
                f"{state.best_step}: over-fitting; the weights of step {state.best_step} are kept"
            )

    def save() -> None:
        scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
        tensors = {"optimizer": optimizer_state(optimizer), "average": gathered(average.state_dict()), "scaler": scaler}
        with whole.gathered() as kept:
            if accelerator.is_main_process:
                place.still_there()
                limit = config.checkpoints_total_limit
                save_checkpoint(output_dir, kept, tensors, vars(state), limit, place.kept)
        accelerator.wait_for_everyone()

    def finished() -> bool:
        out_of_time = config.max_train_minutes is not None and state.seconds >= 60 * config.max_train_minutes
        out_of_patience = config.patience is not None and state.validations_since >= config.patience
        return state.step >= last_step or out_of_time or out_of_patience

    with Monitor(output_dir, accelerator, last_step, description, autocast) as monitor, _stop_on_signal() as stop:
        place.still_there()
        monitor.resume(state.step)
        if state.step == 0:
            with whole.gathered() as measured:
                validate(measured)
                monitor.pictures(pipe, measured, watched, config.num_validation_images, 0)
        since = time.perf_counter() - state.seconds
        micro_batches = pairs.micro_batches(share, config.seed, state.step, config.dataloader_num_workers)
        interrupted = False
        while not finished() and not interrupted:
            # 1. A batch: what chance decides is a function of (seed, step), so that a resumed run sees the same.
            draws = draw(config, state.step, share.batch_size, probabilities)
            losses: list[torch.Tensor] = []
            names: list[str] = []
            for accumulation_step in range(accumulation):
                samples, places = next(micro_batches), share.places(accumulation_step)
                latents = pairs.latents(samples)  # (B, C, h, w)
                epsilon = noise(config.seed, state.step, places, tuple(latents.shape[1:]))
                timesteps = draws.timesteps[places.start : places.stop]
                condition = conditions_of(samples)  # (B, C, H, W)
                condition[draws.blank[places.start : places.stop]] = 0
                prompts = [prompt_of(s, draws.prompt[place], config) for s, place in zip(samples, places, strict=True)]
                inputs = unet_inputs(pairs.texts(prompts), pixels_of(pipe, latents))

                # 2. The loss ‖ε − ε̄(z_t, t, text, c)‖², or its like for a base that predicts v; the base's hooks stay
                # until the gradient is there, since gradient checkpointing runs it again.
                noisy = schedule.add_noise(latents, epsilon, timesteps)
                to = {"device": accelerator.device, "dtype": pipe.unet.dtype}
                seed_dropout(config.seed, state.step, places)
                with accelerator.accumulate(steered), attach(pipe.unet, network, condition), attention:
                    guess = steered(noisy.to(**to), timesteps.to(accelerator.device), **_moved(inputs, **to))
                    target = denoising_target(schedule, latents, epsilon, timesteps).to(accelerator.device)
                    loss = F.mse_loss(guess.float(), target, reduction="none").mean((1, 2, 3))  # (B,)
                    if config.snr_gamma is not None:
                        loss = loss * min_snr_weights(schedule, timesteps, config.snr_gamma).to(loss)
                    accelerator.backward(loss.mean())
                losses.append(loss.detach())
                names += [sample.name for sample in samples]

            # 3. An update, unless something is not finite.
            norm = float(gathered(accelerator.clip_grad_norm_(parameters, config.max_grad_norm)))
            told = [float(stop.is_set()), time.perf_counter() - since]
            figures = torch.cat([torch.cat(losses).mean()[None], torch.tensor(told, device=accelerator.device)])
            everyone = accelerator.gather(figures[None])  # (processes, 3)
            state.loss = everyone[:, 0].mean().item()
            # The gradient scaler of fp16 meets infinite gradients by itself: it skips the update and scales less.
            if not math.isfinite(state.loss) or (accelerator.scaler is None and not math.isfinite(norm)):
                _refuse_non_finite(state.step, names, torch.cat(losses), output_dir)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            average.step(parameters)
            state.saw(names)
            state.step += 1
            interrupted, state.seconds = bool(everyone[:, 1].any()), everyone[0, 2].item()

            # 4. Held-out loss, the best weights, pictures, checkpoints.
            place.still_there()
            last = finished()
            validates = state.step % config.validation_steps == 0 or last
            shows = state.step % config.validation_image_steps == 0 or last
            if validates or shows:
                with average.applied(parameters), whole.gathered() as measured:
                    if validates:
                        validate(measured)
                    if shows:
                        monitor.pictures(pipe, measured, watched, config.num_validation_images, state.step)
            monitor.advance(state.step, state.loss, share.batch_size)
            if state.step % config.checkpointing_steps == 0 or interrupted or finished():
                save()
    told: Any = accelerator.gather(torch.tensor([stop.is_set()], device=accelerator.device))  # be it in the last update
    return state, bool(told.any())


def _moved(inputs: dict[str, Any], **to: Any) -> dict[str, Any]:
    return {name: _moved(value, **to) if isinstance(value, dict) else value.to(**to) for name, value in inputs.items()}


def _refuse_non_finite(step: int, names: list[str], losses: torch.Tensor, output_dir: Path) -> None:
    bad = [name for name, loss in zip(names, losses.tolist(), strict=True) if not math.isfinite(loss)]
    kind, bad = ("loss", bad) if bad else ("gradient", names)
    everywhere = [name for part in gather_object([bad]) for name in part]
    named = ", ".join(everywhere[:8]) + (", …" if len(everywhere) > 8 else "")
    found = list_checkpoints(output_dir)
    last = f"last good: {found[-1].name}" if found else "there is no checkpoint yet"
    start = f" (init_from={found[-1]} begins at its weights)" if found else ""
    raise NonFiniteError(
        f"non-finite {kind} at step {step}, samples {named}; {last}. Look at these samples, and try "
        f"mixed_precision=bf16 (or no), or in another output_dir a lower learning_rate{start}"
    )


@contextmanager
def _stop_on_signal() -> Generator[threading.Event]:
    """Ctrl-C, SIGTERM and SIGHUP (the terminal closes) end the loop after the step under way; a second one ends it at
    once. What ``nohup`` has a run ignore, it ignores."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(*_: Any) -> None:
        stop.set()
        for number, handler in previous.items():
            # A terminal that closes says so twice: itself, and by the shell in it.
            signal.signal(number, signal.SIG_IGN if number == hangup else handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    previous = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
