"""What the denoiser is asked to predict, and how much each timestep counts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from powersteer.core.errors import PowersteerError


def noise_schedule(pipe: Any) -> Any:
    """The noise that the base was trained with, whatever scheduler it samples with."""
    return DDPMScheduler.from_config(pipe.scheduler.config)


LOWEST_LOG_SNR = -6.0
"""Below, a latent tells of the picture at most ½·e^−6 nats a dimension of unit variance."""


def timestep_probabilities(scheduler: Any, log_snr_share: float) -> torch.Tensor:
    """Probabilities (T,) to draw timesteps with: a share of them even in log-SNR, the others even in t.

    What a condition tells is the denoising gain integrated over log-SNR λ = log(ᾱ / (1−ᾱ)) (see
    `powersteer.evaluation.information`); timesteps that are even in t seldom see the little noise, and so the fine
    details, that much of this range consists of.

    Args:
        scheduler: Of the base.
        log_snr_share: In [0, 1].
    """
    log_snr = scheduler.alphas_cumprod.double().logit().clamp(min=LOWEST_LOG_SNR)
    none, steps = log_snr.new_zeros(1), -log_snr.diff()
    widths = torch.cat([steps, none]) + torch.cat([none, steps])
    return log_snr_share * widths / widths.sum() + (1 - log_snr_share) / len(widths)


def denoising_target(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The target (B, C, h, w) of the ordinary denoising loss: noise, velocity or picture, as the scheduler says.

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


def min_snr_weights(scheduler: Any, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """Weights (B,) of the loss that count every timestep as min(SNR, γ) on the picture (Hang et al., ICCV 2023).

    With SNR = ᾱ / (1 − ᾱ), a squared error of z is one of ε over SNR and one of v over (SNR + 1).

    Args:
        scheduler: Of the base.
        timesteps: (B,).
        snr_gamma: γ.
    """
    alpha = scheduler.alphas_cumprod.double()[timesteps.cpu()]
    snr = alpha / (1 - alpha)
    of_one = {"epsilon": snr, "v_prediction": snr + 1}.get(scheduler.config["prediction_type"], torch.ones_like(snr))
    # Where nothing of the picture is left (zero terminal SNR), ε says nothing and the weight is 1: its limit.
    return torch.where(snr > 0, snr.clamp(max=snr_gamma) / of_one.clamp(min=1e-20), torch.ones_like(snr)).float()
