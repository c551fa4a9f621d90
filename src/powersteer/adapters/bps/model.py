"""Bayesian Power Steering: the network.

D. Huang, T. Li, J. Huang, "Bayesian Power Steering: An Effective Approach for Domain Adaptation of Diffusion
Models", ICML 2024. A frozen denoiser is a prior over images; a condition c makes it a posterior:

    ε̄*(z_t, t, text, c) = ε*(z_t, t, text) − σ_t ∇ log p(c | z_t, text)        "the steering"

The network reads only c and the timestep, and intervenes in the frozen U-Net's hidden features, strongly at
the head and lightly at the foot:

    c → PixelUnshuffle → conv_in → CP, contracting path ─ skips ─┐
                                     → TP, transition path       │
                                        → EP, expanding path ← ──┘

Every ResBlock of CP, TP as a whole and every block of EP has its own zero-initialised output convolution: at
step 0 the steered U-Net is exactly the prior. Residual i is added by `powersteer.adapters.attach` to every ResNet and
every spatial transformer of U-Net block i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from os import PathLike
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from powersteer.adapters.bps.adapter import BPSAdapter
from powersteer.adapters.bps.presets import network_shape
from powersteer.adapters.hub import HubMixin
from powersteer.backbones.fingerprint import fingerprint
from powersteer.core.errors import PowersteerError
from powersteer.core.weights import filled

GROUP_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Steering:
    """The weighted residuals in U-Net order: one for each ResNet of the down blocks, the middle, the up blocks."""

    down: list[torch.Tensor]
    mid: torch.Tensor
    up: list[torch.Tensor]


class TimeResBlock(nn.Module):
    """Time-aware residual block of CP and TP: the time embedding scales and shifts the second norm."""

    def __init__(self, in_channels: int, out_channels: int, time_embed_dim: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, 2 * out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_conv(out_channels, out_channels)
        self.conv_shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        scale, shift = self.time_emb_proj(F.silu(time_embedding))[:, :, None, None].chunk(2, 1)  # 2 × (B, out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.conv_shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class LightBlock(nn.Module):
    """Residual block of EP: one convolution, no time."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm = group_norm(groups, in_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = zero_conv(in_channels, out_channels)
        self.conv_shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_shortcut(x) + self.conv(self.dropout(F.silu(self.norm(x))))  # (B, out, H, W)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels (the SDXL variant)."""

    def __init__(self, channels: int, head_dim: int, groups: int) -> None:
        super().__init__()
        if channels % head_dim:
            raise PowersteerError(f"attention_head_dim={head_dim} does not divide the width {channels}")
        self.heads = channels // head_dim
        self.norm = group_norm(groups, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = zero_conv(channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2)  # (B, 3·C, H·W), channels ordered head, q|k|v, width
        qkv = qkv.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2)  # (B, heads, 3, H·W, C/heads)
        q, k, v = qkv.contiguous().unbind(2)  # flash attention wants the width last
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(h.transpose(-1, -2).reshape(x.shape))


class BPSModel(BPSAdapter, HubMixin, ConfigMixin):
    """The steering network for one U-Net shape and one kind of condition; see `from_unet`.

    Args:
        conditioning_channels: Channels of the condition (1 sketch, 3 RGB, 4 style: colour and structure).
        pixel_unshuffle: Pixels of the condition a side of one latent: the VAE's scale factor, or 1 for feature
            maps at latent resolution.
        block_out_channels: The U-Net's width at each level.
        layers_per_block: The U-Net's ResNets in each down block, one number a level.
        time_embed_dim: Width of the U-Net's time embedding.
        norm_num_groups: Groups of every GroupNorm; the U-Net's own.
        attention_head_dim: Head width of the self-attention in CP and TP (SDXL: 64); none by default.
        hidden_channels: Width of CP and TP at each level; the U-Net's by default.
        up_channels: Width of EP at each level; that of CP by default.
        output_kernel_size: Of the output convolutions.
        down_weights: Integration weight of CP at each level; see `powersteer.adapters.bps.presets`.
        mid_weight: Integration weight of TP.
        up_weight: Integration weight of EP.
        trainable_weights: Whether the integration weights are trained, one for each residual.
        dropout: Drop-out before the last convolution of each block.
        conditioning: What the condition is, for whoever loads the weights: kind, range, polarity, palette.
        base: What the network steers; see `powersteer.backbones.fingerprint`.
    """

    presets = ("paper", "lite")
    _supports_gradient_checkpointing = True
    config_name = "config.json"

    @register_to_config
    def __init__(  # the entries of config.json, as diffusers has them; the paths in the order of the drawing
        self,
        conditioning_channels: int = 1,
        pixel_unshuffle: int = 8,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: Sequence[int] = (2, 2, 2, 2),
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
        attention_head_dim: int | None = None,
        hidden_channels: Sequence[int] | None = None,
        up_channels: Sequence[int] | None = None,
        output_kernel_size: int = 3,
        down_weights: Sequence[float] = (16.0, 8.0, 4.0, 2.0),
        mid_weight: float = 16.0,
        up_weight: float = 1.0,
        trainable_weights: bool = False,
        dropout: float = 0.0,
        conditioning: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # `BPSAdapter.residuals` heeds it
        hidden = hidden_channels or block_out_channels
        levels = list(zip(block_out_channels, hidden, up_channels or hidden, layers_per_block, strict=True))
        groups = norm_num_groups

        def time_block(in_channels: int, out_channels: int) -> TimeResBlock:
            return TimeResBlock(in_channels, out_channels, time_embed_dim, groups, dropout)

        def attention(channels: int) -> nn.Module:
            return SelfAttention(channels, attention_head_dim, groups) if attention_head_dim else nn.Identity()

        def output(in_channels: int, out_channels: int) -> nn.Conv2d:
            return zero_conv(in_channels, out_channels, output_kernel_size)

        width = levels[0][1]
        self.conv_in = nn.Conv2d(conditioning_channels * pixel_unshuffle**2, width, 3, padding=1)
        # CP
        self.down_blocks, self.down_attentions, self.down_outputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        skips = [width]
        for level, (unet_width, cp_width, _, depth) in enumerate(levels):
            for _ in range(depth):
                self.down_blocks.append(time_block(width, cp_width))
                self.down_attentions.append(attention(cp_width))
                self.down_outputs.append(output(cp_width, unet_width))
                width = cp_width
                skips.append(width)
            if level + 1 < len(levels):
                self.downsamplers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        # TP
        self.mid_blocks = nn.ModuleList([time_block(width, width), time_block(width, width)])
        self.mid_attention = attention(width)
        self.mid_output = output(width, block_out_channels[-1])
        # EP
        self.up_blocks, self.up_outputs, self.upsamplers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (unet_width, _, ep_width, depth) in reversed(list(enumerate(levels))):
            for _ in range(depth + 1):
                self.up_blocks.append(LightBlock(width + skips.pop(), ep_width, groups, dropout))
                self.up_outputs.append(output(ep_width, unet_width))
                width = ep_width
            if level > 0:
                self.upsamplers.append(nn.Conv2d(width, width, 3, padding=1))

        down = [weight for weight, depth in zip(down_weights, layers_per_block, strict=True) for _ in range(depth)]
        weights = torch.tensor([*down, mid_weight, *[up_weight] * len(self.up_blocks)], dtype=torch.float32)
        self.weights = nn.Parameter(weights, requires_grad=trainable_weights)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        conditioning_channels: int = 1,
        pixel_unshuffle: int = 8,
        preset: Literal["paper", "lite"] = "paper",
        weights: str | Sequence[float] = "head-heavy",
        prediction_type: str | None = None,
        **config: Any,
    ) -> BPSModel:
        """An untrained network for ``unet``: its widths, depths, norm groups and time embedding.

        Args:
            unet: The U-Net to steer. SDXL's gets self-attention in CP and TP.
            conditioning_channels: Channels of the condition.
            pixel_unshuffle: The VAE's scale factor; see `BPSModel`.
            preset: ``paper``, or ``lite``; see `powersteer.adapters.bps.presets.lite_widths`.
            weights: ``head-heavy``, ``uniform``, or one number for each level of CP, then TP's, then EP's.
            prediction_type: The scheduler's, recorded in the fingerprint.
            **config: Further arguments of `BPSModel`.

        Raises:
            ValueError: ``preset`` or ``weights`` is unknown, or ``weights`` of the wrong length.
        """
        shape: dict[str, Any] = network_shape(unet, preset, weights) | {"base": fingerprint(unet, prediction_type)}
        return cls(conditioning_channels=conditioning_channels, pixel_unshuffle=pixel_unshuffle, **shape | config)

    @classmethod
    def from_original(cls, source: str | PathLike[str] | Mapping[str, torch.Tensor], **config: Any) -> BPSModel:
        """The authors' trained network; see `powersteer.adapters.bps.original.load_original`."""
        from powersteer.adapters.bps.original import load_original

        shape, state = load_original(source, **config)
        try:
            return filled(lambda: cls(**shape), state, "the checkpoint").eval()
        except PowersteerError as error:
            raise PowersteerError(f"the weights are not those of one BPS network: {error}") from None

    def forward(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> Steering:
        """The weighted residuals for a condition at a timestep.

        Args:
            condition: (B, C, H, W) in [0, 1], H and W the latents' times ``pixel_unshuffle``.
            time_embedding: (B, 4·w_0) or (1, 4·w_0), the U-Net's own, after its MLP.
        """
        outermost = len(self.config["block_out_channels"]) - 1
        weights = iter(self.weights.unbind())
        h = self.conv_in(F.pixel_unshuffle(condition, self.config["pixel_unshuffle"]))  # (B, w_0, H/f, W/f)
        skips = [h]

        down: list[torch.Tensor] = []
        blocks = iter(zip(self.down_blocks, self.down_attentions, self.down_outputs, strict=True))
        for level, depth in enumerate(self.config["layers_per_block"]):
            for _ in range(depth):
                block, attention, output = next(blocks)
                h = attention(block(h, time_embedding))  # (B, w_l, H/f/2^l, W/f/2^l)
                skips.append(h)
                down.append(next(weights) * output(h))
            if level < outermost:
                h = self.downsamplers[level](h)
                skips.append(h)

        first, second = self.mid_blocks
        h = second(self.mid_attention(first(h, time_embedding)), time_embedding)  # (B, w_L, …)
        mid = next(weights) * self.mid_output(h)

        up: list[torch.Tensor] = []
        light = iter(zip(self.up_blocks, self.up_outputs, strict=True))
        for step, depth in enumerate(reversed(self.config["layers_per_block"])):
            for _ in range(depth + 1):
                block, output = next(light)
                h = block(torch.cat([h, skips.pop()], 1))  # (B, w_l, …)
                up.append(next(weights) * output(h))
            if step < outermost:
                h = F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest")
                h = self.upsamplers[step](h)
        return Steering(down, mid, up)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """``groups`` groups, or as many as divide a width that is no multiple of them."""
    return nn.GroupNorm(gcd(groups, channels), channels, eps=GROUP_NORM_EPS)


def zero_conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """A convolution that starts at zero: an untrained network adds nothing."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """The identity, or a 1×1 convolution where the width changes."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
