"""One adapter, trained on so many pairs, and its distance from the exact posterior."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from powersteer.adapters.attach import attach
from powersteer.adapters.protocol import Adapter
from powersteer.adapters.registry import make_adapter
from powersteer.apps.bench.posterior.learning import BATCH, Learner
from powersteer.apps.bench.posterior.world import BANDS, Noisy, Pairs, World, predict

LEARNING_RATES = {
    "paper": 5e-4,
    "uniform": 1e-3,
    "lite": 1e-3,
    "controlnet": 1e-3,
    "controlnet-no-latents": 1e-3,
    "controlnet-xs": 1e-3,
    "t2i-adapter": 1e-3,
}
"""The methods, and the highest rate of each."""
_SHAPES: dict[str, dict[str, Any]] = {
    "uniform": {"preset": "paper", "weights": "uniform"},
    "controlnet-no-latents": {"preset": "controlnet", "ablation": "no-latents"},
}
"""The arguments that shape the networks of methods that are no presets."""
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_DRAWS = 0.2, 500, 1000
"""Pairs kept for early stopping, and the least number of draws made of them."""
VALIDATE_UPDATES, PATIENCE = 100, 10
CHUNK = 256
"""Draws evaluated at once."""


@dataclass(frozen=True)
class Score:
    """Against the exact posterior; the lists go over the bands of times, from little noise to much."""

    excess: list[float]
    """E‖ε̂ − E[ε | z, y]‖² per pixel: the loss above the exact posterior's."""
    gap: list[float]
    """The exact prior's loss less the exact posterior's: what there is to gain."""

    @property
    def share(self) -> float:
        """The share of the Bayes gap that is closed, over all times: 0 is the exact prior, 1 the exact posterior,
        the limit."""
        return 1 - sum(self.excess) / sum(self.gap)

    @property
    def share_by_band(self) -> list[float]:
        """The same in each band."""
        return [1 - excess / gap for excess, gap in zip(self.excess, self.gap, strict=True)]


@dataclass(frozen=True)
class Trained:
    """An adapter with its best weights, and how it got them."""

    network: Adapter
    updates: int
    best_update: int
    """0 where nothing learned is better than the prior."""
    held_out: list[float]
    """The held-out loss, before learning and at each validation."""
    seconds: float


def train_adapter(world: World, unet: Any, method: str, pairs: Pairs, updates: int, seed: int) -> Trained:
    """Train on ``pairs`` by the ordinary denoising loss, some held out to choose when to stop.

    Data, order, timesteps and noise are the same for every method.

    Args:
        world: Whose pairs they are.
        unet: The frozen prior.
        method: A key of `LEARNING_RATES`.
        pairs: At least four.
        updates: To take at most.
        seed: Of the network, the order and the noise.
    """
    torch.manual_seed(seed)
    shape = _SHAPES.get(method, {"preset": method})
    made: Any = make_adapter(unet, **shape, conditioning_channels=world.condition_channels, pixel_unshuffle=1)
    network: Adapter = made.to(memory_format=torch.channels_last)
    network.requires_grad_(True)
    learner = Learner(network, LEARNING_RATES[method], updates)
    generator = torch.Generator().manual_seed(seed)
    kept = min(max(2, round(HELD_OUT_SHARE * len(pairs))), HELD_OUT_MOST)
    held_out, seen = held_out_draws(world, pairs[:kept], generator), pairs[kept:]
    rows = _rows(len(seen), generator)

    def loss() -> torch.Tensor:
        batch = seen[torch.tensor([next(rows) for _ in range(BATCH)])]
        noisy = world.disturb(batch, world.stratified(1, BATCH, generator)[:, 0], generator)
        return F.mse_loss(_posterior(world, unet, network, noisy), noisy.noise.float())

    def validate() -> float:
        with learner.average.applied(learner.parameters):
            network.eval()
            total = sum(
                (guess - noisy.noise).square().sum().item() for noisy, guess in guesses(world, unet, network, held_out)
            )
            network.train()
        return total / held_out.noise.numel()

    best, best_update, taken = copy.deepcopy(network.state_dict()), 0, 0
    curve = [validate()]

    def keep_if_best() -> None:
        nonlocal best, best_update
        curve.append(validate())
        if curve[-1] == min(curve):
            best_update = taken
            with learner.average.applied(learner.parameters):
                best = copy.deepcopy(network.state_dict())

    for taken in learner.updates(loss):
        if taken % VALIDATE_UPDATES == 0:
            keep_if_best()
            if taken - best_update >= PATIENCE * VALIDATE_UPDATES:
                break
    if taken % VALIDATE_UPDATES:
        keep_if_best()
    network.load_state_dict(best)
    return Trained(network.eval(), taken, best_update, curve, learner.seconds)


def score(world: World, unet: Any, network: Adapter, count: int, seed: int) -> Score:
    """Measure an adapter on fresh pairs, with the same noise for all.

    The excess is measured against E[ε | z, y] itself, not against ε: the loss splits into the least possible and
    the squared distance from the exact posterior, so the noise of the former never enters.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = world.draw(count, generator)
    excess: list[float] = []
    gap: list[float] = []
    for times in world.stratified(count, BANDS, generator):
        draws = world.disturb(pairs, times, generator)
        distance = 0.0
        for noisy, guess in guesses(world, unet, network, draws):
            exact = world.posterior.denoise(noisy.pictures, noisy.alphas, noisy.pairs.observed)
            distance += (guess - exact).square().sum().item()
        excess.append(distance / draws.noise.numel())
        gap.append((world.field.loss(draws.alphas) - world.posterior.around.loss(draws.alphas)).mean().item())
    return Score(excess, gap)


def held_out_draws(world: World, pairs: Pairs, generator: torch.Generator) -> Noisy:
    """Each pair at several stratified times: one in each band at least, more where there are few pairs."""
    strata = max(BANDS, -(-HELD_OUT_DRAWS // len(pairs)))
    rows = torch.arange(len(pairs)).repeat(strata)
    times = world.stratified(len(pairs), strata, generator).flatten()
    return world.disturb(pairs[rows], times, generator)


@torch.no_grad()
def guesses(world: World, unet: Any, network: Adapter, draws: Noisy) -> Iterator[tuple[Noisy, torch.Tensor]]:
    """The steered U-Net's guesses at the noise, with the draws they are for, some at a time."""
    for start in range(0, len(draws.pairs), CHUNK):
        part = slice(start, start + CHUNK)
        yield draws[part], _posterior(world, unet, network, draws[part])


def _posterior(world: World, unet: Any, network: Adapter, noisy: Noisy) -> torch.Tensor:
    with attach(unet, network, world.condition(noisy.pairs.observed), plan=None):
        return predict(unet, noisy)


def _rows(count: int, generator: torch.Generator) -> Iterator[int]:
    """Every row once, in an order, then again in another."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
