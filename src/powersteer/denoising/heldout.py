"""The held-out denoising loss: fixed noise, stratified fixed times, so that its curve is smooth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from powersteer.adapters.attach import attach
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.protocol import base_of
from powersteer.data.encode import EncodedPairs, Sample, conditions_of
from powersteer.data.pairs import spread
from powersteer.denoising.objective import objective_of
from powersteer.denoising.step import Batch, denoiser, predict, squared_errors

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
        draws: How many (time, noise) draws each pair gets, one in each of so many equal bands of times.
        limit: Take so many pairs, evenly spread.
        seed: Of the noise.
        accelerator: Shares the work among its processes; each gets the whole result.
        times: (draws, N), instead of the bands'.
    """

    def __init__(
        self,
        pipe: Any,
        pairs: EncodedPairs,
        draws: int = 4,
        limit: int | None = None,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        times: torch.Tensor | None = None,
    ) -> None:
        self.base, self.pairs, self.draws, self.seed, self.accelerator = base_of(pipe), pairs, draws, seed, accelerator
        self.objective = objective_of(pipe.scheduler)
        self.rows = spread(len(pairs), limit or len(pairs))
        generator = torch.Generator().manual_seed(seed)
        places = (torch.arange(draws)[:, None] + torch.rand(draws, len(self.rows), generator=generator)) / draws
        self.times = self.objective.at(places) if times is None else times
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
        """Names of the bands of times: ``0-249``, …"""
        return [self.objective.span(band, self.draws) for band in range(self.draws)]

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
            model: The adapter; ``None`` measures the prior.
            shuffled: Steer each pair with another pair's condition of its size: the control. A pair that is alone
                with its size has none, and gets NaN.
            batch_size: Draws evaluated at once.
            autocast: Of the training.
        """
        process = 0 if self.accelerator is None else self.accelerator.process_index
        processes = 1 if self.accelerator is None else self.accelerator.num_processes
        result = torch.zeros(self.draws, len(self.rows))
        for turn, (band, places) in enumerate(self._batches(batch_size)):
            if turn % processes == process:
                whose = [self._partner[place] for place in places] if shuffled else places
                result[band, places] = self._losses(model, band, places, whose, autocast)
        if self.accelerator is not None and processes > 1:
            summed: Any = self.accelerator.reduce(result.to(self.accelerator.device), "sum")
            result = summed.cpu()
        if shuffled:
            result[:, [place for place, partner in self._partner.items() if place == partner]] = torch.nan
        return result

    def _losses(
        self, model: Adapter | None, band: int, places: list[int], whose: list[int], autocast: Autocast
    ) -> torch.Tensor:
        """Losses (n,) of the draws of one band at some places, each under the condition of ``whose``."""
        network, samples = self.base.denoiser, self._samples(places)
        latents = self.pairs.latents(samples)
        noise = torch.stack([self.noise(band, place, tuple(latents.shape[1:])) for place in places])
        texts = self.pairs.texts([sample.texts[0] for sample in samples])
        batch = Batch.of(self.base, latents, noise, self.times[band, places], texts)
        conditions = conditions_of(samples if whose == places else self._samples(whose))
        with autocast(), nullcontext() if model is None else attach(network, model, conditions, plan=None):
            prediction = predict(denoiser(network), self.objective, batch, network.device, network.dtype)
        return squared_errors(self.objective, prediction.cpu(), batch)

    def _samples(self, places: list[int]) -> list[Sample]:
        return [self.pairs[self.rows[place], 0] for place in places]

    def _batches(self, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        """(band, places) of one size each."""
        for group in self._groups:
            for band in range(self.draws):
                for start in range(0, len(group), batch_size):
                    yield band, group[start : start + batch_size]
