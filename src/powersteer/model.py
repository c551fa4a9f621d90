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
step 0 the steered U-Net is exactly the prior. Residual i is added by `powersteer.steering` to every ResNet and
every spatial transformer of U-Net block i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

GROUP_NORM_EPS = 1e-5


def integration_weights(preset: str, levels: int) -> tuple[tuple[float, ...], float, float]:
    """How strongly each part of the U-Net is steered: (CP per level from the outermost, TP, EP).

    | preset      | levels   | CP           | TP | EP |
    |-------------|----------|--------------|----|----|
    | head-heavy  | 4 (SD)   | 16, 8, 4, 2  | 16 | 1  |
    | head-heavy  | 3 (SDXL) | 32, 16, 8    | 32 | 1  |
    | uniform     | any      | 1, …, 1      | 1  | 1  |

    Raises:
        ValueError: ``preset`` is neither ``head-heavy`` nor ``uniform``.
    """
    if preset == "uniform":
        return (1.0,) * levels, 1.0, 1.0
    if preset == "head-heavy":
        head = 32.0 if levels == 3 else 2.0**levels
        return tuple(head / 2**level for level in range(levels)), head, 1.0
    raise ValueError(f"weights must be 'head-heavy', 'uniform' or a list of numbers, not '{preset}'")


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
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=GROUP_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
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
        self.norm = nn.GroupNorm(groups, in_channels, eps=GROUP_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv = zero_module(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.conv_shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_shortcut(x) + self.conv(self.dropout(F.silu(self.norm(x))))  # (B, out, H, W)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels (the SDXL variant)."""

    def __init__(self, channels: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2)  # (B, 3·C, H·W), channels ordered head, q|k|v, width
        q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)  # 3 × (B, heads, H·W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(h.transpose(-1, -2).reshape(x.shape))


class BPSModel(ModelMixin, ConfigMixin):
    """The steering network for one U-Net shape and one kind of condition.

    Args:
        conditioning_channels: Channels of the condition image (1 sketch, 3 RGB, 4 style: colour + structure).
        pixel_unshuffle: Pixels of the condition a side of one latent: the VAE's scale factor, or 1 for feature
            maps at latent resolution.
        block_out_channels: The U-Net's width at each level.
        layers_per_block: The U-Net's ResNets in each down block, one number a level.
        time_embed_dim: Width of the U-Net's time embedding.
        norm_num_groups: Groups of every GroupNorm; the U-Net's own.
        attention_head_dim: Head width of the self-attention in CP and TP (SDXL: 64); none by default.
        down_weights: Integration weight of CP at each level; see `integration_weights`.
        mid_weight: Integration weight of TP.
        up_weight: Integration weight of EP.
        trainable_weights: Whether the integration weights are trained, one for each residual.
        dropout: Drop-out before the last convolution of each block.
        conditioning_kind: What the condition is, in a word, for whoever loads the weights.
    """

    _supports_gradient_checkpointing = False
    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        conditioning_channels: int = 1,
        pixel_unshuffle: int = 8,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: Sequence[int] = (2, 2, 2, 2),
        time_embed_dim: int = 1280,
        norm_num_groups: int = 32,
        attention_head_dim: int | None = None,
        down_weights: Sequence[float] = (16.0, 8.0, 4.0, 2.0),
        mid_weight: float = 16.0,
        up_weight: float = 1.0,
        trainable_weights: bool = False,
        dropout: float = 0.0,
        conditioning_kind: str = "sketch",
    ) -> None:
        super().__init__()
        widths, depths, groups = list(block_out_channels), list(layers_per_block), norm_num_groups

        def time_block(in_channels: int, out_channels: int) -> TimeResBlock:
            return TimeResBlock(in_channels, out_channels, time_embed_dim, groups, dropout)

        def attention(channels: int) -> nn.Module:
            return SelfAttention(channels, attention_head_dim, groups) if attention_head_dim else nn.Identity()

        self.conv_in = nn.Conv2d(conditioning_channels * pixel_unshuffle**2, widths[0], 3, padding=1)
        # CP
        self.down_blocks, self.down_attentions, self.down_outputs = (
            nn.ModuleList(),
            nn.ModuleList(),
            nn.ModuleList(),
        )
        self.downsamplers = nn.ModuleList()
        width, skip_widths = widths[0], [widths[0]]
        for level, (out, depth) in enumerate(zip(widths, depths, strict=True)):
            for _ in range(depth):
                self.down_blocks.append(time_block(width, out))
                self.down_attentions.append(attention(out))
                self.down_outputs.append(zero_module(nn.Conv2d(out, out, 3, padding=1)))
                width = out
                skip_widths.append(out)
            if level + 1 < len(widths):
                self.downsamplers.append(nn.Conv2d(out, out, 3, stride=2, padding=1))
                skip_widths.append(out)
        # TP
        self.mid_blocks = nn.ModuleList([time_block(width, width), time_block(width, width)])
        self.mid_attention = attention(width)
        self.mid_output = zero_module(nn.Conv2d(width, width, 3, padding=1))
        # EP
        self.up_blocks, self.up_outputs, self.upsamplers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (out, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
            for _ in range(depth + 1):
                self.up_blocks.append(LightBlock(width + skip_widths.pop(), out, groups, dropout))
                self.up_outputs.append(zero_module(nn.Conv2d(out, out, 3, padding=1)))
                width = out
            if level > 0:
                self.upsamplers.append(nn.Conv2d(out, out, 3, padding=1))

        down = [w for w, depth in zip(down_weights, depths, strict=True) for _ in range(depth)]
        weights = torch.tensor([*down, mid_weight, *[up_weight] * len(self.up_blocks)], dtype=torch.float32)
        self.weights = nn.Parameter(weights, requires_grad=trainable_weights)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        conditioning_channels: int = 1,
        pixel_unshuffle: int = 8,
        weights: str | Sequence[float] = "head-heavy",
        **config: Any,
    ) -> BPSModel:
        """An untrained network for ``unet``: its widths, depths, norm groups and time embedding.

        Args:
            unet: The U-Net to steer.
            conditioning_channels: Channels of the condition image.
            pixel_unshuffle: The VAE's scale factor; see `BPSModel`.
            weights: ``head-heavy``, ``uniform``, or one number for each level of CP, then TP's, then EP's.
            **config: Further arguments of `BPSModel`.

        Raises:
            ValueError: ``weights`` is unknown or of the wrong length.
        """
        widths = tuple(unet.config["block_out_channels"])
        depth = unet.config["layers_per_block"]
        if isinstance(weights, str):
            down, mid, up = integration_weights(weights, len(widths))
        elif len(weights) == len(widths) + 2:
            *down, mid, up = weights
        else:
            raise ValueError(
                f"weights has {len(weights)} numbers; {len(widths)} levels, TP and EP need {len(widths) + 2}"
            )
        return cls(
            conditioning_channels=conditioning_channels,
            pixel_unshuffle=pixel_unshuffle,
            block_out_channels=widths,
            layers_per_block=(depth,) * len(widths) if isinstance(depth, int) else tuple(depth),
            time_embed_dim=unet.time_embedding.linear_2.out_features,
            norm_num_groups=unet.config["norm_num_groups"],
            down_weights=tuple(down),
            mid_weight=mid,
            up_weight=up,
            **config,
        )

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


def zero_module(module: nn.Conv2d) -> nn.Conv2d:
    """``module`` with its parameters at zero: an untrained network adds nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """The identity, or a 1×1 convolution where the width changes."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
