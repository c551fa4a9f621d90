"""The other control networks of diffusers, made and hooked up so that `powersteer.adapters.attach` can treat all alike.

Each starts as exactly the prior, is trained alone and leaves the frozen U-Net as it found it:

| network      | reads                 | adds to                                                      |
|--------------|-----------------------|--------------------------------------------------------------|
| ControlNet   | z_t, t, text, c       | the U-Net's skips and its middle block                       |
| ControlNet-XS| z_t, t, text, c, the  | every encoder layer, the middle block, the decoder's inputs  |
|              | base's own features   |                                                              |
| T2I-Adapter  | c                     | the last layer of each encoder level                         |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log2
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetXSAdapter, T2IAdapter, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from powersteer.core.errors import PowersteerError

Rows = Callable[[int], torch.Tensor]
"""The condition of each row of a U-Net batch of so many, (batch, C, H, W)."""


class ZeroStartT2IAdapter(T2IAdapter):
    """Diffusers' full T2I-Adapter, each feature behind a zero-initialised 1×1 convolution.

    The original starts with random features, which would not be the prior. A feature is added to the last layer of its
    level, before the downsampler, as in the T2I-Adapter of Stable Diffusion 1.x, for every base.
    """

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


Baseline = ControlNetModel | ControlNetXSAdapter | ZeroStartT2IAdapter


def conditioning_widths(factor: int) -> tuple[int, ...]:
    """The widths of the embedding through which ControlNet reads a condition, for the VAE's scale factor."""
    return (16, 32, 96, 256)[: int(log2(factor)) + 1]


def make_controlnet(
    unet: UNet2DConditionModel, factor: int, kind: type[ControlNetModel] = ControlNetModel
) -> ControlNetModel:
    """Diffusers' ControlNet: a copy of the U-Net's encoder, weights and all.

    Args:
        unet: The U-Net to control.
        factor: The VAE's scale factor.
        kind: The class, or one that leaves something out.
    """
    widths: Any = conditioning_widths(factor)
    network = kind.from_unet(unet, conditioning_embedding_out_channels=widths)
    heads = unet.config["addition_embed_type_num_heads"]
    if unet.config["addition_embed_type"] != "text" or heads == network.config["addition_embed_type_num_heads"]:
        return network
    # `from_unet` forgets how many heads pool the text: the copied weights would then compute something else.
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    copy = kind(**(config | {"addition_embed_type_num_heads": heads}))
    copy.load_state_dict(network.state_dict())
    return copy


def make_controlnet_xs(unet: UNet2DConditionModel, factor: int) -> ControlNetXSAdapter:
    """Diffusers' ControlNet-XS, a tenth of the U-Net's widths (a quarter of those of small ones).

    Raises:
        PowersteerError: The U-Net has not two ResNets a level, which is all that diffusers' class knows.
    """
    if unet.config["layers_per_block"] != 2:
        raise PowersteerError(
            f"ControlNet-XS takes U-Nets of 2 ResNets a level; this has {unet.config['layers_per_block']}"
        )
    config: Any = unet.config
    widths: Any = conditioning_widths(factor)
    ratio = 0.1 if config.block_out_channels[0] >= 320 else 0.25
    control_widths: Any = tuple(int(ratio * width) for width in config.block_out_channels)
    # Diffusers' `from_unet` ends in a cast, which tensors without values (a dry run's) cannot do.
    return ControlNetXSAdapter(
        conditioning_embedding_out_channels=widths,
        num_attention_heads=config.attention_head_dim,  # diffusers' misnomer: it is their number
        block_out_channels=control_widths,
        base_block_out_channels=config.block_out_channels,
        cross_attention_dim=config.cross_attention_dim,
        down_block_types=config.down_block_types,
        sample_size=config.sample_size,
        transformer_layers_per_block=config.transformer_layers_per_block,
        upcast_attention=config.upcast_attention,
        max_norm_num_groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
    )


def make_t2i_adapter(unet: UNet2DConditionModel, factor: int, channels: int = 1) -> ZeroStartT2IAdapter:
    """A T2I-Adapter as wide as the U-Net, for a condition of so many channels."""
    return ZeroStartT2IAdapter(channels, tuple(unet.config["block_out_channels"]), downscale_factor=factor)


def condition_factor(network: Baseline) -> int:
    """Pixels of the condition a side of one latent."""
    if isinstance(network, T2IAdapter):
        return network.config["downscale_factor"]
    return 2 ** (len(network.config["conditioning_embedding_out_channels"]) - 1)


def condition_channels(network: Baseline) -> int:
    """Channels that the network reads."""
    return network.config["in_channels" if isinstance(network, T2IAdapter) else "conditioning_channels"]


def base_widths(network: Baseline) -> list[int]:
    """The block widths of the U-Net that a network was made for."""
    keys: dict[type, str] = {ControlNetXSAdapter: "base_block_out_channels", ZeroStartT2IAdapter: "channels"}
    return list(network.config[keys.get(type(network), "block_out_channels")])


def hook_up(unet: UNet2DConditionModel, network: Baseline, rows: Rows) -> Iterator[Any]:
    """Register a network's hooks on the U-Net; each is removed by leaving it as a context."""
    if isinstance(network, ControlNetModel):
        return _controlnet(unet, network, rows)
    if isinstance(network, ControlNetXSAdapter):
        return _controlnet_xs(unet, network, rows)
    return _t2i_adapter(unet, network, rows)


def _controlnet(unet: Any, network: Any, rows: Rows) -> Iterator[Any]:
    def before_unet(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        known = ("timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs")
        inputs = {name: _as(given[name], network.dtype) for name in known if name in given}
        sample = given["sample"]  # (B, 4, h, w)
        down, mid = network(_as(sample, network.dtype), controlnet_cond=rows(len(sample)), **inputs, return_dict=False)
        # What the U-Net's convolutions give, to which these are added: float32 would make all after it float32.
        kind = sample.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else sample.dtype
        residuals = {
            "down_block_additional_residuals": [residual.to(dtype) for residual in down],
            "mid_block_additional_residual": mid.to(dtype),
        }
        return args, kwargs | residuals

    yield unet.register_forward_pre_hook(before_unet, with_kwargs=True)


def _t2i_adapter(unet: Any, network: Any, rows: Rows) -> Iterator[Any]:
    features: list[torch.Tensor] = []

    def before_unet(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features[:] = network(rows(len(args[0] if args else kwargs["sample"])))

    def adder(level: int) -> Any:
        return _adder(lambda: features[level])

    yield unet.register_forward_pre_hook(before_unet, with_kwargs=True)
    for level, block in enumerate(unet.down_blocks):
        yield _layers(block)[-1][-1].register_forward_hook(adder(level))


def _controlnet_xs(unet: Any, network: Any, rows: Rows) -> Iterator[Any]:
    """The control encoder in step with the U-Net's own, layer by layer.

    Diffusers fuses copies of both into one model, which knows no text in the time embedding. Hooks take the time
    embedding as the U-Net has it. States are kept by position, so that gradient checkpointing may run a layer again.
    """
    text: list[Any] = [None]
    states: dict[int, torch.Tensor] = {}
    count = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in unet.down_blocks)
    middle = count

    def before_unet(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text[0] = _as(args[2] if len(args) > 2 else kwargs["encoder_hidden_states"], network.dtype)

    def after_conv_in(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        hint = network.controlnet_cond_embedding(rows(len(args[0])))  # (B, v_0, h, w)
        states[0] = network.conv_in(_as(args[0], network.dtype)) + hint
        return _added(output, network.control_to_base_for_conv_in(states[0]))

    def joined(position: int, x: torch.Tensor, to_control: nn.Module) -> torch.Tensor:
        return torch.cat([states[position], to_control(_as(x, network.dtype))], 1)

    def encoder(position: int, block: Any, index: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            h = joined(position - 1, args[0], block.base_to_ctrl[index])
            if index < len(block.resnets):
                h = block.resnets[index](h, _as(args[1], network.dtype))
                if block.attentions is not None:
                    h = block.attentions[index](h, encoder_hidden_states=text[0], return_dict=False)[0]
            else:
                h = block.downsamplers(h)
            states[position] = h

        return before

    def adder(position: int, to_base: nn.Module) -> Any:
        return _adder(lambda: to_base(states[position]))

    def before_mid(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
        block, temb = network.mid_block, _as(args[1], network.dtype)
        h = joined(count - 1, args[0], block.base_to_ctrl)
        states[middle] = block.midblock(h, temb, encoder_hidden_states=text[0])

    def decoder(position: int, to_base: Any) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, extra = args[0], to_base(states[position])  # x is (hidden, skip) side by side
            hidden, skip = x[:, : extra.shape[1]], x[:, extra.shape[1] :]
            return (torch.cat([_added(hidden, extra), skip], 1), *args[1:])

        return before

    yield unet.register_forward_pre_hook(before_unet, with_kwargs=True)
    yield unet.conv_in.register_forward_hook(after_conv_in)
    position = 0
    for block, control in zip(unet.down_blocks, network.down_blocks, strict=True):
        layers = _layers(block) + [(down, down) for down in block.downsamplers or []]
        for index, (first, last) in enumerate(layers):
            position += 1
            yield first.register_forward_pre_hook(encoder(position, control, index))
            yield last.register_forward_hook(adder(position, control.ctrl_to_base[index]))
    yield unet.mid_block.register_forward_pre_hook(before_mid, with_kwargs=True)
    yield unet.mid_block.register_forward_hook(adder(middle, network.mid_block.ctrl_to_base))
    for block, control in zip(unet.up_blocks, network.up_connections, strict=True):
        for resnet, to_base in zip(block.resnets, control.ctrl_to_base, strict=True):
            yield resnet.register_forward_pre_hook(decoder(position, to_base))
            position -= 1


def _layers(block: Any) -> list[tuple[nn.Module, nn.Module]]:
    """First and last layer of each step of a block: ResNet and, where there is one, transformer."""
    return list(zip(block.resnets, getattr(block, "attentions", block.resnets), strict=True))


def _adder(extra: Callable[[], torch.Tensor]) -> Any:
    """The hook that adds to what a layer gives."""

    def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _added(output, extra())

    return add


def _added(output: Any, extra: torch.Tensor) -> Any:
    """``extra`` added to what a layer gave: a tensor, or a tuple of which it is the first."""
    if isinstance(output, tuple):
        return (_added(output[0], extra), *output[1:])
    return output + extra.to(output.dtype)


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in the network's precision, however deeply they are packed."""
    if isinstance(value, dict):
        return {name: _as(inner, dtype) for name, inner in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
