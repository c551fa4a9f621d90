"""This process's samples of each update, with their noise, times, prompts and conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from powersteer.data.encode import conditions_of
from powersteer.data.order import Share
from powersteer.denoising.step import Batch
from powersteer.training.draws import draw, noise, prompt_of
from powersteer.training.setup import Run


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one accumulation step."""

    batch: Batch
    condition: torch.Tensor
    """(B, C, H, W)."""
    names: list[str]
    places: range
    """Their places in the whole batch of the update."""


class Batches:
    """What chance decides is a function of (seed, step, place), so that a resumed run sees the same.

    Args:
        run: The run.
        first: The update to begin with.
    """

    def __init__(self, run: Run, first: int) -> None:
        self.run, config, processes = run, run.config, run.accelerator
        accumulation = config.gradient_accumulation_steps
        self.share = Share(config.train_batch_size, accumulation, processes.num_processes, processes.process_index)
        self._samples = run.pairs.micro_batches(self.share, config.seed, first, config.dataloader_num_workers)

    def of(self, step: int) -> Iterator[MicroBatch]:
        """The accumulation steps of one update; updates must be asked for in order."""
        run, config = self.run, self.run.config
        draws = draw(config, step, self.share.batch_size, run.setup.sampler)
        for accumulation_step in range(config.gradient_accumulation_steps):
            samples, places = next(self._samples), self.share.places(accumulation_step)
            rows = slice(places.start, places.stop)
            latents = run.pairs.latents(samples)  # (B, C, h, w)
            epsilon = noise(config.seed, step, places, tuple(latents.shape[1:]))
            condition = conditions_of(samples)  # (B, C, H, W)
            condition[draws.blank[rows]] = 0
            prompts = [prompt_of(s, draws.prompt[place], config) for s, place in zip(samples, places, strict=True)]
            batch = Batch.of(run.base, latents, epsilon, draws.times[rows], run.pairs.texts(prompts))
            yield MicroBatch(batch, condition, [sample.name for sample in samples], places)
