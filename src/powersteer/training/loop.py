"""The training loop, top to bottom: the denoising loss of the steered base, which is frozen."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object

from powersteer.adapters.attach import attach
from powersteer.core.errors import NonFiniteError
from powersteer.core.hardware import fast_attention
from powersteer.denoising.step import predict, squared_errors
from powersteer.training.batches import Batches
from powersteer.training.checkpoint import list_checkpoints
from powersteer.training.draws import seed_dropout
from powersteer.training.learner import Learner
from powersteer.training.monitor import Monitor
from powersteer.training.setup import Run, autocast_dtype
from powersteer.training.signals import stop_on_signal
from powersteer.training.state import Place, TrainState
from powersteer.training.watch import Watch


def fit(run: Run, place: Place, last_step: int, description: str = "training") -> tuple[TrainState, bool]:
    """Train an adapter, or go on training it; the best weights (the last, without held-out pairs) end in its folder.

    Args:
        run: Base, adapter and pairs.
        place: Where to write, and what to go on from.
        last_step: Optimizer updates in all.
        description: For the progress bar.

    Returns:
        How far it came, and whether it was told to stop: then what comes after the loop must not begin either.

    Raises:
        PowersteerError: The output folder or a checkpoint is unusable, or a loss or gradient became non-finite.
    """
    config, accelerator = run.config, run.accelerator
    learner = Learner(run, last_step)
    state = learner.resume(place)
    run.network.train()
    monitor = Monitor(place.folder, accelerator, last_step, description, run.autocast)
    watch = Watch(run, place, monitor)
    with monitor, stop_on_signal() as stop:
        place.still_there()
        monitor.resume(state.step)
        if state.step == 0:
            _look(learner, watch, state, validates=True, shows=True)
        began, interrupted = time.perf_counter() - state.seconds, False
        batches = Batches(run, state.step)
        while not state.finished(config, last_step) and not interrupted:
            # 1. The gradient of a batch, and what all processes make of it.
            names, losses = _gradient(run, learner, batches, state.step)
            norm = learner.clip()
            told = torch.tensor([float(stop.is_set()), time.perf_counter() - began], device=accelerator.device)
            everyone = accelerator.gather(torch.cat([losses.mean()[None], told])[None])  # (processes, 3)
            state.loss = everyone[:, 0].mean().item()

            # 2. An update, unless something is not finite. The gradient scaler of fp16 meets infinite gradients by
            # itself: it skips the update and scales less.
            if not math.isfinite(state.loss) or (accelerator.scaler is None and not math.isfinite(norm)):
                _refuse_non_finite(state.step, names, losses, place.folder)
            learner.update()
            state.saw(names)
            state.step += 1
            interrupted, state.seconds = bool(everyone[:, 1].any()), everyone[0, 2].item()

            # 3. Held-out loss, the best weights, pictures, a checkpoint.
            place.still_there()
            last = state.finished(config, last_step)
            validates = state.step % config.validation_steps == 0 or last
            shows = state.step % config.validation_image_steps == 0 or last
            _look(learner, watch, state, validates=validates, shows=shows)
            monitor.advance(state.step, state.loss, batches.share.batch_size)
            if state.step % config.checkpointing_steps == 0 or interrupted or state.finished(config, last_step):
                learner.save(place, state)
    # A signal may have come in the last update.
    stopped = accelerator.gather(torch.tensor([stop.is_set()], device=accelerator.device))
    return state, bool(torch.as_tensor(stopped).any())


def _gradient(run: Run, learner: Learner, batches: Batches, step: int) -> tuple[list[str], torch.Tensor]:
    """Leave the gradient of one update in the weights.

    The loss of a sample is ‖ε − ε̄(z_t, t, text, c)‖², or its like for a base with another objective.

    Returns:
        This process's samples by name, and their losses (N,).
    """
    objective, module, device = run.objective, run.base.module, run.accelerator.device
    names: list[str] = []
    losses: list[torch.Tensor] = []
    for micro in batches.of(step):
        attention = fast_attention(device.type, autocast_dtype(run.setup.precision))
        seed_dropout(run.config.seed, step, micro.places)
        # The block lasts until the gradient is there, since gradient checkpointing runs layers again.
        steering = attach(module, run.network, micro.condition, plan=None)
        with run.accelerator.accumulate(learner.steered), steering, attention:
            prediction = predict(learner.steered, objective, micro.batch, device, module.dtype)
            loss = squared_errors(objective, prediction, micro.batch)  # (B,)
            if run.config.snr_gamma is not None:
                loss = loss * objective.min_snr_weights(micro.batch.times, run.config.snr_gamma).to(loss)
            run.accelerator.backward(loss.mean())
        losses.append(loss.detach())
        names += micro.names
    return names, torch.cat(losses)


def _look(learner: Learner, watch: Watch, state: TrainState, *, validates: bool, shows: bool) -> None:
    """Measure the averaged weights, and show what they make."""
    if not validates and not shows:
        return
    with learner.averaged() as measured:
        if validates:
            watch.validate(measured, state, learner.learning_rate)
        if shows:
            watch.pictures(measured, state.step)


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
