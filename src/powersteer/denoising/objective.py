"""What a base is trained to do: how noise is mixed in at a time, what is predicted of it, how much each time counts.

A noisy latent is z_t = a·z + s·ε. The picture's share of its variance is a² / (a² + s²), its log-SNR 2·log(a / s).
`objective_of` reads from a base's scheduler which objective it has; nothing else asks a scheduler about training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler

from powersteer.backbones.fingerprint import FLOW, predicted_by
from powersteer.core.errors import PowersteerError

LOWEST_LOG_SNR = -6.0
"""Below, a latent tells of the picture at most ½·e^−6 nats a dimension of unit variance."""

WeightingScheme = Literal["none", "logit_normal"]
"""How flow matching draws its times: uniformly, or as σ(n) with n ~ N(0, 1) (Esser et al., ICML 2024)."""
TimeSampler = Callable[[int, torch.Generator], torch.Tensor]
"""A function (count, generator) → times (count,)."""


class Objective(ABC):
    """What a denoiser is trained to do. Times (B,) grow with the noise; their unit is the objective's own."""

    prediction_type: str
    """What is predicted, in diffusers' words; recorded with what is trained."""

    @abstractmethod
    def sampler(self, log_snr_share: float = 0.0, weighting_scheme: WeightingScheme = "none") -> TimeSampler:
        """Draw times for training.

        What a condition tells is the denoising gain integrated over log-SNR (see `powersteer.evaluation.information`).
        Times that are even in t seldom see the little noise, and so the fine details, that much of its range consists
        of.

        Args:
            log_snr_share: Share of times drawn evenly in log-SNR, down to `LOWEST_LOG_SNR`; in [0, 1].
            weighting_scheme: Distribution of the other times.

        Raises:
            PowersteerError: The objective has no such distribution.
        """

    @abstractmethod
    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Times at places in [0, 1) of their range, of any shape."""

    @abstractmethod
    def span(self, part: int, parts: int) -> str:
        """Name one of so many equal parts of the range of times, counted from 0."""

    @property
    @abstractmethod
    def times(self) -> torch.Tensor:
        """Times (T,) of falling log-SNR, close enough for integrals over it."""

    @property
    @abstractmethod
    def levels(self) -> bytes:
        """The noise of all times, as bytes: bases whose bytes differ are trained differently."""

    @abstractmethod
    def model_times(self, times: torch.Tensor) -> torch.Tensor:
        """Times as the denoiser is told them."""

    @abstractmethod
    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Mix noise ε (B, C, h, w) into latents z (B, C, h, w) → z_t (B, C, h, w)."""

    @abstractmethod
    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the denoiser is to predict (B, C, h, w)."""

    @abstractmethod
    def to_latents(self, prediction: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The clean latents ẑ (B, C, h, w) that a prediction stands for, given z_t."""

    @abstractmethod
    def to_noise(self, prediction: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The noise ε̂ (B, C, h, w) that a prediction stands for, given z_t."""

    @abstractmethod
    def signal(self, times: torch.Tensor) -> torch.Tensor:
        """The picture's share of the variance, float64, of the times' shape."""

    @abstractmethod
    def loss_of_latents(self, times: torch.Tensor) -> torch.Tensor:
        """Loss for each unit of squared error of z, of the times' shape."""

    @abstractmethod
    def noise_error_of_loss(self, times: torch.Tensor) -> torch.Tensor:
        """Squared error of ε for each unit of the loss, of the times' shape."""

    def log_snr(self, times: torch.Tensor) -> torch.Tensor:
        """Log-SNR, float64, of the times' shape."""
        return self.signal(times).logit()

    def min_snr_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor:
        """Weights (B,) of the loss that count every time as min(SNR, γ) on the picture (Hang et al., ICCV 2023)."""
        signal = self.signal(times)
        snr = signal / (1 - signal)
        of_one = self.loss_of_latents(times).clamp(min=1e-20)
        # Where nothing of the picture is left (zero terminal SNR), ε says nothing and the weight is 1: its limit.
        return torch.where(snr > 0, snr.clamp(max=snr_gamma) / of_one, torch.ones_like(snr)).float()


class Diffusion(Objective):
    """The denoising loss on a discrete schedule ᾱ: a = √ᾱ, s = √(1−ᾱ). Its times are integers, the timesteps.

    Predicted is ε, or v = √ᾱ·ε − √(1−ᾱ)·z (Salimans & Ho, ICLR 2022), or z. One follows from another by z_t, so that a
    squared error of z counts as SNR = ᾱ / (1−ᾱ) of one of ε, and as SNR + 1 of one of v.

    Args:
        config: A scheduler's; its noise and ``prediction_type`` count, not how it samples.

    Raises:
        PowersteerError: The prediction type is unknown.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise PowersteerError(
                f"the base predicts '{self.prediction_type}': only epsilon, v_prediction and sample can be trained"
            )

    @cached_property
    def _schedule(self) -> Any:
        return DDPMScheduler.from_config(dict(self._config))

    @cached_property
    def _alphas(self) -> torch.Tensor:
        return self._schedule.alphas_cumprod.cpu()  # on a GPU after noise was mixed in there

    def sampler(self, log_snr_share: float = 0.0, weighting_scheme: WeightingScheme = "none") -> TimeSampler:
        """See `Objective.sampler`; uneven times come one from each of ``count`` equally probable parts."""
        if weighting_scheme != "none":
            raise PowersteerError(
                f"weighting_scheme={weighting_scheme} is for flow matching, and the base predicts "
                f"{self.prediction_type}: leave it out"
            )
        ends, last = self.probabilities(log_snr_share).cumsum(0), len(self._alphas) - 1

        def sample(count: int, generator: torch.Generator) -> torch.Tensor:
            if not log_snr_share:
                return torch.randint(last + 1, (count,), generator=generator)
            return torch.searchsorted(ends, _stratified(count, generator)).clamp(max=last)

        return sample

    def probabilities(self, log_snr_share: float) -> torch.Tensor:
        """Probabilities (T,) of the timesteps: a share of them even in log-SNR, the others even in t."""
        log_snr = self.log_snr(self.times).clamp(min=LOWEST_LOG_SNR)
        none, steps = log_snr.new_zeros(1), -log_snr.diff()
        widths = torch.cat([steps, none]) + torch.cat([none, steps])
        return log_snr_share * widths / widths.sum() + (1 - log_snr_share) / len(widths)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """See `Objective.at`."""
        count = len(self._alphas)
        return (places * count).long().clamp(max=count - 1)

    def span(self, part: int, parts: int) -> str:
        """See `Objective.span`: ``0-249``, …"""
        count = len(self._alphas)
        return f"{part * count // parts}-{(part + 1) * count // parts - 1}"

    @property
    def times(self) -> torch.Tensor:
        """All timesteps."""
        return torch.arange(len(self._alphas))

    @property
    def levels(self) -> bytes:
        """ᾱ."""
        return self._alphas.numpy().tobytes()

    def model_times(self, times: torch.Tensor) -> torch.Tensor:
        """The timesteps themselves."""
        return times

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.corrupt`: z_t = √ᾱ·z + √(1−ᾱ)·ε."""
        return self._schedule.add_noise(latents, noise, times)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.target`: ε, v or z."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        a, s = self._mixing(times, latents)
        return a * noise - s * latents

    def to_latents(self, prediction: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.to_latents`."""
        if self.prediction_type == "sample":
            return prediction
        a, s = self._mixing(times, noisy)
        return (noisy - s * prediction) / a if self.prediction_type == "epsilon" else a * noisy - s * prediction

    def to_noise(self, prediction: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.to_noise`."""
        if self.prediction_type == "epsilon":
            return prediction
        a, s = self._mixing(times, noisy)
        return (noisy - a * prediction) / s if self.prediction_type == "sample" else s * noisy + a * prediction

    def signal(self, times: torch.Tensor) -> torch.Tensor:
        """ᾱ."""
        return self._alphas.double()[times.cpu()]

    def loss_of_latents(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.loss_of_latents`: SNR, SNR + 1 or 1."""
        signal = self.signal(times)
        snr = signal / (1 - signal)
        return {"epsilon": snr, "v_prediction": snr + 1}.get(self.prediction_type, torch.ones_like(snr))

    def noise_error_of_loss(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.noise_error_of_loss`: 1, ᾱ or SNR."""
        signal = self.signal(times)
        of_one = {"epsilon": torch.ones_like(signal), "v_prediction": signal}
        return of_one.get(self.prediction_type, signal / (1 - signal))

    def _mixing(self, times: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and s (B, 1, 1, 1), for latents."""
        alphas = self._alphas.to(like)[times.to(like.device)][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()


class FlowMatching(Objective):
    """Rectified flow: a = 1 − t, s = t, predicted is ε − z (Liu et al., ICLR 2023; Esser et al., ICML 2024).

    Its times are t in (0, 1); the denoiser is told t·T, with T = ``num_train_timesteps``. An error of the prediction is
    one of z times t, and one of ε times 1 − t.

    Args:
        num_train_timesteps: T. Times lie between the least noise of a schedule of so many steps and the next to most.
        shift: Moves times to more noise: t → shift·t / (1 + (shift − 1)·t).
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self.prediction_type = FLOW
        self.num_train_timesteps, self.shift = num_train_timesteps, shift
        ends = torch.tensor([1, max(1, num_train_timesteps - 1)], dtype=torch.float64) / num_train_timesteps
        self._ends: list[float] = self._shifted(ends).tolist()

    def sampler(self, log_snr_share: float = 0.0, weighting_scheme: WeightingScheme = "none") -> TimeSampler:
        """See `Objective.sampler`; times come one from each of ``count`` equally probable parts, shifted as the base's
        scheduler shifts them."""
        highest = self.log_snr(torch.tensor(self._ends[0], dtype=torch.float64)).item()

        def sample(count: int, generator: torch.Generator) -> torch.Tensor:
            chance = _stratified(count, generator)
            # Below the share, chance / share is uniform in [0, 1); above it, the rest is.
            even = highest + (LOWEST_LOG_SNR - highest) * chance / max(log_snr_share, 1e-9)
            other = ((chance - log_snr_share) / max(1 - log_snr_share, 1e-9)).clamp(0, 1)
            if weighting_scheme == "logit_normal":
                other = torch.special.ndtri(other).sigmoid()
            times = torch.where(chance < log_snr_share, (-even / 2).sigmoid(), self._shifted(other))
            return times.clamp(*self._ends).float()

        return sample

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """See `Objective.at`."""
        return places.clamp(*self._ends)

    def span(self, part: int, parts: int) -> str:
        """See `Objective.span`: ``0-0.25``, …"""
        return f"{part / parts:g}-{(part + 1) / parts:g}"

    @property
    def times(self) -> torch.Tensor:
        """T times, even in log-SNR."""
        first, last = self.log_snr(torch.tensor(self._ends, dtype=torch.float64)).tolist()
        return (-torch.linspace(first, last, self.num_train_timesteps, dtype=torch.float64) / 2).sigmoid()

    @property
    def levels(self) -> bytes:
        """T and the shift."""
        return f"flow {self.num_train_timesteps} {self.shift}".encode()

    def model_times(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.model_times`: t·T."""
        return (times * self.num_train_timesteps).float()

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.corrupt`: z_t = (1 − t)·z + t·ε."""
        t = _of_rows(times, latents)
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.target`: ε − z."""
        return noise - latents

    def to_latents(self, prediction: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.to_latents`."""
        return noisy - _of_rows(times, noisy) * prediction

    def to_noise(self, prediction: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.to_noise`."""
        return noisy + (1 - _of_rows(times, noisy)) * prediction

    def signal(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.signal`: (1 − t)² / ((1 − t)² + t²)."""
        t = times.cpu().double()
        return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)

    def log_snr(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.log_snr`: 2·log((1 − t) / t)."""
        t = times.cpu().double()
        return 2 * ((1 - t) / t).log()

    def loss_of_latents(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.loss_of_latents`: 1 / t²."""
        return times.cpu().double() ** -2

    def noise_error_of_loss(self, times: torch.Tensor) -> torch.Tensor:
        """See `Objective.noise_error_of_loss`: (1 − t)²."""
        return (1 - times.cpu().double()) ** 2

    def _shifted(self, times: torch.Tensor) -> torch.Tensor:
        return self.shift * times / (1 + (self.shift - 1) * times)


def objective_of(scheduler: Any) -> Objective:
    """The objective that a base was trained with: the one place that says which it is.

    Args:
        scheduler: The base's scheduler, of diffusers, or what its ``scheduler_config.json`` holds. Only what it says of
            training counts, not how it samples.

    Raises:
        PowersteerError: It is none that can be trained.
    """
    config: Mapping[str, Any] = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    if predicted_by(scheduler) == FLOW:
        # A shift that depends on the picture's size is the sampler's: diffusers' training scripts leave it out, too.
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
        return FlowMatching(config.get("num_train_timesteps", 1000), shift)
    return Diffusion(config)


def _stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers (count,) in [0, 1), float64: one in each of ``count`` equal parts, in any order."""
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator, dtype=torch.float64)) / count


def _of_rows(times: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return times.to(like)[:, None, None, None]
