"""The bridge: hooks that add a steering network's residuals inside a frozen U-Net, and leave no trace."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from powersteer.conditions import to_condition
from powersteer.errors import PowersteerError
from powersteer.model import BPSModel

Condition = torch.Tensor | Image.Image | Sequence[Image.Image]


@contextmanager
def steer(
    pipe: DiffusionPipeline | UNet2DConditionModel, model: BPSModel, condition: Condition, scale: float = 1.0
) -> Generator[None]:
    """Within the block, ``pipe`` denoises with the posterior p(image | text, condition).

    The network runs once a step for each distinct condition, not once for each row of the U-Net's batch.

    Args:
        pipe: A diffusers pipeline, or a bare U-Net.
        model: The steering network, made for this U-Net's shape.
        condition: PIL picture(s), or a tensor (N, C, H, W) in [0, 1]. In a pipeline, N is 1 or the number of
            prompts: each prompt's images share its condition. On a bare U-Net, N is 1, the batch, or half of it
            (the two halves of classifier-free guidance).
        scale: Strength of the steering; 0 is the prior.

    Raises:
        PowersteerError: The network does not fit the U-Net, the condition is malformed, or (within the block) the
            number of conditions or their size does not fit the batch.
    """
    if isinstance(pipe, UNet2DConditionModel):
        unet, pipeline = pipe, None
    else:
        unet, pipeline = pipe.unet, pipe
    check_fits(model, unet)
    parameter = next(model.parameters())
    bridge = _Bridge(
        model, to_condition(condition, model.config["conditioning_channels"]).to(parameter), pipeline, scale
    )
    with ExitStack() as hooks:
        hooks.enter_context(unet.register_forward_pre_hook(bridge.before_unet, with_kwargs=True))
        hooks.enter_context(unet.time_embedding.register_forward_hook(bridge.after_time_embedding))
        for position, layer in steered_layers(unet):
            hooks.enter_context(layer.register_forward_hook(bridge.adder(position)))
        yield


def steered_layers(unet: Any) -> Iterator[tuple[int, nn.Module]]:
    """Every ResNet and spatial transformer of the U-Net with the position of its residual, in `Steering` order."""
    position = 0

    def block_layers(block: Any, start: int) -> Iterator[tuple[int, nn.Module]]:
        for offset, resnet in enumerate(block.resnets):
            yield start + offset, resnet
        for offset, attention in enumerate(getattr(block, "attentions", [])):
            yield start + offset, attention

    for block in unet.down_blocks:
        yield from block_layers(block, position)
        position += len(block.resnets)
    # One residual for the whole middle block: after ResNet, transformer, ResNet.
    for layer in [*unet.mid_block.resnets, *getattr(unet.mid_block, "attentions", [])]:
        yield position, layer
    position += 1
    for block in unet.up_blocks:
        yield from block_layers(block, position)
        position += len(block.resnets)


def check_fits(model: BPSModel, unet: UNet2DConditionModel) -> None:
    """Refuse a network made for another U-Net shape.

    Raises:
        PowersteerError: The widths or the time embedding differ.
    """
    made_for, given = tuple(model.config["block_out_channels"]), tuple(unet.config["block_out_channels"])
    depth = unet.config["layers_per_block"]
    depths = (depth,) * len(given) if isinstance(depth, int) else tuple(depth)
    if (made_for, tuple(model.config["layers_per_block"])) != (given, depths):
        raise PowersteerError(
            f"the adapter was made for a U-Net of widths {made_for}, this one has {given}: load the base it was "
            "trained on"
        )


class _Bridge:
    """What the hooks of one `steer` block share: the residuals of the U-Net evaluation under way."""

    def __init__(
        self, model: BPSModel, condition: torch.Tensor, pipeline: DiffusionPipeline | None, scale: float
    ) -> None:
        self.model, self.condition, self.pipeline, self.scale = model, condition, pipeline, scale
        self.residuals: list[torch.Tensor] = []

    def before_unet(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch and whether one timestep serves all of it."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.batch: int = sample.shape[0]
        self.one_timestep = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1
        wanted = tuple(self.model.config["pixel_unshuffle"] * side for side in sample.shape[-2:])
        if tuple(self.condition.shape[-2:]) != wanted:
            raise PowersteerError(
                f"the condition is {self.condition.shape[-2]}×{self.condition.shape[-1]} pixels, the picture "
                f"{wanted[0]}×{wanted[1]}: resize the condition"
            )

    def after_time_embedding(self, _: nn.Module, __: tuple[Any, ...], time_embedding: torch.Tensor) -> None:
        """Evaluate the network, once for each distinct condition."""
        rows = self._rows()
        dtype = self.condition.dtype
        if self.one_timestep:
            steering = self.model(self.condition, time_embedding[:1].to(dtype))
        else:
            steering = self.model(self.condition[rows], time_embedding.to(dtype))
            rows = torch.arange(self.batch)
        residuals = [*steering.down, steering.mid, *steering.up]
        if len(self.condition) > 1 and not torch.equal(rows, torch.arange(len(residuals[0]))):
            residuals = [residual[rows.to(residual.device)] for residual in residuals]
        self.residuals = residuals if self.scale == 1.0 else [self.scale * residual for residual in residuals]

    def adder(self, position: int) -> Any:
        """The hook that adds residual ``position`` to a layer's output."""

        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            residual = self.residuals[position]
            if isinstance(output, torch.Tensor):
                return output + residual.to(output.dtype)
            if isinstance(output, tuple):
                return (output[0] + residual.to(output[0].dtype), *output[1:])
            output.sample = output.sample + residual.to(output.sample.dtype)
            return output

        return add

    def _rows(self) -> torch.Tensor:
        """Which condition each row of the U-Net's batch belongs to, (batch,).

        Diffusers puts the unconditional half first and lays each prompt's images side by side.
        """
        count = len(self.condition)
        guided = self.pipeline is not None and bool(getattr(self.pipeline, "do_classifier_free_guidance", False))
        if self.pipeline is None:
            if count in (1, self.batch):
                return torch.arange(self.batch) % count
            if 2 * count == self.batch:
                return torch.arange(count).repeat(2)
            raise PowersteerError(
                f"{count} conditions for a U-Net batch of {self.batch}: give one, {self.batch}, or half as many"
            )
        halves = 2 if guided else 1
        images = self.batch // halves
        if images % count:
            raise PowersteerError(f"{count} conditions for {images} images: give one condition, or one for each prompt")
        return torch.arange(count).repeat_interleave(images // count).repeat(halves)
