"""ControlNet-XS (Zavadski et al., ECCV 2024), diffusers' own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import diffusers
import torch
from torch import nn

from powersteer.adapters.baselines._baseline import Baseline, conditioning_widths, in_precision
from powersteer.adapters.protocol import CallAdapter, Strength
from powersteer.backbones.protocol import Backbone, Call
from powersteer.core.errors import PowersteerError


class ControlNetXSAdapter(Baseline, CallAdapter, diffusers.ControlNetXSAdapter):
    """Diffusers' ControlNet-XS, a tenth of the U-Net's widths (a quarter of those of small ones).

    Its encoder and the U-Net's read each other's features layer by layer: hooks run within the U-Net's forward, and
    ``torch.compile`` compiles anew for them.
    """

    presets = ("controlnet-xs",)

    @classmethod
    def untrained(cls, unet: Any, channels: int, factor: int) -> Any:
        """See `Baseline.untrained`.

        Raises:
            PowersteerError: The U-Net has not two ResNets a level, which is all that diffusers' class knows.
        """
        config: Any = unet.config
        if config.layers_per_block != 2:
            raise PowersteerError(
                f"ControlNet-XS takes U-Nets of 2 ResNets a level; this has {config.layers_per_block}"
            )
        widths: Any = conditioning_widths(factor)
        ratio = 0.1 if config.block_out_channels[0] >= 320 else 0.25
        control_widths: Any = tuple(int(ratio * width) for width in config.block_out_channels)
        # Diffusers' `from_unet` ends in a cast, which tensors without values (a dry run's) cannot do.
        return cls(
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

    @property
    def base_widths(self) -> list[int]:
        """Block widths of the U-Net that it was made for."""
        return list(self.recorded["base_block_out_channels"])

    def intervene(
        self, backbone: Backbone, call: Call, condition: torch.Tensor, strength: Strength, hooks: ExitStack
    ) -> None:
        """Put the encoder's layers beside the U-Net's."""
        _InStep(self, in_precision(call.get("encoder_hidden_states"), self.dtype), condition, strength).hook(
            backbone.module, hooks
        )


class _InStep:
    """The control encoder in step with the U-Net's own, for one call.

    Diffusers fuses copies of both into one model, which knows no text in the time embedding. Hooks take the time
    embedding as the U-Net has it. States are kept by position, so that gradient checkpointing may run a layer again.
    """

    def __init__(self, network: Any, text: Any, condition: torch.Tensor, strength: Strength) -> None:
        self.network, self.text, self.condition, self.strength = network, text, condition, strength
        self.states: dict[int, torch.Tensor] = {}

    def hook(self, unet: Any, hooks: ExitStack) -> None:
        """Put every hook on the U-Net's layers, encoder first."""
        network = self.network
        hooks.enter_context(unet.conv_in.register_forward_hook(self._after_conv_in))
        position = 0
        for block, control in zip(unet.down_blocks, network.down_blocks, strict=True):
            layers = list(zip(block.resnets, getattr(block, "attentions", block.resnets), strict=True))
            layers += [(down, down) for down in block.downsamplers or []]
            for index, (first, last) in enumerate(layers):
                position += 1
                hooks.enter_context(first.register_forward_pre_hook(self._encoder(position, control, index)))
                hooks.enter_context(last.register_forward_hook(self._adder(position, control.ctrl_to_base[index])))
        middle = position + 1
        hooks.enter_context(unet.mid_block.register_forward_pre_hook(self._middle(middle), with_kwargs=True))
        hooks.enter_context(unet.mid_block.register_forward_hook(self._adder(middle, network.mid_block.ctrl_to_base)))
        for block, control in zip(unet.up_blocks, network.up_connections, strict=True):
            for resnet, to_base in zip(block.resnets, control.ctrl_to_base, strict=True):
                hooks.enter_context(resnet.register_forward_pre_hook(self._decoder(position, to_base)))
                position -= 1

    def _after_conv_in(self, _: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        network = self.network
        hint = network.controlnet_cond_embedding(self.condition)  # (B, v_0, h, w)
        self.states[0] = network.conv_in(in_precision(args[0], network.dtype)) + hint
        return self._added(output, network.control_to_base_for_conv_in(self.states[0]))

    def _joined(self, position: int, x: torch.Tensor, to_control: nn.Module) -> torch.Tensor:
        return torch.cat([self.states[position], to_control(in_precision(x, self.network.dtype))], 1)

    def _encoder(self, position: int, block: Any, index: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            h = self._joined(position - 1, args[0], block.base_to_ctrl[index])
            if index < len(block.resnets):
                h = block.resnets[index](h, in_precision(args[1], self.network.dtype))
                if block.attentions is not None:
                    h = block.attentions[index](h, encoder_hidden_states=self.text, return_dict=False)[0]
            else:
                h = block.downsamplers(h)
            self.states[position] = h

        return before

    def _middle(self, position: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            block, temb = self.network.mid_block, in_precision(args[1], self.network.dtype)
            h = self._joined(position - 1, args[0], block.base_to_ctrl)
            self.states[position] = block.midblock(h, temb, encoder_hidden_states=self.text)

        return before

    def _decoder(self, position: int, to_base: Any) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, extra = args[0], to_base(self.states[position])  # x is (hidden, skip) side by side
            hidden, skip = x[:, : extra.shape[1]], x[:, extra.shape[1] :]
            return (torch.cat([self._added(hidden, extra), skip], 1), *args[1:])

        return before

    def _adder(self, position: int, to_base: nn.Module) -> Any:
        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return self._added(output, to_base(self.states[position]))

        return add

    def _added(self, output: Any, extra: torch.Tensor) -> Any:
        """``extra`` added to what a layer gave: a tensor, or a tuple of which it is the first."""
        if isinstance(output, tuple):
            return (self._added(output[0], extra), *output[1:])
        return output + (extra * self.strength).to(output.dtype)
