"""Stable Diffusion's U-Nets (1.x, 2.x, XL, inpainting, InstructPix2Pix), in diffusers' class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from powersteer.backbones.fingerprint import fingerprint
from powersteer.backbones.protocol import Backbone, Call


class UNetBackbone(Backbone):
    """A `UNet2DConditionModel`."""

    arguments = (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "return_dict",
    )

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether it is one."""
        return isinstance(module, UNet2DConditionModel)

    def sites(self) -> Iterator[tuple[int, nn.Module]]:
        """Every ResNet and every spatial transformer; the middle block's share one residual."""
        unet = self.module
        position = 0
        for block in unet.down_blocks:
            yield from _layers(block, position)
            position += len(block.resnets)
        # After ResNet, transformer, ResNet.
        for layer in [*unet.mid_block.resnets, *getattr(unet.mid_block, "attentions", [])]:
            if layer is not None:
                yield position, layer
        position += 1
        for block in unet.up_blocks:
            yield from _layers(block, position)
            position += len(block.resnets)

    def time_embedding(self, call: Call, timestep: Any, rows: int) -> torch.Tensor:
        """After the two-layer MLP, before labels, sizes and text are added: (rows, 4·w_0)."""
        unet, sample = self.module, call.get("sample")
        device = next(unet.time_embedding.parameters()).device
        device = sample.device if device.type == "meta" else device  # offloaded weights come with their own hooks
        like = torch.empty(rows, 0, dtype=sample.dtype, device=device)
        features = unet.get_time_embed(like, timestep.to(device) if torch.is_tensor(timestep) else timestep)
        inputs = self.time_inputs(call)
        return unet.time_embedding(features, None if inputs is None else inputs[:rows].to(features))

    @property
    def time_layers(self) -> nn.Module:
        """The MLP."""
        return self.module.time_embedding

    def time_inputs(self, call: Call) -> torch.Tensor | None:
        """What distilled U-Nets read the guidance from."""
        return call.get("timestep_cond")

    @property
    def shape(self) -> tuple[list[int], list[int]]:
        """Block widths, and ResNets a level."""
        widths, depth = list(self.module.config["block_out_channels"]), self.module.config["layers_per_block"]
        return widths, [depth] * len(widths) if isinstance(depth, int) else list(depth)

    def fingerprint(self, prediction_type: str | None = None) -> dict[str, Any]:
        """Family, block widths, text width and prediction type."""
        return fingerprint(self.module, prediction_type)


def _layers(block: Any, start: int) -> Iterator[tuple[int, nn.Module]]:
    for offset, resnet in enumerate(block.resnets):
        yield start + offset, resnet
    for offset, attention in enumerate(getattr(block, "attentions", [])):
        yield start + offset, attention
