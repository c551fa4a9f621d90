"""BPS with one thing taken away, for `powersteer compare`; what a configuration key can take away is not here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from powersteer.adapters.bps.model import BPSModel, Steering
from powersteer.backbones.protocol import Backbone


class WithoutTime(BPSModel):
    """BPS that is not told the noise level: its time embedding is zero."""

    ablation = "no-time"

    def forward(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> Steering:
        """See `BPSModel.forward`."""
        return super().forward(condition, torch.zeros_like(time_embedding))


class AddedOnce(BPSModel):
    """BPS whose residuals are added once a U-Net layer, not after ResNet and transformer both."""

    ablation = "added-once"

    def sites(self, backbone: Backbone) -> Iterator[tuple[int, nn.Module]]:
        """The last of the layers that share a residual."""
        last = dict(backbone.sites())  # of each position, the last named: its transformer where it has one
        middle = sum(len(block.resnets) for block in backbone.module.down_blocks)
        last[middle] = backbone.module.mid_block.resnets[-1]
        yield from last.items()


class ConditionalHalf(BPSModel):
    """BPS that steers only the text-conditional half of classifier-free guidance: ε(∅) + w·(ε(text, c) − ε(∅)).

    It trains as BPS does, to the same weights; only pictures differ. Guidance then amplifies the steering, too.
    """

    ablation = "conditional-half"
    steers_unconditional = False
