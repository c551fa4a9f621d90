"""Distance between two sets of pictures by their features: Fréchet (FID) and kernel (KID); float64 throughout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from powersteer.core.errors import PowersteerError

FEW = 2048
"""Pictures below which a Fréchet distance is biased too much to be compared with anyone else's."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
KID_SEED = 2020


@dataclass(frozen=True)
class KernelDistance:
    """KID over random subsets."""

    mean: float
    spread: float
    """Standard deviation over the subsets."""
    subsets: int
    subset_size: int
    seed: int


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) of features (N, D) and (M, D) (Heusel et al., NeurIPS 2017).

    With Σ = RᵀR, the trace of the root is the sum of the singular values of R₁R₂ᵀ: exact where Σ is singular too.

    Raises:
        PowersteerError: Fewer than two pictures, or features of different widths.
    """
    _check(real, generated, 2)
    (mean1, root1), (mean2, root2) = _moments(real), _moments(generated)
    shared = torch.linalg.svdvals(root1 @ root2.T).sum()
    return ((mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * shared).item()


def kernel_distance(
    real: torch.Tensor,
    generated: torch.Tensor,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int | None = None,
    seed: int = KID_SEED,
) -> KernelDistance:
    """Unbiased MMD² under the kernel (x·y / D + 1)³ of features (N, D) and (M, D) (Bińkowski et al., ICLR 2018).

    Args:
        real: Of real pictures.
        generated: Of generated ones.
        subsets: How many.
        subset_size: Pictures in each; by default 1000, and of small sets half the smaller one, lest subsets be alike.
        seed: Of the subsets; they are torch-fidelity's of this seed.

    Raises:
        PowersteerError: Fewer than four pictures, a subset larger than a set, or features of different widths.
    """
    _check(real, generated, 4)
    fewest = min(len(real), len(generated))
    size = min(KID_SUBSET_SIZE, fewest // 2) if subset_size is None else subset_size
    if size > fewest:
        raise PowersteerError(f"a KID subset of {size} is larger than the {fewest} pictures there are: make it smaller")
    one, other = real.double().cpu(), generated.double().cpu()
    chance = np.random.RandomState(seed)
    distances: list[float] = []
    for _ in range(subsets):
        x = one[torch.from_numpy(chance.choice(len(one), size, replace=False))]
        y = other[torch.from_numpy(chance.choice(len(other), size, replace=False))]
        distances.append(_mmd2(x, y))
    values = np.array(distances)
    return KernelDistance(float(values.mean()), float(values.std()), subsets, size, seed)


def few_pictures(count: int) -> str | None:
    """What to say of so few pictures, if anything."""
    if count >= FEW:
        return None
    return (
        f"{count} pictures are fewer than {FEW:,}: a Fréchet distance is biased upwards, compare it only with one of "
        "as many pictures; KID is not biased"
    )


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and a root R (≤ D, D) of the covariance, Σ = RᵀR."""
    features = features.double().cpu()
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R


def _mmd2(x: torch.Tensor, y: torch.Tensor) -> float:
    """The squared maximum mean discrepancy, estimated without bias, between two sets (n, D) of one size."""
    count, width = x.shape

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / width + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return float(within / (count * (count - 1)) - 2 * kernel(x, y).mean())


def _check(real: torch.Tensor, generated: torch.Tensor, fewest: int) -> None:
    if min(len(real), len(generated)) < fewest:
        raise PowersteerError(
            f"{len(real)} real and {len(generated)} generated pictures: give at least {fewest} of each"
        )
    if real.shape[1] != generated.shape[1]:
        raise PowersteerError(f"features of width {real.shape[1]} and {generated.shape[1]} cannot be compared")
