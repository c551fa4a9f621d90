"""What the denoiser is asked to predict: noise, velocity or picture, as its scheduler says."""

from __future__ import annotations

from typing import Any

import torch

from powersteer.errors import PowersteerError


def denoising_target(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The target (B, C, h, w) of the ordinary denoising loss.

    With ᾱ = ``alphas_cumprod``: ε, or v = √ᾱ·ε − √(1−ᾱ)·z (Salimans & Ho, ICLR 2022), or z.

    Args:
        scheduler: Of the base; its ``prediction_type`` decides.
        latents: Clean latents z (B, C, h, w).
        noise: ε, of the same shape.
        timesteps: (B,), integers below ``num_train_timesteps``.

    Raises:
        PowersteerError: The prediction type is unknown.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    if kind != "v_prediction":
        raise PowersteerError(f"the base predicts '{kind}': only epsilon, v_prediction and sample can be trained")
    alpha = scheduler.alphas_cumprod.to(latents)[timesteps.to(latents.device)][:, None, None, None]
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
