"""Stable Diffusion's U-Nets under the names of the LDM code base, as ComfyUI has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from powersteer.backbones.protocol import Backbone, Call

STEERED = ("ResBlock", "SpatialTransformer")
"""Classes of layers; every one of them in a block gets the block's residual. Others are the stem and samplers."""


class LDMBackbone(Backbone):
    """A ``UNetModel``: ``time_embed``, ``input_blocks``, ``middle_block`` and ``output_blocks``."""

    arguments = ("x", "timesteps", "context")
    sample = "x"
    timestep = "timesteps"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it has these parts."""
        return all(hasattr(module, name) for name in ("time_embed", "input_blocks", "middle_block", "output_blocks"))

    def sites(self) -> Iterator[tuple[int, nn.Module]]:
        """Every ResNet and every spatial transformer; the middle block's share one residual."""
        position = 0
        for block in [*self.module.input_blocks, self.module.middle_block, *self.module.output_blocks]:
            layers = [layer for layer in block if type(layer).__name__ in STEERED]
            yield from ((position, layer) for layer in layers)
            position += bool(layers)

    def time_embedding(self, call: Call, timestep: Any, rows: int) -> torch.Tensor:
        """After the two-layer MLP: (rows, 4·w_0)."""
        sample = call.get(self.sample)
        values = torch.as_tensor(timestep, device=sample.device).flatten().expand(rows)
        features = get_timestep_embedding(
            values, self.module.model_channels, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.module.time_embed(features.to(sample.dtype))

    @property
    def time_layers(self) -> nn.Module:
        """The MLP."""
        return self.module.time_embed

    @property
    def shape(self) -> tuple[list[int], list[int]]:
        """Block widths, and ResNets a level."""
        widths = [self.module.model_channels * multiple for multiple in self.module.channel_mult]
        return widths, list(self.module.num_res_blocks)

    def fingerprint(self, prediction_type: str | None = None) -> dict[str, Any]:
        """Block widths; text width and family are not known here."""
        return {"block_out_channels": self.shape[0], "prediction_type": prediction_type}
