"""What every bench shares: U-Nets of known shapes on random weights, the other control networks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import T2IAdapter, UNet2DConditionModel

from powersteer.base import load_base

Shape = Literal["tiny", "sd15", "sdxl"]

_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def make_unet(shape: Shape) -> tuple[UNet2DConditionModel, int]:
    """The U-Net and the VAE's scale factor."""
    if shape != "tiny":
        return UNet2DConditionModel(**(_SDXL if shape == "sdxl" else _SD15)), 8
    pipe = load_base()
    # Without the text in its time embedding, which ControlNet-XS knows for SDXL only.
    config: dict[str, Any] = {**pipe.unet.config, "addition_embed_type": None}
    return UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}), pipe.vae_scale_factor


def make_t2i_adapter(unet: UNet2DConditionModel, factor: int, shape: Shape) -> T2IAdapter:
    """Diffusers' full T2I-Adapter for a U-Net and a one-channel condition."""
    # Of a first block without attention the U-Net takes the feature after its downsampler: the XL kind.
    plain_head = unet.config["down_block_types"][0] == "DownBlock2D"
    channels = list(unet.config["block_out_channels"]) + [1280] * (shape == "sdxl")
    kind = "full_adapter_xl" if plain_head else "full_adapter"
    return T2IAdapter(1, channels, downscale_factor=(1 + plain_head) * factor, adapter_type=kind)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
