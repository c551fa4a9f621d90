"""What is seen of a run while it learns: held-out losses, the best weights, over-fitting, pictures."""

from __future__ import annotations

import math
from typing import Any

from powersteer.adapters.protocol import Adapter
from powersteer.core.errors import PowersteerError
from powersteer.denoising.heldout import HeldOut
from powersteer.training.checkpoint import save_adapter
from powersteer.training.monitor import Monitor, Validation
from powersteer.training.setup import PROBE, Run
from powersteer.training.state import Place, TrainState


class Watch:
    """Without held-out pairs, some of the training pairs are watched in their place; they choose nothing.

    Args:
        run: The run.
        place: Where the best weights end.
        monitor: What is told.
    """

    def __init__(self, run: Run, place: Place, monitor: Monitor) -> None:
        self.run, self.place, self.monitor = run, place, monitor
        self._probe = HeldOut(run.base.pipe, run.pairs.probe, limit=PROBE, accelerator=run.accelerator)
        self._watched = run.held_out or self._probe
        self._prior = self._watched.losses(None, autocast=run.autocast)
        self._warned_of = -1

    def validate(self, measured: Adapter, state: TrainState, learning_rate: float) -> None:
        """Measure, keep the weights if they are the best, and tell.

        Raises:
            PowersteerError: An untrained network steers, or nothing can be written.
        """
        validation = Validation.of(self._watched, self._prior, measured, self.run.autocast)
        row: dict[str, Any] = {"step": state.step, "seconds": round(state.seconds, 1), **validation.row()}
        row["on"] = "training pairs" if self.run.held_out is None else "held-out pairs"
        untrained = state.step == 0 and self.run.config.init_from is None
        if untrained and not math.isclose(row["steered"], row["prior"], rel_tol=1e-4):
            raise PowersteerError(f"at step 0 the loss is {row['steered']}, not the prior's {row['prior']}: a defect")
        if state.step > 0:
            row |= {"loss": state.loss, "learning_rate": learning_rate}
        self._choose(measured, state, row)
        self.monitor.record(row)
        if state.control_step is None and validation.control.certain and validation.gain.certain:
            state.control_step = state.step
            self.monitor.say(f"step {state.step}: control switched on; the condition is used")
        self._warn_of_over_fitting(state, row)

    def pictures(self, measured: Adapter, step: int) -> None:
        """See `Monitor.pictures`."""
        self.monitor.pictures(self.run.base, measured, self._watched, self.run.config.num_validation_images, step)

    def _choose(self, measured: Adapter, state: TrainState, row: dict[str, Any]) -> None:
        """Keep the weights whose held-out loss is lowest; the last, without held-out pairs."""
        if self.run.held_out is None:
            state.best_step = state.step
        else:
            row["train_probe"] = self._probe.losses(measured, autocast=self.run.autocast).mean().item()
            if row["steered"] < state.best_loss:
                state.best_loss, state.best_step, state.validations_since = row["steered"], state.step, 0
                state.best_probe = row["train_probe"]
            else:
                state.validations_since += 1
        if state.best_step == state.step and self.run.accelerator.is_main_process:
            save_adapter(self.place.folder, measured)

    def _warn_of_over_fitting(self, state: TrainState, row: dict[str, Any]) -> None:
        over_fitting = state.validations_since >= 3 and row["train_probe"] < state.best_probe
        if over_fitting and self._warned_of != state.best_step:
            self._warned_of = state.best_step
            self.monitor.say(
                f"step {state.step}: the loss on training pairs still falls, the held-out loss has risen since step "
                f"{state.best_step}: over-fitting; the weights of step {state.best_step} are kept"
            )
