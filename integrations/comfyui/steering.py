"""Steering of ComfyUI's U-Net: the residuals of `powersteer.adapters.steering`, hooked into LDM's module layout.

ComfyUI's ``UNetModel`` has ``time_embed``, ``input_blocks``, ``middle_block`` and ``output_blocks``. A block is a
sequence of layers; those of the classes below get its residual, others (the first convolution, samplers) none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from powersteer import BPSModel, PowersteerError
from powersteer.adapters.plan import digest, plan_of, weights_digest
from powersteer.conditions import to_condition
from powersteer.conditions.kind import KINDS

STEERED = ("ResBlock", "SpatialTransformer")
"""Classes of layers; every one of them in a block gets the block's residual."""
UNCONDITIONAL = 1
"""How ComfyUI marks a chunk of the negative prompt in ``cond_or_uncond``; 0 is the prompt's."""


def steered_layers(unet: Any) -> Iterator[tuple[int, nn.Module]]:
    """Every ResNet and spatial transformer with the position of its residual: down, middle, up."""
    position = 0
    for block in [*unet.input_blocks, unet.middle_block, *unet.output_blocks]:
        layers = [layer for layer in block if type(layer).__name__ in STEERED]
        yield from ((position, layer) for layer in layers)
        position += bool(layers)


def check_fits(adapter: BPSModel, unet: Any) -> None:
    """Refuse an adapter made for another U-Net.

    Raises:
        PowersteerError: It is no U-Net of Stable Diffusion, or widths or depths differ.
    """
    if not all(hasattr(unet, name) for name in ("time_embed", "input_blocks", "middle_block", "output_blocks")):
        raise PowersteerError(
            f"{type(unet).__name__} is no U-Net of Stable Diffusion 1.x, 2.x or XL: load one of these"
        )
    widths = [unet.model_channels * multiple for multiple in unet.channel_mult]
    given = widths, list(unet.num_res_blocks)
    wanted = list(adapter.config["block_out_channels"]), list(adapter.config["layers_per_block"])
    if given != wanted:
        raise PowersteerError(
            f"the adapter was made for widths {wanted[0]} and {wanted[1]} ResNets a level, this model has {given[0]} "
            f"and {given[1]}: load the base it was trained on"
        )


def condition_of(adapter: BPSModel, image: torch.Tensor, latents: tuple[int, int]) -> torch.Tensor:
    """ComfyUI's image as the adapter reads it: (N, C, H, W).

    Sketches of dark lines on light are inverted. Pictures are scaled to the latents' size; label maps without
    interpolation.

    Args:
        adapter: The adapter.
        image: (N, height, width, 3 or 4) in [0, 1].
        latents: (height, width).

    Raises:
        PowersteerError: The adapter reads something else than grey, RGB or RGBA pictures, or the image has no alpha.
    """
    channels, said = adapter.config["conditioning_channels"], adapter.config["conditioning"] or {}
    kind = KINDS.find(said.get("kind", "sketch"))
    height, width = (adapter.config["pixel_unshuffle"] * side for side in latents)
    picture = image.movedim(-1, 1).float()
    if channels == 1:
        grey = torch.tensor([0.299, 0.587, 0.114]).to(picture)
        picture = (picture[:, :3] * grey[:, None, None]).sum(1, keepdim=True)
        if kind.line_art and picture.mean() > 0.5:
            picture = 1 - picture
    elif channels not in (3, 4) or picture.shape[1] < channels:
        raise PowersteerError(f"the adapter reads {channels} channels, the image has {picture.shape[1]}")
    how: dict[str, Any] = {"mode": "bilinear", "antialias": True}
    if kind.resampling == Image.Resampling.NEAREST:
        how = {"mode": "nearest-exact"}
    if tuple(picture.shape[-2:]) != (height, width):
        picture = F.interpolate(picture, (height, width), **how)
    return to_condition(picture[:, :channels].clamp(0, 1), channels)


def steered(
    patcher: Any,
    adapter: BPSModel,
    image: torch.Tensor,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    *,
    steer_unconditional: bool = True,
) -> Any:
    """A clone of ComfyUI's model that denoises under the condition; several may be chained.

    Args:
        patcher: A ``ModelPatcher``.
        adapter: The steering network.
        image: (N, height, width, channels): one for all pictures, or one for each picture of the batch.
        strength: 0 is the prior.
        start: Where steering sets in, from noise (0) to picture (1), by the timestep.
        end: Where it ends.
        steer_unconditional: Whether the negative prompt's half is steered too.

    Raises:
        PowersteerError: The adapter does not fit the model.
    """
    check_fits(adapter, patcher.model.diffusion_model)
    made = patcher.clone()
    inner: Callable[..., torch.Tensor] | None = made.model_options.get("model_function_wrapper")

    def wrapper(apply_model: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        model, noisy, sigma = made.model, given["input"], given["timestep"]
        timestep = model.model_sampling.timestep(sigma).float()
        way = 1 - timestep.flatten()[0].item() / 1000
        with ExitStack() as hooks:
            if strength and way >= start and (way < end or end == 1):
                condition = condition_of(adapter, image, tuple(noisy.shape[-2:]))
                chunks = given["cond_or_uncond"]
                rows = _rows(len(condition), len(noisy), chunks)
                weights = torch.full((len(noisy), 1, 1, 1), strength, device=noisy.device)
                if not steer_unconditional:
                    marks = torch.tensor(chunks, device=noisy.device).repeat_interleave(len(noisy) // len(chunks))
                    weights = weights * (marks != UNCONDITIONAL).view(-1, 1, 1, 1)
                _hook(hooks, model.diffusion_model, adapter.to(noisy.device), condition.to(noisy.device), rows, weights)
            if inner is not None:
                return inner(apply_model, given)
            return apply_model(noisy, sigma, **given["c"])

    made.set_model_unet_function_wrapper(wrapper)
    return made


def _rows(conditions: int, batch: int, chunks: list[int]) -> list[int]:
    """Which condition each row of the batch follows: chunk after chunk, each with all pictures."""
    images = batch // len(chunks)
    if conditions not in (1, images):
        raise PowersteerError(f"{conditions} condition images for {images} pictures: give one, or one for each")
    return [i % conditions for i in range(images)] * len(chunks)


def _hook(
    hooks: ExitStack, unet: Any, adapter: BPSModel, condition: torch.Tensor, rows: list[int], weights: torch.Tensor
) -> None:
    """Until ``hooks`` close, evaluate the adapter after the time embedding and add its residuals."""
    found: list[torch.Tensor] = []
    plan, source = plan_of(adapter), f"{weights_digest(adapter)} {digest(condition)}"

    @torch.no_grad()
    def after_time_embed(_: nn.Module, __: Any, embedding: torch.Tensor) -> None:
        # Chunks share their sigma; where a batch has several, each row's condition is evaluated at its own.
        alike = bool((embedding == embedding[:1]).all())
        step = digest(embedding[:1].float())
        kept = plan.get(source, step) if alike else None
        if kept is None:
            once = embedding[:1] if alike else embedding
            steering = adapter(condition if alike else condition[rows], once.to(next(adapter.parameters())))
            kept = [*steering.down, steering.mid, *steering.up]
            if alike:
                plan.put(source, step, kept)
        found[:] = [residual[rows] for residual in kept] if alike else kept

    def adder(position: int) -> Callable[..., torch.Tensor]:
        def add(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            return output + (weights * found[position].to(weights)).to(output.dtype)

        return add

    hooks.enter_context(unet.time_embed.register_forward_hook(after_time_embed))
    for position, layer in steered_layers(unet):
        hooks.enter_context(layer.register_forward_hook(adder(position)))
