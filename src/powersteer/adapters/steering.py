"""The bridge: hooks that add a steering network's residuals inside a frozen U-Net, and leave no trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch._dynamo.config
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.plan import Residuals, SteeringPlan, digest, plan_of, weights_digest
from powersteer.backbones.fingerprint import describe, differences, fingerprint
from powersteer.conditions import to_condition
from powersteer.conditions.kinds import BLIND
from powersteer.conditions.tensors import Condition
from powersteer.core.errors import PowersteerError, PowersteerWarning

# A U-Net compiled before a block would else run without the block's hooks, and say nothing.
torch._dynamo.config.skip_nnmodule_hook_guards = False

Plan = SteeringPlan | Literal["auto"] | None
Layers = Callable[[Any], Iterable[tuple[int, nn.Module]]]


@contextmanager
def steer(
    pipe: DiffusionPipeline | UNet2DConditionModel,
    model: BPSModel | Sequence[BPSModel],
    condition: Condition | Sequence[Condition],
    scale: float | Sequence[float] = 1.0,
    start: float | Sequence[float] = 0.0,
    end: float | Sequence[float] = 1.0,
    *,
    steer_unconditional: bool = True,
    steering_guidance_scale: float | None = None,
    plan: Plan = "auto",
    strict_base: bool = True,
    layers: Layers | None = None,
) -> Generator[None]:
    """Within the block, ``pipe`` denoises with the posterior p(image | text, condition).

    With a list of networks, the other arguments may be lists too: several conditions add their steering, for the
    likelihoods of conditions that are independent given the image multiply.

    Within a step a network runs once for each distinct condition, not once for each row of the U-Net's batch; under a
    condition and schedule that its plan has seen, not at all.

    Args:
        pipe: A diffusers pipeline, or a bare U-Net.
        model: The steering network, made for this U-Net.
        condition: PIL picture(s), arrays (H, W) or (H, W, C), or a tensor (N, C, H, W) in [0, 1], or in the range that
            the network's config tells; see `powersteer.conditions.to_condition`. In a pipeline, N is 1, the number of
            prompts (each prompt's images share its condition) or the number of images. On a bare U-Net, N is 1, the
            batch, or half of it (the two halves of classifier-free guidance, the unconditional one first).
        scale: Strength of the steering; 0 is the prior.
        start: Where steering sets in, as a share of the way from noise (0) to picture (1), by the timestep.
        end: Where it ends.
        steer_unconditional: Under classifier-free guidance, steer both halves (the authors' way), or the
            text-conditional half only.
        steering_guidance_scale: With w_c given, and w_text the pipeline's guidance scale, predict
            ε(∅) + w_text·(ε(text) − ε(∅)) + w_c·(ε(text, c) − ε(text)), which tempers the likelihood
            p(c | z, text)^w_c. Costs half as much again.
        plan: Where residuals are kept for the next prompt or seed: ``auto`` (the network's own plan), a
            `SteeringPlan`, or None.
        strict_base: Refuse a network that was trained on another base.
        layers: Which layers of the U-Net get which residual; `steered_layers` by default.

    Raises:
        PowersteerError: The network does not fit the U-Net, a condition is malformed, the lists differ in length, or
            (within the block) the number of conditions or their size does not fit the batch.
    """
    unet, pipeline = _unet_of(pipe)
    models = [model] if isinstance(model, BPSModel) else list(model)
    several = not isinstance(model, BPSModel)
    conditions = list(condition) if several and isinstance(condition, Sequence) else [condition]
    spans = [_spread(value, len(models), name) for name, value in (("scale", scale), ("start", start), ("end", end))]
    if not models or len(conditions) != len(models):
        raise PowersteerError(f"{len(models)} networks need as many conditions, not {len(conditions)}")
    sources: list[_Source] = []
    for network, picture, *span in zip(models, conditions, *spans, strict=True):
        check_fits(network, pipe, strict_base=strict_base)
        sources.append(_Source.of(network, picture, *span, plan=plan))
    if steering_guidance_scale is not None and not math.isfinite(steering_guidance_scale):
        raise PowersteerError(f"steering_guidance_scale must be a finite number, not {steering_guidance_scale}")
    bridge = _Bridge(sources, pipeline, steer_unconditional, steering_guidance_scale)
    others = _active.setdefault(unet, [])
    if others and any(b.steering_guidance_scale is not None for b in (bridge, *others)):
        raise PowersteerError("blocks with steering_guidance_scale do not nest: give all conditions to one steer(...)")
    with ExitStack() as hooks:
        others.append(bridge)
        hooks.callback(others.remove, bridge)
        hooks.enter_context(unet.register_forward_pre_hook(bridge.before_unet, with_kwargs=True))
        evaluate = torch.compiler.disable(bridge.after_time_embedding)
        hooks.enter_context(unet.time_embedding.register_forward_hook(evaluate))
        for position, layer in (layers or steered_layers)(unet):
            hooks.enter_context(layer.register_forward_hook(bridge.adder(position)))
        if steering_guidance_scale is not None:
            hooks.enter_context(unet.register_forward_hook(bridge.after_unet, with_kwargs=True))
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


def check_fits(model: BPSModel, pipe: DiffusionPipeline | UNet2DConditionModel, *, strict_base: bool = True) -> None:
    """Refuse a network made for another base.

    Args:
        model: The steering network.
        pipe: The pipeline, or the bare U-Net, to steer.
        strict_base: Whether to compare text width and prediction type too, which the network itself never sees.

    Raises:
        PowersteerError: Widths or depths differ, or (``strict_base``) the fingerprints.
    """
    unet, pipeline = _unet_of(pipe)
    scheduler = getattr(pipeline, "scheduler", None)
    given = fingerprint(unet, scheduler.config.get("prediction_type") if scheduler is not None else None)
    made_for = model.config["base"] or {"block_out_channels": model.config["block_out_channels"]}
    depth, widths = unet.config["layers_per_block"], given["block_out_channels"]
    depths = [depth] * len(widths) if isinstance(depth, int) else list(depth)
    shape = list(model.config["block_out_channels"]), list(model.config["layers_per_block"])
    if shape != (widths, depths):
        raise PowersteerError(
            f"the adapter was made for {describe(made_for)}, {shape[1]} ResNets a level; this is {describe(given)}, "
            f"{depths} ResNets a level: load the base it was trained on"
        )
    if strict_base and differences(made_for, given):
        raise PowersteerError(
            f"the adapter was trained on {describe(made_for)}; this is {describe(given)}: load that base, or give "
            "strict_base=False to try all the same"
        )


@dataclass
class _Source:
    """One network under one condition."""

    model: BPSModel
    condition: torch.Tensor
    scale: float
    start: float
    end: float
    plan: SteeringPlan | None

    @classmethod
    def of(cls, model: BPSModel, picture: Any, scale: float, start: float, end: float, *, plan: Plan) -> _Source:
        if not math.isfinite(scale):
            raise PowersteerError(f"scale must be a finite number, not {scale}")
        if not 0 <= start <= end <= 1:
            raise PowersteerError(f"start and end must satisfy 0 ≤ start ≤ end ≤ 1, not {start:g} and {end:g}")
        said = model.config["conditioning"] or {}
        bounds, kind = said.get("range", (0, 1)), said.get("kind")
        checked = to_condition(picture, model.config["conditioning_channels"], bounds, kind)
        condition = checked.to(next(model.parameters()))
        if said.get(BLIND):
            condition = torch.zeros_like(condition)
        # Training leaves conditions out on purpose; a blind network is shown none.
        _warn_of(checked, kind, may_be_blank=model.training or bool(said.get(BLIND)))
        kept = plan_of(model) if isinstance(plan, str) else plan
        return cls(model, condition, scale, start, end, kept)

    @cached_property
    def key(self) -> str:
        """Digest of network and condition."""
        return f"{weights_digest(self.model)} {digest(self.condition)}"

    def residuals(self, time_embedding: torch.Tensor) -> Residuals:
        """The residuals of every condition at one timestep, of embedding (1, D); from the plan where it has them."""
        plan = None if torch.is_grad_enabled() or self.model.training else self.plan
        step = "" if plan is None else digest(time_embedding)
        found = None if plan is None else plan.get(self.key, step)
        if found is None:
            found = self.evaluate(self.condition, time_embedding)
            if plan is not None:
                plan.put(self.key, step, found)
        return found

    def evaluate(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> Residuals:
        """Run the network."""
        if self.model.gradient_checkpointing and torch.is_grad_enabled():
            steering = checkpoint(self.model, condition, time_embedding.to(condition), use_reentrant=False)
        else:
            steering = self.model(condition, time_embedding.to(condition))
        return [*steering.down, steering.mid, *steering.up]


@dataclass(frozen=True)
class _Layout:
    """How the U-Net's batch is laid out: parts × conditions × images of each, the unconditional part first."""

    parts: int
    conditions: int
    images: int
    guided: bool

    def per_row(self, values: torch.Tensor) -> torch.Tensor:
        """(conditions, …) → (batch, …)."""
        grid = values[None, :, None].expand(self.parts, -1, self.images, *values.shape[1:])
        return grid.reshape(-1, *values.shape[1:])


class _Bridge:
    """What the hooks of one `steer` block share: the residuals of the U-Net evaluation under way."""

    def __init__(
        self,
        sources: list[_Source],
        pipeline: Any | None,
        steer_unconditional: bool,
        steering_guidance_scale: float | None,
    ) -> None:
        self.sources, self.pipeline, self.steer_unconditional = sources, pipeline, steer_unconditional
        self.steering_guidance_scale = steering_guidance_scale
        self.added: list[tuple[float | torch.Tensor, Residuals, _Layout]] = []
        """Strength (a number, or one a row), residuals, layout: what this evaluation adds."""
        self.text_part_only = False
        """The second evaluation of steering guidance: the text-conditional rows alone, steered."""

    def before_unet(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the batch, its timesteps and which condition each row belongs to."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.timestep = timestep
        self.one_timestep = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1
        for source in self.sources:
            wanted = tuple(source.model.config["pixel_unshuffle"] * side for side in sample.shape[-2:])
            if tuple(source.condition.shape[-2:]) != wanted:
                raise PowersteerError(
                    f"the condition is {source.condition.shape[-2]}×{source.condition.shape[-1]} pixels, the picture "
                    f"{wanted[0]}×{wanted[1]}: resize the condition"
                )
        self.layouts = [self._layout(sample.shape[0], len(source.condition)) for source in self.sources]

    def after_time_embedding(self, _: nn.Module, __: tuple[Any, ...], time_embedding: torch.Tensor) -> None:
        """Evaluate the networks, each once for each distinct condition."""
        self.added = []
        if self.steering_guidance_scale is not None and not self.text_part_only:
            return
        for source, layout in zip(self.sources, self.layouts, strict=True):
            strength = self._strength(source, layout, time_embedding)
            if isinstance(strength, float) and not strength:
                continue
            if self.one_timestep:
                residuals = source.residuals(time_embedding[:1])
            else:
                residuals = source.evaluate(layout.per_row(source.condition), time_embedding)
                layout = _Layout(1, len(time_embedding), 1, layout.guided)
            self.added.append((strength, [r.to(time_embedding.device) for r in residuals], layout))

    def adder(self, position: int) -> Any:
        """The hook that adds residual ``position`` to a layer's output."""

        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return self._add(output, position)
            if isinstance(output, tuple):
                return (self._add(output[0], position), *output[1:])
            output.sample = self._add(output.sample, position)
            return output

        return add

    def after_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Steering guidance: evaluate the text-conditional rows again, steered, and combine."""
        if self.text_part_only:
            return None
        prior = output[0]
        layout = self.layouts[0]
        unconditional = len(prior) // layout.parts if layout.guided else 0
        self.text_part_only = True
        try:
            steered = unet(
                *(_rows(value, unconditional, len(prior)) for value in args),
                **{name: _rows(value, unconditional, len(prior)) for name, value in kwargs.items()},
            )[0]
        finally:
            self.text_part_only = False
        # Each half shifted by the same δ: guidance of the pipeline leaves δ as it is.
        delta = self.steering_guidance_scale * (steered - prior[unconditional:])
        shifted = prior + torch.cat([delta[:unconditional], delta])
        return (shifted, *output[1:]) if isinstance(output, tuple) else type(output)(sample=shifted)

    def _add(self, output: torch.Tensor, position: int) -> torch.Tensor:
        for strength, residuals, layout in self.added:
            residual = residuals[position].to(output.dtype)
            if layout.conditions > 1 and layout.parts * layout.images > 1:
                output = output.unflatten(0, (layout.parts, layout.conditions, layout.images))
                residual = residual[None, :, None]
                if isinstance(strength, torch.Tensor):
                    strength = strength.view(*output.shape[:3], 1, 1, 1)
            if isinstance(strength, torch.Tensor):
                output = output + strength.to(output.dtype) * residual
            else:
                output = torch.add(output, residual, alpha=strength)
            if output.ndim == 6:
                output = output.flatten(0, 2)
        return output

    def _strength(self, source: _Source, layout: _Layout, like: torch.Tensor) -> float | torch.Tensor:
        """A number where it is the same for every row, else (batch, 1, 1, 1)."""
        batch = layout.parts * layout.conditions * layout.images
        strength: float | torch.Tensor = float(source.scale)
        if (source.start, source.end) != (0.0, 1.0):
            scheduler = getattr(self.pipeline, "scheduler", None)
            total = 1000 if scheduler is None else scheduler.config["num_train_timesteps"]
            way = 1 - torch.as_tensor(self.timestep).float().flatten().cpu() / total
            active = (way >= source.start) & ((way < source.end) | (source.end == 1))
            if self.one_timestep:
                strength = strength if bool(active) else 0.0
            else:
                strength = strength * active.to(like)[:, None, None, None]
        if layout.guided and not self.steer_unconditional:
            halves = torch.ones(batch, 1, 1, 1, device=like.device, dtype=like.dtype)
            halves[: batch // layout.parts] = 0
            strength = strength * halves
        return strength

    def _layout(self, batch: int, count: int) -> _Layout:
        """Diffusers puts the unconditional part first and lays each prompt's images side by side."""
        if self.pipeline is None:
            if 2 * count == batch and not self.text_part_only:
                return _Layout(2, count, 1, True)
            halves_matter = self.steering_guidance_scale is not None or not self.steer_unconditional
            if count == batch or (count == 1 and (self.text_part_only or not halves_matter)):
                return _Layout(1, count, batch // count, False)
            half = f"half of {batch}" if halves_matter else f"1, {batch}, or half as many"
            raise PowersteerError(f"{count} conditions for a U-Net batch of {batch}: give {half}")
        guided = bool(getattr(self.pipeline, "do_classifier_free_guidance", False))
        parts = 1 + guided + bool(getattr(self.pipeline, "do_perturbed_attention_guidance", False))
        if self.text_part_only:
            parts, guided = parts - guided, False
        images = batch // parts
        if batch % parts or images % count:
            raise PowersteerError(
                f"{count} conditions for {images} images: give one, one for each prompt, or one for each image"
            )
        return _Layout(parts, count, images // count, guided)


_active: WeakKeyDictionary[nn.Module, list[_Bridge]] = WeakKeyDictionary()
"""The blocks that are open on each U-Net."""


def _unet_of(pipe: Any) -> tuple[Any, Any | None]:
    """The U-Net, beneath what torch.compile wrapped around it, and the pipeline if there is one."""
    unet = getattr(pipe, "unet", pipe) if isinstance(pipe, DiffusionPipeline) else pipe
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise PowersteerError(
            f"{type(pipe).__name__} has no UNet2DConditionModel to steer: give a Stable Diffusion pipeline or its U-Net"
        )
    return unet, pipe if isinstance(pipe, DiffusionPipeline) else None


def _warn_of(condition: torch.Tensor, kind: str | None, *, may_be_blank: bool) -> None:
    """Say what is probably not meant."""
    flat = condition.flatten(1)
    blank = (flat.amin(1) == flat.amax(1)).sum().item()
    ink = condition.mean().item()
    told = None
    if blank and not may_be_blank:
        of_several = f"{blank} of {len(condition)} conditions are" if len(condition) > 1 else "the condition is"
        told = f"{of_several} blank, one value all over: is the drawing lost, dark on black or transparent?"
    elif kind == "sketch" and ink > 0.5:
        told = f"{ink:.0%} of the sketch is ink, which is 1 on 0: is it inverted?"
    if told is not None:
        warnings.warn(told, PowersteerWarning, stacklevel=5)


def _spread(value: float | Sequence[float], count: int, name: str) -> list[float]:
    """One number for each network."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise PowersteerError(f"{name} has {len(value)} numbers for {count} networks: give one, or one for each")
    return list(value)


def _rows(value: Any, first: int, batch: int) -> Any:
    """The rows from ``first`` on of every tensor that has the batch's length, however deeply it is packed."""
    if isinstance(value, torch.Tensor):
        return value[first:] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(inner, first, batch) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(inner, first, batch) for inner in value)
    return value
