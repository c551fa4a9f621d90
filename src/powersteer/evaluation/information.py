"""Information: how many nats the adapter takes from the condition, given the text.

A latent x is seen through noise, z = a·x + s·ε, at log-SNR λ = 2·log(a / s): a = √ᾱ and s = √(1−ᾱ) in diffusion, 1 − t
and t in flow matching. What a condition c tells about z grows with λ as the best denoiser with c outdoes the best one
without (Guo, Shamai & Verdú, IEEE Trans. Inf. Theory 2005, for z and for z given c; c tells about z only through x):

    d I(z; c) / dλ = ½ [ E‖ε − ε̂_prior(z, λ)‖² − E‖ε − ε̂_posterior(z, λ, c)‖² ]

so the denoising gain, integrated over the schedule from its lowest λ to its highest, is I(z_highest; c) −
I(z_lowest; c). Left out are, below, what even the noisiest latent tells of c, I(z_lowest; c), which goes to 0 with a;
and, above, what c tells of details finer than the least noise, I(x; c) − I(z_highest; c). For denoisers that are
learned, not the best, the integral is the gain in log-likelihood that they stand for (Kong, Brekelmans & Ver Steeg,
ICLR 2023): the steering's own faults lower it, and the prior's, where the steering mends them, raise it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import pi, sqrt
from typing import Any, Literal

import torch

from powersteer.adapters.protocol import Adapter
from powersteer.core.errors import PowersteerError
from powersteer.data.encode import EncodedPairs
from powersteer.denoising.heldout import Gap, HeldOut
from powersteer.denoising.objective import Objective, objective_of

UNIFORM_SHARE = 0.2
"""The share of the draws that is uniform in log-SNR: no time's weight can grow beyond five times that of uniform
draws."""
NARROWEST = 0.5
"""The least scale of the logistic, in log-SNR: a pilot of few pairs may see less than there is."""
BANDS = 8

Kind = Literal["prior", "steered", "shuffled"]
ErrorsOf = Callable[[Kind, torch.Tensor, int], torch.Tensor]
"""A function (kind of denoiser, times (draws, N), seed of the noise) → squared errors of ε a dimension, (draws, N).
The same seed gives all kinds the same noise."""


@dataclass(frozen=True)
class LogSnr:
    """The times of an objective as points of an integral over log-SNR, by the trapezoid rule."""

    times: torch.Tensor
    """The times (T,)."""
    values: torch.Tensor
    """Log-SNR λ (T,), falling."""
    widths: torch.Tensor
    """The width of λ that each time stands for (T,)."""

    @classmethod
    def of(cls, objective: Objective) -> LogSnr:
        """Make it from an objective. A time that leaves nothing of the picture (zero terminal SNR) is left out: its λ
        has no end."""
        times = objective.times
        values = objective.log_snr(times)
        kept = values.isfinite()
        values = values[kept]
        steps = -values.diff()
        none = steps.new_zeros(1)
        return cls(times[kept], values, (torch.cat([steps, none]) + torch.cat([none, steps])) / 2)

    def proposal(self, log_snr: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Probabilities (T,) to draw times with: a logistic density in λ with the mean and variance of the gain.

        Args:
            log_snr: Of a pilot's draws, uniform in λ; of any shape.
            gains: What they gained, of the same shape.
        """
        weights = gains.abs() / gains.abs().sum().clamp_min(1e-12)
        mean = (weights * log_snr).sum()
        variance = (weights * (log_snr - mean) ** 2).sum()
        scale = (variance.sqrt() * sqrt(3) / pi).clamp_min(NARROWEST)
        place = (self.values - mean) / scale
        logistic = self.widths * place.sigmoid() * (-place).sigmoid()
        return (1 - UNIFORM_SHARE) * logistic / logistic.sum() + UNIFORM_SHARE * self.uniform

    @property
    def uniform(self) -> torch.Tensor:
        """Probabilities (T,) that are uniform in λ."""
        return self.widths / self.widths.sum()


@dataclass(frozen=True)
class Information:
    """Denoising gain over the prior, in nats a latent dimension."""

    steered: Gap
    """With its own condition: the figure."""
    shuffled: Gap
    """With another pair's: the control. Misled by a wrong condition, it lies below zero."""
    bands: list[tuple[float, float, float]]
    """Where the gain comes from: log-SNR from, to, and the nats of ``steered`` between them."""
    pairs: int
    draws: int
    """How many draws of (log-SNR, noise) each pair got."""
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_information(
    errors: ErrorsOf, objective: Objective, pairs: int, *, draws: int = 8, seed: int = 0
) -> Information:
    """Integrate the denoising gain over log-SNR.

    Each pair gets ``draws`` log-SNRs, one from each of so many parts that are equally probable under a density that
    follows the gain; the density is fitted to a pilot of one other draw for each pair. Every gain is that of two
    denoisers on the same noise, weighted by one over its probability: the estimate has no bias, and pairs are
    independent, so that the standard error over them is that of the figure.

    Args:
        errors: Of the denoisers.
        objective: Of the base.
        pairs: How many there are, N.
        draws: For each pair.
        seed: Of log-SNRs and noise.

    Raises:
        PowersteerError: Fewer than two pairs, or no draws.
    """
    if pairs < 2 or draws < 1:
        raise PowersteerError(f"{pairs} pairs and {draws} draws: information needs at least two pairs and one draw")
    schedule = LogSnr.of(objective)
    generator = torch.Generator().manual_seed(seed)

    def draw(probabilities: torch.Tensor, count: int) -> torch.Tensor:
        """Places in the schedule (count, N), one in each of ``count`` equally probable parts."""
        chance = torch.rand(count, pairs, generator=generator, dtype=torch.float64)
        quantiles = (torch.arange(count)[:, None] + chance) / count
        return torch.searchsorted(probabilities.cumsum(0), quantiles).clamp(max=len(probabilities) - 1)

    pilot = draw(schedule.uniform, 1)
    at = schedule.times[pilot]
    gains = errors("prior", at, seed + 1).double() - errors("steered", at, seed + 1).double()
    probabilities = schedule.proposal(schedule.values[pilot], gains)

    places = draw(probabilities, draws)
    at = schedule.times[places]
    weights = schedule.widths[places] / probabilities[places]  # (draws, N)
    prior = errors("prior", at, seed).double()
    steered = 0.5 * weights * (prior - errors("steered", at, seed).double())
    shuffled = 0.5 * weights * (prior - errors("shuffled", at, seed).double())
    edges = torch.linspace(schedule.values[-1].item(), schedule.values[0].item(), BANDS + 1, dtype=torch.float64)
    band = torch.bucketize(schedule.values[places], edges[1:-1])
    nats = [(steered * (band == i)).mean().item() for i in range(BANDS)]
    bands = list(zip(edges[:-1].tolist(), edges[1:].tolist(), nats, strict=True))
    return Information(Gap.of(steered), Gap.of(shuffled), bands, pairs, draws, seed)


def denoiser_errors(pipe: Any, model: Adapter, pairs: EncodedPairs, *, batch_size: int = 64) -> ErrorsOf:
    """Errors of a base, and of it with a network of any kind attached, on encoded pairs."""
    objective = objective_of(pipe.scheduler)

    def errors(kind: Kind, times: torch.Tensor, seed: int) -> torch.Tensor:
        held_out = HeldOut(pipe, pairs, draws=len(times), seed=seed, times=times)
        losses = held_out.losses(None if kind == "prior" else model, shuffled=kind == "shuffled", batch_size=batch_size)
        return losses.double() * objective.noise_error_of_loss(times)

    return errors
