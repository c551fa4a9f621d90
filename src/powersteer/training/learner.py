"""The weights in training: what moves them, their running average, and the learning rate."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from powersteer.adapters.protocol import Adapter
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.training.checkpoint import save_checkpoint, set_aside_later
from powersteer.training.optimizer import Average, make_optimizer
from powersteer.training.setup import Run
from powersteer.training.sharding import Whole, gathered, load_optimizer_state, optimizer_state
from powersteer.training.state import Place, TrainState


class Steered(nn.Module):
    """The frozen denoiser and the adapter that steers it, as one module: processes share its gradients."""

    def __init__(self, denoiser: nn.Module, network: Adapter) -> None:
        super().__init__()
        self.unet, self.network = denoiser, network  # FSDP's configuration names the first

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The prediction (B, C, h, w); within `attach`, the posterior's."""
        return self.unet(noisy, times, **inputs).sample


class Learner:
    """Moves an adapter's weights.

    Args:
        run: The run.
        last_step: Optimizer updates in all.
    """

    def __init__(self, run: Run, last_step: int) -> None:
        config, self.accelerator = run.config, run.accelerator
        self._whole = Whole(run.network, run.accelerator)
        bare = make_optimizer(config, run.network)
        prepared: Any = run.accelerator.prepare(Steered(run.base.module, run.network), bare)
        self.steered, self._optimizer = prepared
        self._parameters = [parameter for parameter in run.network.parameters() if parameter.requires_grad]
        self._average = Average(self._parameters, config.ema_decay, run.accelerator.device)
        self._lr_scheduler: Any = get_scheduler(
            config.lr_scheduler,
            bare,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps or last_step,
        )
        self._max_grad_norm, self._checkpoints = config.max_grad_norm, config.checkpoints_total_limit

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self._lr_scheduler.get_last_lr()[0]

    def resume(self, place: Place) -> TrainState:
        """Go on from a place's checkpoint, if it has one.

        Raises:
            PowersteerError: It is damaged, or of another optimizer.
        """
        checkpoint = place.checkpoint
        if checkpoint is None:
            return TrainState()
        state, tensors = TrainState.of(checkpoint.state, checkpoint.folder), checkpoint.tensors
        try:
            load_optimizer_state(self._optimizer, tensors["optimizer"])
            self._average.load_state_dict(tensors["average"], self._parameters)
            if self.accelerator.scaler is not None and tensors["scaler"]:
                self.accelerator.scaler.load_state_dict(tensors["scaler"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PowersteerError(
                f"{checkpoint.folder} holds another optimizer's state ({reason_of(error)}): give another output_dir"
            ) from None
        if self.accelerator.is_main_process:
            set_aside_later(place.folder, checkpoint.folder)
        self._lr_scheduler.load_state_dict({**self._lr_scheduler.state_dict(), "last_epoch": state.step})
        return state

    def clip(self) -> float:
        """Clip the gradient; returns its norm before."""
        return float(gathered(self.accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm)))

    def update(self) -> None:
        """Move the weights by the gradient there is."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._lr_scheduler.step()
        self._average.step(self._parameters)

    @contextmanager
    def averaged(self) -> Generator[Adapter]:
        """Within the block, the adapter with its averaged weights; all processes must come here."""
        with self._average.applied(self._parameters), self._whole.gathered() as measured:
            yield measured

    def save(self, place: Place, state: TrainState) -> None:
        """Write a checkpoint.

        Raises:
            PowersteerError: It cannot be written.
        """
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        average = gathered(self._average.state_dict())
        tensors = {"optimizer": optimizer_state(self._optimizer), "average": average, "scaler": scaler}
        with self._whole.gathered() as kept:
            if self.accelerator.is_main_process:
                place.still_there()
                save_checkpoint(place.folder, kept, tensors, vars(state), self._checkpoints, place.kept)
        self.accelerator.wait_for_everyone()
