"""The held-out denoising loss: fixed noise, stratified fixed timesteps, so that its curve is smooth."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from powersteer.data.encode import EncodedPairs
from powersteer.model import BPSModel
from powersteer.steering import steer
from powersteer.training.objective import denoising_target


class HeldOut:
    """Denoising losses on held-out pairs, the same noise for whatever is measured.

    Args:
        pipe: The frozen base.
        pairs: The held-out pairs.
        draws: How many (timestep, noise) draws each pair gets, one in each of so many equal bands of timesteps.
        seed: Of the noise.
    """

    def __init__(self, pipe: StableDiffusionPipeline, pairs: EncodedPairs, draws: int = 4, seed: int = 0) -> None:
        self.pipe, self.pairs = pipe, pairs
        generator = torch.Generator().manual_seed(seed)
        count, steps = len(pairs), pipe.scheduler.config.num_train_timesteps
        self.rows = torch.arange(count).repeat(draws)
        places = (torch.arange(draws)[:, None] + torch.rand(draws, count, generator=generator)) / draws
        self.timesteps = (places.flatten() * steps).long().clamp(max=steps - 1)
        self.noise = torch.randn(count * draws, *pairs.latents.shape[1:], generator=generator)

    @torch.no_grad()
    def losses(self, model: BPSModel | None, *, shuffled: bool = False, batch_size: int = 64) -> torch.Tensor:
        """Mean squared error of the denoiser's prediction for each draw, (N·draws,).

        Args:
            model: The steering network; ``None`` measures the prior.
            shuffled: Steer each pair with another pair's condition: the control.
            batch_size: Rows evaluated at once.
        """
        device = self.pipe.unet.device
        losses: list[torch.Tensor] = []
        for part in torch.arange(len(self.rows)).split(batch_size):
            rows, timesteps, noise = self.rows[part], self.timesteps[part], self.noise[part]
            latents = self.pairs.latents[rows]
            noisy = self.pipe.scheduler.add_noise(latents, noise, timesteps).to(device)
            text = self.pairs.text_states[self.pairs.text_rows[rows]].to(device)
            # Pairs of one concept lie side by side: half the folder away is another concept.
            shift = len(self.pairs) // 2 if shuffled else 0
            condition = self.pairs.condition((rows + shift) % len(self.pairs)).to(device)
            with steer(self.pipe.unet, model, condition) if model is not None else nullcontext():
                guess = self.pipe.unet(noisy, timesteps.to(device), text).sample
            target = denoising_target(self.pipe.scheduler, latents, noise, timesteps)
            losses.append(F.mse_loss(guess.float().cpu(), target, reduction="none").mean((1, 2, 3)))
        return torch.cat(losses)
