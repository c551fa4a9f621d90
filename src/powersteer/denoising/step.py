"""One denoising step: mix noise in, predict, compare. Training, held-out losses and benches take the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from powersteer.backbones.protocol import PipelineBackbone
from powersteer.data.encode import TextStates
from powersteer.denoising.objective import Objective

Denoise = Callable[..., torch.Tensor]
"""A function (noisy latents, times, **inputs) → the prediction (B, C, h, w)."""


@dataclass(frozen=True)
class Batch:
    """What one step denoises."""

    latents: torch.Tensor
    """Clean latents z (B, C, h, w)."""
    noise: torch.Tensor
    """ε (B, C, h, w)."""
    times: torch.Tensor
    """The objective's times (B,)."""
    inputs: dict[str, Any]
    """What else the backbone is given: text states, and SDXL's sizes."""

    @classmethod
    def of(
        cls,
        base: PipelineBackbone,
        latents: torch.Tensor,
        noise: torch.Tensor,
        times: torch.Tensor,
        texts: TextStates,
    ) -> Batch:
        """Make it for a backbone."""
        return cls(latents, noise, times, base.inputs(texts, base.pixels(latents)))


def predict(
    denoise: Denoise, objective: Objective, batch: Batch, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Mix noise in and predict (B, C, h, w).

    Args:
        denoise: The backbone, steered or not.
        objective: What it was trained to do.
        batch: Clean latents, noise, times and inputs, on any device.
        device: Where the backbone is.
        dtype: Precision of the backbone's weights.
    """
    noisy = objective.corrupt(batch.latents, batch.noise, batch.times)
    times, inputs = objective.model_times(batch.times), _moved(batch.inputs, device, dtype)
    return denoise(noisy.to(device, dtype), times.to(device), **inputs)


def squared_errors(objective: Objective, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared error (B,) of a prediction (B, C, h, w), in float32 and where the prediction is."""
    target = objective.target(batch.latents, batch.noise, batch.times).to(prediction.device)
    return F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2, 3))


def denoiser(module: Any) -> Denoise:
    """A denoiser of diffusers as a function."""

    def denoise(noisy: torch.Tensor, times: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return module(noisy, times, **inputs).sample

    return denoise


def _moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: _moved(value, device, dtype) if isinstance(value, dict) else value.to(device, dtype)
        for name, value in inputs.items()
    }
