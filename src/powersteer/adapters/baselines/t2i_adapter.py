"""T2I-Adapter (Mou et al., AAAI 2024), diffusers' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import T2IAdapter
from diffusers.configuration_utils import register_to_config
from torch import nn

from powersteer.adapters.baselines._baseline import Baseline
from powersteer.adapters.protocol import ResidualAdapter
from powersteer.backbones.protocol import Backbone


class ZeroStartT2IAdapter(Baseline, ResidualAdapter, T2IAdapter):
    """Diffusers' full T2I-Adapter, each feature behind a zero-initialised 1×1 convolution.

    The original starts with random features, which would not be the prior. A feature is added to the last layer of its
    level, before the downsampler, as in the T2I-Adapter of Stable Diffusion 1.x, for every base.
    """

    presets = ("t2i-adapter",)
    reads_time = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        channels: tuple[int, ...] = (320, 640, 1280, 1280),
        num_res_blocks: int = 2,
        downscale_factor: int = 8,
    ) -> None:
        super().__init__(in_channels, list(channels), num_res_blocks, downscale_factor, "full_adapter")
        self.outputs = nn.ModuleList([nn.Conv2d(width, width, 1) for width in channels])
        for parameter in self.outputs.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Condition (B, C, H, W) in [0, 1] → one feature a level, (B, w_l, H/f/2^l, W/f/2^l)."""
        return [output(feature) for output, feature in zip(self.outputs, super().forward(x), strict=True)]

    @classmethod
    def untrained(cls, unet: Any, channels: int, factor: int) -> Any:
        """See `Baseline.untrained`; as wide as the U-Net."""
        widths = tuple(unet.config["block_out_channels"])
        return cls(channels, widths, downscale_factor=factor)

    @property
    def reads(self) -> int:
        """Channels that it reads."""
        return self.recorded["in_channels"]

    @property
    def factor(self) -> int:
        """Condition pixels per latent pixel, along each side."""
        return self.recorded["downscale_factor"]

    @property
    def base_widths(self) -> list[int]:
        """Block widths of the U-Net that it was made for."""
        return list(self.recorded["channels"])

    def sites(self, backbone: Backbone) -> Iterator[tuple[int, nn.Module]]:
        """The last layer of each encoder level."""
        for level, block in enumerate(backbone.module.down_blocks):
            yield level, getattr(block, "attentions", block.resnets)[-1]

    def residuals(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> list[torch.Tensor]:
        """One feature a level, whatever the time."""
        del time_embedding
        return self(condition)
