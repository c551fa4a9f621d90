"""What chance decides in an update: a function of (seed, step, place in the batch), so that a run resumed, or split
over other processes and accumulation steps, sees the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from powersteer.data.encode import Sample
from powersteer.denoising.objective import TimeSampler
from powersteer.training.config import TrainConfig


@dataclass(frozen=True)
class Draws:
    """What chance decides for one update's whole batch of N samples."""

    times: torch.Tensor
    """The objective's time of each sample, (N,)."""
    blank: torch.Tensor
    """Whether each sample's condition is left out, (N,)."""
    prompt: torch.Tensor
    """Random numbers from which `prompt_of` chooses, (N, 3), uniform in [0, 1)."""


def draw(config: TrainConfig, step: int, count: int, sampler: TimeSampler) -> Draws:
    """The draws of update ``step`` for ``count`` samples.

    Args:
        config: ``seed`` and ``proportion_empty_conditions``.
        step: Counted in updates.
        count: Samples of the whole batch.
        sampler: Draws times; see `powersteer.denoising.objective.Objective.sampler`.
    """
    generator = torch.Generator().manual_seed(_seed(config.seed, step))
    times = sampler(count, generator)
    blank = torch.rand(count, generator=generator) < config.proportion_empty_conditions
    return Draws(times, blank, torch.rand(count, 3, generator=generator))


def noise(seed: int, step: int, places: range, shape: tuple[int, ...]) -> torch.Tensor:
    """Noise (n, *shape) for the samples at some places of update ``step``'s batch."""
    return torch.stack([_noise(_seed(seed, step, place), shape) for place in places])


def seed_dropout(seed: int, step: int, places: range) -> None:
    """Seed torch's own generators, which drop-out draws from. Right before the forward pass: data loaders draw too."""
    torch.manual_seed(_seed(seed, step, -1 - places.start))


def prompt_of(sample: Sample, chance: torch.Tensor, config: TrainConfig) -> str:
    """The prompt a sample is trained with: empty, its own, or out of the method's mix.

    Args:
        sample: The sample.
        chance: (3,), uniform in [0, 1).
        config: ``proportion_empty_prompts``, ``prompt_mix`` and ``fixed_prompt``.
    """
    empty, kind, which = chance.tolist()
    if empty < config.proportion_empty_prompts:
        return ""
    own = sample.texts[int(which * len(sample.texts))]
    if not config.prompt_mix:
        return own
    mix = (
        [config.fixed_prompt, own]
        if sample.generated_text is None
        else [config.fixed_prompt, sample.generated_text, own]
    )
    return mix[int(kind * len(mix))]


def _noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _seed(*parts: int) -> int:
    seed = 0
    for part in parts:
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return seed
