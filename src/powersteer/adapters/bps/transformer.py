"""Bayesian Power Steering for diffusion transformers: the network.

The method is that of `powersteer.adapters.bps.model`: a frozen denoiser is a prior, and a network that reads only the
condition c and the timestep makes it a posterior by what it adds to hidden features. All blocks of a transformer work
at one resolution, so that the pyramid is the network's alone, and head and foot are early and late blocks:

    c → PixelUnshuffle → conv_in → CP, contracting path ─ skips ─┐
         (one cell a token)         → TP, transition path        │
                                       → EP, expanding path ← ───┘
                                          → stages: time-aware ResBlocks at one cell a token → F_1 … F_S

Block i of B adds w_i · head_i(F_s) to its image tokens, s = ⌊S·i/B⌋. Each head is a zero-initialised projection to the
transformer's width: at step 0 the steered transformer is exactly the prior. Features are what a plan keeps, for they
are a few hundred numbers a token, and heads are applied where the residual is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from powersteer.adapters.bps.model import LightBlock, TimeResBlock
from powersteer.adapters.bps.presets import depth_weights, transformer_shape
from powersteer.adapters.bps.transformer_adapter import BPSTransformerAdapter
from powersteer.adapters.hub import HubMixin
from powersteer.backbones.transformer import transformer_backbone

STAGES = 4


class BPSTransformerModel(BPSTransformerAdapter, HubMixin, ConfigMixin):
    """The steering network for one transformer's shape and one kind of condition; see `from_transformer`.

    Args:
        conditioning_channels: Channels of the condition (1 sketch, 3 RGB, 4 style: colour and structure).
        pixel_unshuffle: Condition pixels per token, along each side: the VAE's scale factor times the patch size, or
            the patch size for feature maps at latent resolution.
        inner_dim: Width of the transformer.
        num_layers: Its blocks that are steered.
        time_embed_dim: Width of its time features.
        hidden_channels: Width of CP, TP and EP at each level; the first is that of the features.
        layers_per_block: ResBlocks of CP at each level.
        stages: How many features there are.
        norm_num_groups: Groups of every GroupNorm.
        depth_weights: Integration weight of each block; see `powersteer.adapters.bps.presets.depth_weights`.
        trainable_weights: Whether the integration weights are trained.
        dropout: Drop-out before the last convolution of each ResBlock.
        conditioning: What the condition is, for whoever loads the weights: kind, range, polarity, palette.
        base: What the network steers; see `powersteer.backbones.fingerprint`.
    """

    presets = ("paper", "lite")
    _supports_gradient_checkpointing = True
    config_name = "config.json"

    @register_to_config
    def __init__(  # the entries of config.json, as diffusers has them
        self,
        conditioning_channels: int = 1,
        pixel_unshuffle: int = 16,
        inner_dim: int = 3072,
        num_layers: int = 57,
        time_embed_dim: int = 3072,
        hidden_channels: Sequence[int] = (192, 256, 384),
        layers_per_block: int = 1,
        stages: int = 4,
        norm_num_groups: int = 32,
        depth_weights: Sequence[float] | None = None,
        trainable_weights: bool = False,
        dropout: float = 0.0,
        conditioning: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # `BPSTransformerAdapter.residuals` heeds it
        groups = norm_num_groups

        def time_block(in_channels: int, out_channels: int) -> TimeResBlock:
            return TimeResBlock(in_channels, out_channels, time_embed_dim, groups, dropout)

        width = hidden_channels[0]
        self.conv_in = nn.Conv2d(conditioning_channels * pixel_unshuffle**2, width, 3, padding=1)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(hidden_channels):
            if level > 0:
                self.downsamplers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            blocks = [time_block(width if place == 0 else channels, channels) for place in range(layers_per_block)]
            self.down_blocks.append(nn.ModuleList(blocks))
            width = channels
        self.mid_blocks = nn.ModuleList([time_block(width, width), time_block(width, width)])
        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, channels in reversed(list(enumerate(hidden_channels))):
            self.up_blocks.append(LightBlock(width + channels, channels, groups, dropout))
            width = channels
            if level > 0:
                self.upsamplers.append(nn.Conv2d(width, width, 3, padding=1))
        self.stage_blocks = nn.ModuleList([time_block(width, width) for _ in range(stages)])
        self.heads = nn.ModuleList([zero_linear(width, inner_dim) for _ in range(num_layers)])
        weights = torch.tensor(list(depth_weights or [1.0] * num_layers), dtype=torch.float32)
        if len(weights) != num_layers:
            raise ValueError(f"depth_weights has {len(weights)} numbers for {num_layers} blocks: give one for each")
        self.weights = nn.Parameter(weights, requires_grad=trainable_weights)

    @classmethod
    def from_transformer(
        cls,
        transformer: Any,
        *,
        conditioning_channels: int = 1,
        pixel_unshuffle: int = 16,
        preset: str = "paper",
        weights: str | Sequence[float] = "head-heavy",
        prediction_type: str | None = None,
        **config: Any,
    ) -> BPSTransformerModel:
        """An untrained network for a transformer: its width, depth and time features.

        Args:
            transformer: The transformer to steer, of a family that `powersteer.backbones.transformer` knows.
            conditioning_channels: Channels of the condition.
            pixel_unshuffle: Condition pixels per token; see `BPSTransformerModel`.
            preset: ``paper``, or ``lite``; see `powersteer.adapters.bps.presets.transformer_shape`.
            weights: ``head-heavy``, ``uniform``, ``foot-heavy``, or one number for each block.
            prediction_type: The scheduler's, recorded in the fingerprint.
            **config: Further arguments of `BPSTransformerModel`.

        Raises:
            PowersteerError: No family knows the transformer.
            ValueError: ``preset`` or ``weights`` is unknown, or ``weights`` of the wrong length.
        """
        backbone = transformer_backbone(transformer)
        blocks = len(backbone.sites())
        shape: dict[str, Any] = transformer_shape(backbone.width, preset) | {
            "inner_dim": backbone.width,
            "num_layers": blocks,
            "stages": min(STAGES, blocks),
            "time_embed_dim": backbone.time_width,
            "depth_weights": depth_weights(weights, blocks),
            "base": backbone.fingerprint(prediction_type),
        }
        return cls(conditioning_channels=conditioning_channels, pixel_unshuffle=pixel_unshuffle, **shape | config)

    def stage_of(self, place: int) -> int:
        """Which of the features a block reads."""
        return len(self.stage_blocks) * place // len(self.heads)

    def forward(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> list[torch.Tensor]:
        """The features of every stage for a condition at a timestep, (B, h·w, width), tokens in raster order.

        Args:
            condition: (B, C, H, W) in [0, 1], H and W the tokens' grid times ``pixel_unshuffle``.
            time_embedding: (B, time_embed_dim) or (1, time_embed_dim), the transformer's own, of the time alone.
        """
        h = self.conv_in(F.pixel_unshuffle(condition, self.config["pixel_unshuffle"]))  # (B, w_0, h, w)
        skips: list[torch.Tensor] = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                h = self.downsamplers[level - 1](h)
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                h = block(h, time_embedding)
            skips.append(h)
        for block in self.mid_blocks:
            h = block(h, time_embedding)
        for step, block in enumerate(self.up_blocks):
            h = block(torch.cat([h, skips.pop()], 1))
            if skips:
                h = self.upsamplers[step](F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
        features: list[torch.Tensor] = []
        for block in self.stage_blocks:
            h = block(h, time_embedding)
            features.append(h.flatten(2).transpose(1, 2).contiguous())
        return features

    def residual(self, place: int, features: torch.Tensor) -> torch.Tensor:
        """What block ``place`` adds to its image tokens, (B, h·w, inner_dim), from the features of its stage."""
        return self.weights[place] * self.heads[place](features)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A projection that starts at zero: an untrained network adds nothing."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
