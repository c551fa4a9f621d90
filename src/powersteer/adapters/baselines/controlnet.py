"""ControlNet (Zhang et al., ICCV 2023), diffusers' own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import diffusers
import torch

from powersteer.adapters.baselines._baseline import Baseline, conditioning_widths, in_precision
from powersteer.adapters.protocol import CallAdapter, Strength
from powersteer.backbones.protocol import Backbone, Call


class ControlNetModel(Baseline, CallAdapter, diffusers.ControlNetModel):
    """Diffusers' ControlNet: a copy of the U-Net's encoder, weights and all. What is saved, diffusers loads too."""

    presets = ("controlnet",)

    @classmethod
    def untrained(cls, unet: Any, channels: int, factor: int) -> Any:
        """See `Baseline.untrained`."""
        widths: Any = conditioning_widths(factor)
        network = cls.from_unet(unet, conditioning_embedding_out_channels=widths)
        heads = unet.config["addition_embed_type_num_heads"]
        named = unet.config["addition_embed_type"]
        if named == "text" and heads != network.config["addition_embed_type_num_heads"]:
            # `from_unet` forgets how many heads pool the text: the copied weights would then compute something else.
            config = {name: value for name, value in network.config.items() if not name.startswith("_")}
            copy = cls(**(config | {"addition_embed_type_num_heads": heads}))
            copy.load_state_dict(network.state_dict())
            network = copy
        return network

    def intervene(
        self, backbone: Backbone, call: Call, condition: torch.Tensor, strength: Strength, hooks: ExitStack
    ) -> None:
        """Add to the skips and to the middle block, by the U-Net's own arguments."""
        known = ("timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs")
        inputs = {name: in_precision(call.get(name), self.dtype) for name in known}
        sample = call.get("sample")  # (B, 4, h, w)
        down, mid = self(in_precision(sample, self.dtype), controlnet_cond=condition, **inputs, return_dict=False)
        # What the U-Net's convolutions give, to which these are added: float32 would make all after it float32.
        kind = sample.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else sample.dtype

        def ready(residual: torch.Tensor, before: Any) -> torch.Tensor:
            residual = (residual * strength).to(dtype)
            return residual if before is None else residual + before

        skips = call.get("down_block_additional_residuals") or [None] * len(down)
        call.kwargs["down_block_additional_residuals"] = [ready(*pair) for pair in zip(down, skips, strict=True)]
        call.kwargs["mid_block_additional_residual"] = ready(mid, call.get("mid_block_additional_residual"))


class WithoutLatents(ControlNetModel):
    """ControlNet that is not shown the noisy latents: it knows what BPS knows, timestep and condition, and the text."""

    ablation = "no-latents"

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See diffusers' `ControlNetModel.forward`."""
        return super().forward(torch.zeros_like(sample), *args, **kwargs)
