"""The held-out denoising loss: fixed noise, stratified fixed timesteps, so that its curve is smooth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from powersteer.adapters.attach import Adapter, attach
from powersteer.data.encode import EncodedPairs, conditions_of, pixels_of, unet_inputs
from powersteer.data.pairs import spread
from powersteer.denoising.objective import denoising_target, noise_schedule

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context that a run computes in."""


@dataclass(frozen=True)
class Gap:
    """The mean of a paired difference, and its standard error over the pairs."""

    mean: float
    error: float

    @classmethod
    def of(cls, difference: torch.Tensor) -> Gap:
        """Make it from a difference (bands, N), averaged over the bands."""
        by_pair = difference.nanmean(0)
        by_pair = by_pair[~by_pair.isnan()].double()
        if not len(by_pair):
            return cls(0.0, float("inf"))
        error = by_pair.std().item() / len(by_pair) ** 0.5 if len(by_pair) > 1 else float("inf")
        return cls(by_pair.mean().item(), error)

    @property
    def certain(self) -> bool:
        """Above zero by three standard errors."""
        return self.mean > 3 * self.error


class HeldOut:
    """Denoising losses on pairs, the same noise for whatever is measured.

    Args:
        pipe: The frozen base.
        pairs: The pairs.
        draws: How many (timestep, noise) draws each pair gets, one in each of so many equal bands of timesteps.
        limit: Take so many pairs, evenly spread.
        seed: Of the noise.
        accelerator: Shares the work among its processes; each gets the whole result.
        timesteps: (draws, N), instead of the bands'.
    """

    def __init__(
        self,
        pipe: Any,
        pairs: EncodedPairs,
        draws: int = 4,
        limit: int | None = None,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> None:
        self.pipe, self.pairs, self.draws, self.seed, self.accelerator = pipe, pairs, draws, seed, accelerator
        self.scheduler = noise_schedule(pipe)
        self.rows = spread(len(pairs), limit or len(pairs))
        generator = torch.Generator().manual_seed(seed)
        steps = self.scheduler.config["num_train_timesteps"]
        places = (torch.arange(draws)[:, None] + torch.rand(draws, len(self.rows), generator=generator)) / draws
        self.timesteps = (places * steps).long().clamp(max=steps - 1) if timesteps is None else timesteps
        """(bands, N)."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, row in enumerate(self.rows):
            by_size[pairs.pairs.sizes[row]].append(place)
        self._groups = list(by_size.values())
        # Pairs of one concept lie side by side: half the folder away is another concept.
        self._partner = {
            place: group[(i + len(group) // 2) % len(group)] for group in self._groups for i, place in enumerate(group)
        }

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bands(self) -> list[str]:
        """Names of the bands of timesteps: ``0-249``, …"""
        steps = self.scheduler.config["num_train_timesteps"]
        edges = [band * steps // self.draws for band in range(self.draws + 1)]
        return [f"{low}-{high - 1}" for low, high in pairwise(edges)]

    def noise(self, band: int, place: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The noise of one draw."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + band * 1_000_033 + place + 1)
        return torch.randn(shape, generator=generator)

    @torch.no_grad()
    def losses(
        self,
        model: Adapter | None,
        *,
        shuffled: bool = False,
        batch_size: int = 64,
        autocast: Autocast = nullcontext,
    ) -> torch.Tensor:
        """Mean squared error of the denoiser's prediction for each draw, (bands, N).

        Args:
            model: The steering network; ``None`` measures the prior.
            shuffled: Steer each pair with another pair's condition of its size: the control. A pair that is alone
                with its size has none, and gets NaN.
            batch_size: Draws evaluated at once.
            autocast: Of the training.
        """
        unet, scheduler = self.pipe.unet, self.scheduler
        process, processes = (
            (0, 1)
            if self.accelerator is None
            else (
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )
        )
        result = torch.zeros(self.draws, len(self.rows))
        for turn, (band, places) in enumerate(self._batches(batch_size)):
            if turn % processes != process:
                continue
            samples = [self.pairs[self.rows[place], 0] for place in places]
            latents = self.pairs.latents(samples)
            timesteps = self.timesteps[band, places]
            noise = torch.stack([self.noise(band, place, tuple(latents.shape[1:])) for place in places])
            noisy = scheduler.add_noise(latents, noise, timesteps)
            states = self.pairs.texts([sample.texts[0] for sample in samples])
            if shuffled:
                samples = [self.pairs[self.rows[self._partner[place]], 0] for place in places]
            condition = conditions_of(samples)
            to = {"device": unet.device, "dtype": unet.dtype}
            moved = {name: tensor.to(**to) for name, tensor in states.items()}
            inputs = unet_inputs(moved, pixels_of(self.pipe, latents))
            steering = nullcontext() if model is None else attach(unet, model, condition)
            with autocast(), steering:
                guess: Any = unet(noisy.to(**to), timesteps.to(unet.device), **inputs).sample
            target = denoising_target(scheduler, latents, noise, timesteps)
            result[band, places] = F.mse_loss(guess.float().cpu(), target, reduction="none").mean((1, 2, 3))
        if self.accelerator is not None and processes > 1:
            summed: Any = self.accelerator.reduce(result.to(self.accelerator.device), "sum")
            result = summed.cpu()
        if shuffled:
            result[:, [place for place, partner in self._partner.items() if place == partner]] = torch.nan
        return result

    def _batches(self, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        """(band, places) of one size each."""
        for group in self._groups:
            for band in range(self.draws):
                for start in range(0, len(group), batch_size):
                    yield band, group[start : start + batch_size]
