"""Networks with one thing taken away, for `powersteer compare`; what a configuration key can take away is not here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from powersteer.adapters.bps.model import BPSModel, Steering
from powersteer.adapters.steering import steered_layers


class WithoutTime(BPSModel):
    """BPS that is not told the noise level: its time embedding is zero."""

    def forward(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> Steering:
        """See `BPSModel.forward`."""
        return super().forward(condition, torch.zeros_like(time_embedding))


class AddedOnce(BPSModel):
    """BPS whose residuals are added once a U-Net layer, not after ResNet and transformer both; see `last_layers`."""


class ConditionalHalf(BPSModel):
    """BPS that steers only the text-conditional half of classifier-free guidance: ε(∅) + w·(ε(text, c) − ε(∅)).

    It trains as BPS does, to the same weights; only pictures differ. Guidance then amplifies the steering, too.
    """


ABLATIONS: dict[str, type[BPSModel]] = {
    "no-time": WithoutTime,
    "added-once": AddedOnce,
    "conditional-half": ConditionalHalf,
}

NO_LATENTS = "no-latents"


class WithoutLatents(ControlNetModel):
    """ControlNet that is not shown the noisy latents: it knows what BPS knows, timestep and condition, and the text."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `ControlNetModel.forward`."""
        return super().forward(torch.zeros_like(sample), *args, **kwargs)


def last_layers(unet: Any) -> Iterator[tuple[int, nn.Module]]:
    """Where `AddedOnce` adds: the last of the layers that share a residual."""
    last = dict(steered_layers(unet))  # of each position, the last named: its transformer where it has one
    middle = sum(len(block.resnets) for block in unet.down_blocks)
    last[middle] = unet.mid_block.resnets[-1]
    yield from last.items()
