"""What every bench shares: U-Nets and VAEs of known shapes on random weights, the other control networks."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from torch import nn

from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.protocol import Adapter
from powersteer.adapters.registry import make_adapter
from powersteer.backbones.load import EMBEDDED_BASE, base_configs

Shape = Literal["tiny", "sd15", "sdxl"]
Network = TypeVar("Network", bound=nn.Module)

ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether torch keeps what it compiled of one module apart from what it compiled of others of its class."""

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
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


def make_unet(shape: Shape) -> tuple[UNet2DConditionModel, int]:
    """The U-Net and the VAE's scale factor."""
    if shape != "tiny":
        return UNet2DConditionModel(**(_SDXL if shape == "sdxl" else _SD15)), 8
    configs = base_configs(EMBEDDED_BASE)
    # Without the text in its time embedding, which ControlNet-XS knows for SDXL only.
    unet = UNet2DConditionModel(**_given(configs["unet"] | {"addition_embed_type": None}))
    return unet, 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def make_vae(shape: Shape) -> AutoencoderKL:
    """The VAE: Stable Diffusion's, or the embedded base's."""
    return AutoencoderKL(**(_given(base_configs(EMBEDDED_BASE)["vae"]) if shape == "tiny" else _VAE))


def make_bps(unet: UNet2DConditionModel, factor: int, preset: Any) -> BPSModel:
    """A steering network without zeros: its zero-initialised convolutions are random, so that nothing is skipped."""
    model = BPSModel.from_unet(unet, pixel_unshuffle=factor, preset=preset)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.02)
    return model


def twin(unet: Network) -> Network:
    """The same U-Net again: parameters shared, hooks and compiled code its own."""
    return copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})


def compile_in_place(module: nn.Module) -> None:
    """Let ``torch.compile`` have the module at its first call, for the shapes it is given then."""
    module.compile(dynamic=False, **({"isolate_recompiles": True} if ISOLATES else {}))


def make_controlnet(unet: UNet2DConditionModel, factor: int) -> Adapter:
    """Diffusers' ControlNet for a U-Net."""
    return make_adapter(unet, preset="controlnet", pixel_unshuffle=factor)


def make_controlnet_xs(unet: UNet2DConditionModel, factor: int) -> Any:
    """Diffusers' ControlNet-XS for a U-Net."""
    return make_adapter(unet, preset="controlnet-xs", pixel_unshuffle=factor)


def make_t2i_adapter(unet: UNet2DConditionModel, factor: int, shape: Shape) -> T2IAdapter:
    """Diffusers' full T2I-Adapter for a U-Net and a one-channel condition."""
    # Of a first block without attention the U-Net takes the feature after its downsampler: the XL kind.
    plain_head = unet.config["down_block_types"][0] == "DownBlock2D"
    channels = list(unet.config["block_out_channels"]) + [1280] * (shape == "sdxl")
    kind = "full_adapter_xl" if plain_head else "full_adapter"
    return T2IAdapter(1, channels, downscale_factor=(1 + plain_head) * factor, adapter_type=kind)


def _given(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
