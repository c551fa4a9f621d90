"""Gaussian fields seen through linear maps: prior and posterior are Gaussian, and so denoised exactly.

With z = √ᾱ·x + √(1−ᾱ)·ε and x ~ N(m, V diag(s) Vᵀ), everything is diagonal in V, at every noise level:

    E[ε | z]             = V diag(√(1−ᾱ) / (ᾱ·s + 1 − ᾱ)) Vᵀ (z − √ᾱ·m)
    E‖ε − E[ε | z]‖² / d = mean of ᾱ·s / (ᾱ·s + 1 − ᾱ)                             its least possible loss

An observation y = A x + τ·n makes N(0, Σ) another Gaussian, N(G y, Σ − G A Σ) with G = Σ Aᵀ (A Σ Aᵀ + τ²)⁻¹. What it
is worth is the mutual information (I-MMSE, Guo, Shamai & Verdú 2005; λ = log ᾱ/(1−ᾱ)):

    d/2 ∫ (loss of the prior − loss of the posterior) dλ = I(x; y) = ½ log det(1 + A Σ Aᵀ / τ²)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from powersteer.core.errors import PowersteerError

Map = Literal["blur", "mask", "edges"]
"""A picture blurred, half hidden, or its differences to the right and downwards."""

BLUR_PIXELS = 1.5
"""Standard deviation of the blur."""


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian over pictures (side × side, one channel) around a mean, by its covariance's eigenvectors."""

    variances: torch.Tensor
    """s, (d,) with d = side², float64."""
    vectors: torch.Tensor
    """V, (d, d), one eigenvector a column."""

    @classmethod
    def of(cls, covariance: torch.Tensor) -> Gaussian:
        """From a covariance (d, d)."""
        variances, vectors = torch.linalg.eigh(covariance.double())
        return cls(variances.clamp_min(0), vectors)

    @property
    def side(self) -> int:
        """The side of a picture, in pixels."""
        return round(len(self.variances) ** 0.5)

    @property
    def covariance(self) -> torch.Tensor:
        """Σ, (d, d)."""
        return (self.vectors * self.variances) @ self.vectors.T

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pictures (count, 1, side, side) in float64, around zero."""
        white = torch.randn(count, len(self.variances), generator=generator, dtype=torch.float64)
        return (white * self.variances.sqrt() @ self.vectors.T).view(count, 1, self.side, self.side)

    def denoise(self, noisy: torch.Tensor, alpha: torch.Tensor, mean: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The best guess at the noise, E[ε | z].

        Args:
            noisy: z, (B, 1, side, side).
            alpha: ᾱ, (B,), in (0, 1).
            mean: m, of the pictures' shape.

        Returns:
            (B, 1, side, side) in float64.
        """
        alpha = alpha.double()[:, None]  # (B, 1)
        centred = (noisy.double() - alpha[..., None, None].sqrt() * mean).flatten(1) @ self.vectors  # (B, d)
        guess = centred * (1 - alpha).sqrt() / (alpha * self.variances + 1 - alpha)
        return (guess @ self.vectors.T).view(noisy.shape)

    def loss(self, alpha: torch.Tensor) -> torch.Tensor:
        """The least possible denoising loss, per pixel of ε, at each ᾱ (T,): (T,)."""
        signal = alpha.double()[:, None] * self.variances  # (T, d)
        return (signal / (signal + 1 - alpha.double()[:, None])).mean(1)


@dataclass(frozen=True)
class Observation:
    """y = A x + τ·n, an observation of k maps as large as the picture."""

    matrix: torch.Tensor
    """A, (k·d, d), float64."""
    noise: float
    """τ."""

    def observe(self, pictures: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Observations (N, k, side, side), in float64, of pictures (N, 1, side, side)."""
        clean = pictures.double().flatten(1) @ self.matrix.T
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        return (clean + self.noise * noise).view(len(pictures), -1, *pictures.shape[-2:])

    def posterior(self, prior: Gaussian) -> Posterior:
        """What is known of a picture drawn from ``prior`` once it is observed."""
        covariance = prior.covariance
        across = covariance @ self.matrix.T  # Σ Aᵀ, (d, k·d)
        gain = torch.linalg.solve(self._covariance(prior), across.T).T
        left = covariance - gain @ across.T
        return Posterior(Gaussian.of((left + left.T) / 2), gain)

    def information(self, prior: Gaussian) -> float:
        """I(x; y) in nats."""
        scaled = self._covariance(prior) / self.noise**2
        return torch.linalg.slogdet(scaled).logabsdet.item() / 2

    def spread(self, prior: Gaussian) -> float:
        """The largest standard deviation of an observed value."""
        return self._covariance(prior).diagonal().max().sqrt().item()

    def _covariance(self, prior: Gaussian) -> torch.Tensor:
        """The covariance of y: A Σ Aᵀ + τ²."""
        seen = self.matrix @ prior.covariance @ self.matrix.T
        return seen + self.noise**2 * torch.eye(len(seen), dtype=torch.float64)


@dataclass(frozen=True)
class Posterior:
    """p(x | y): a Gaussian of one shape around a mean that moves with y."""

    around: Gaussian
    gain: torch.Tensor
    """G, (d, k·d)."""

    def mean(self, observed: torch.Tensor) -> torch.Tensor:
        """E[x | y], (N, 1, side, side), of observations (N, k, side, side)."""
        side = self.around.side
        return (observed.double().flatten(1) @ self.gain.T).view(-1, 1, side, side)

    def denoise(self, noisy: torch.Tensor, alpha: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        """E[ε | z, y]; see `Gaussian.denoise`."""
        return self.around.denoise(noisy, alpha, self.mean(observed))


def gaussian_field(side: int = 16, length: float = 4.0, exponent: float = 1.5) -> Gaussian:
    """A stationary field of unit variance with the power spectrum (1/length² + k²)^-exponent.

    It lives on a torus twice as wide and is seen through a window: what zero-padding convolutions are used to.

    Args:
        side: Of the window, pixels.
        length: Over which it is correlated, pixels.
        exponent: The higher, the smoother.
    """
    k = 2 * torch.pi * torch.fft.fftfreq(2 * side, dtype=torch.float64)
    power = (1 / length**2 + k[:, None] ** 2 + k**2) ** -exponent
    correlation = torch.fft.ifft2(power).real
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (d, 2)
    down, right = (place[:, None] - place).unbind(-1)  # (d, d) each; a negative one counts from the far edge
    return Gaussian.of(correlation[down, right] / correlation[0, 0])


def observation(kind: str, side: int = 16, noise: float = 0.2) -> Observation:
    """One of the maps of `Map`.

    Args:
        kind: ``blur``: with `BLUR_PIXELS`, weights that sum to one at the rim too; ``mask``: the right half is
            hidden and shows noise alone; ``edges``: differences to the next pixel, to the right and downwards.
        side: Of the picture, pixels.
        noise: τ, where pictures have unit variance.

    Raises:
        PowersteerError: The kind is unknown.
    """
    one = torch.eye(side, dtype=torch.float64)
    if kind == "blur":
        offset = torch.arange(side, dtype=torch.float64)
        kernel = torch.softmax(-((offset[:, None] - offset) ** 2) / (2 * BLUR_PIXELS**2), 1)
        matrix = torch.kron(kernel, kernel)
    elif kind == "mask":
        matrix = torch.kron(one, torch.diag((torch.arange(side) < side // 2).double()))
    elif kind == "edges":
        step = torch.diag(torch.ones(side - 1, dtype=torch.float64), 1) - one
        step[-1] = 0  # the last pixel has no next one
        matrix = torch.cat([torch.kron(one, step), torch.kron(step, one)])
    else:
        raise PowersteerError(f"the observation must be {', '.join(get_args(Map))}, not '{kind}'")
    return Observation(matrix, noise)
