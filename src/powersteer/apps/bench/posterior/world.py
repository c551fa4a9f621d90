"""The little world in which everything is known: a Gaussian field, an observation of it, a schedule of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

from powersteer.denoising.objective import Objective, objective_of
from powersteer.evaluation.gaussian import Gaussian, Observation, Posterior, gaussian_field, observation

SIDE, LENGTH_PIXELS, EXPONENT, NOISE = 16, 4.0, 1.5, 0.1
"""The field's side and correlation length in pixels, and its exponent; and the observation's noise τ."""
BANDS = 4
"""Equal bands of times."""
DEVIATIONS = 4.0
"""An observed value within so many standard deviations of zero has its place in [0, 1]; 1 in 16,000 has not."""
WIDTHS, TEXT_WIDTH = (16, 32, 64), 8


@dataclass(frozen=True)
class Pairs:
    """Samples of the field, and what was observed of each."""

    pictures: torch.Tensor
    """(N, 1, side, side), float64."""
    observed: torch.Tensor
    """(N, k, side, side), float64."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, rows: Any) -> Pairs:
        return Pairs(self.pictures[rows], self.observed[rows])


@dataclass(frozen=True)
class Noisy:
    """Pairs, each with noise of its own strength."""

    pairs: Pairs
    times: torch.Tensor
    """(N,)."""
    noise: torch.Tensor
    """ε, like the pictures."""
    objective: Objective

    def __getitem__(self, rows: Any) -> Noisy:
        return Noisy(self.pairs[rows], self.times[rows], self.noise[rows], self.objective)

    @property
    def alphas(self) -> torch.Tensor:
        """ᾱ of each, (N,)."""
        return self.objective.signal(self.times)

    @property
    def pictures(self) -> torch.Tensor:
        """z = √ᾱ·x + √(1−ᾱ)·ε."""
        return self.objective.corrupt(self.pairs.pictures, self.noise, self.times)


class World:
    """Prior, observation, posterior and noise.

    Args:
        kind: Of observation; see `powersteer.evaluation.gaussian.observation`.

    Raises:
        PowersteerError: The kind is unknown.
    """

    def __init__(self, kind: str) -> None:
        self.observation: Observation = observation(kind, SIDE, NOISE)
        self.field: Gaussian = gaussian_field(SIDE, LENGTH_PIXELS, EXPONENT)
        self.posterior: Posterior = self.observation.posterior(self.field)
        schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.objective: Objective = objective_of(schedule)
        """The noise is predicted, on Stable Diffusion's schedule."""
        self.alphas: torch.Tensor = self.objective.signal(self.objective.times)
        """ᾱ of all times."""
        self._range = DEVIATIONS * self.observation.spread(self.field)

    def draw(self, count: int, generator: torch.Generator) -> Pairs:
        """Fresh pairs."""
        pictures = self.field.sample(count, generator)
        return Pairs(pictures, self.observation.observe(pictures, generator))

    def disturb(self, pairs: Pairs, times: torch.Tensor, generator: torch.Generator) -> Noisy:
        """The pairs with noise of the times' strength, (N,)."""
        noise = torch.randn(pairs.pictures.shape, generator=generator, dtype=torch.float64)
        return Noisy(pairs, times, noise, self.objective)

    def stratified(self, count: int, strata: int, generator: torch.Generator) -> torch.Tensor:
        """Times (strata, count): in each row one for each pair, all from one of so many equal bands."""
        places = torch.arange(strata)[:, None] + torch.rand(strata, count, generator=generator)
        return self.objective.at(places / strata)

    def condition(self, observed: torch.Tensor) -> torch.Tensor:
        """The observation as adapters read it: a picture in [0, 1] of one channel, or of three.

        Two maps are the red and the green of a picture whose blue stays at one half.

        Args:
            observed: (N, k, side, side).
        """
        picture = (0.5 + observed / (2 * self._range)).clamp(0, 1).float()
        return picture if picture.shape[1] == 1 else F.pad(picture, (0, 0, 0, 0, 0, 3 - picture.shape[1]), value=0.5)

    @property
    def condition_channels(self) -> int:
        """1 or 3."""
        return 1 if len(self.observation.matrix) == SIDE**2 else 3


def make_unet() -> UNet2DConditionModel:
    """An untrained U-Net small enough for a laptop: three levels, attention in the inner two, no text to speak of."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def predict(unet: Any, noisy: Noisy) -> torch.Tensor:
    """The U-Net's guess at the noise, (N, 1, side, side) in float32; the text is one empty token."""
    text = torch.zeros(len(noisy.pairs), 1, TEXT_WIDTH)
    pictures = noisy.pictures.float().contiguous(memory_format=torch.channels_last)
    return unet(pictures, noisy.objective.model_times(noisy.times), text).sample
