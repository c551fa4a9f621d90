"""The one door: within `attach`, a frozen backbone denoises with the posterior p(image | text, condition).

Training, pictures, evaluation and the apps all come through here, whatever the adapter:

    with attach(pipe, adapter, condition):
        pipe("a fox")
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from powersteer.adapters.clock import Clock
from powersteer.adapters.engine import Engine, Run, summed
from powersteer.adapters.plan import SteeringPlan, plan_of
from powersteer.adapters.protocol import Adapter, Addition
from powersteer.adapters.rows import Caller, Guidance, Rows, rows_of
from powersteer.adapters.source import Evaluation, Source
from powersteer.backbones.fingerprint import describe, differences, predicted_by
from powersteer.backbones.protocol import Backbone, Call, find_backbone
from powersteer.backbones.transformer import FAMILIES
from powersteer.conditions.tensors import Condition
from powersteer.core.errors import PowersteerError

Plan = SteeringPlan | Literal["auto"] | None


@contextmanager
def attach(  # all that one can say of steering; more than half is its documentation
    pipe: DiffusionPipeline | nn.Module,
    model: Adapter | Sequence[Adapter],
    condition: Condition | Sequence[Condition],
    scale: float | Sequence[float] = 1.0,
    start: float | Sequence[float] = 0.0,
    end: float | Sequence[float] = 1.0,
    *,
    steer_unconditional: bool | None = None,
    steering_guidance_scale: float | None = None,
    unconditional: Sequence[bool] | None = None,
    plan: Plan = "auto",
    strict_base: bool = True,
) -> Generator[None]:
    """Within the block, ``pipe`` denoises with the posterior p(image | text, condition); afterwards it is as it was.

    With a list of networks, the other arguments may be lists too: several conditions add their steering, for the
    likelihoods of conditions that are independent given the image multiply.

    Within a step a network runs once for each distinct condition, not once for each row of the U-Net's batch; under a
    condition and schedule that its plan has seen, not at all. (Networks that read the latents, as ControlNet does, run
    for every row.) Which row has which condition is told from each call of the U-Net; what cannot be told is refused.
    The block acts in its own thread alone. A tensor that is changed within the block, and weights, are noticed;
    pictures and arrays are read when the block begins.

    Args:
        pipe: A diffusers pipeline (any that takes the U-Net; those that share it are steered too), or a bare U-Net.
            ``torch.compile`` it before the block.
        model: The network, made for this U-Net.
        condition: PIL picture(s), arrays (H, W) or (H, W, C), or a tensor (N, C, H, W) in [0, 1], or in the range that
            the network's config tells; see `powersteer.conditions.to_condition`. In a pipeline, N is 1, the number of
            prompts (each prompt's images share its condition) or the number of images. On a bare U-Net, N is 1, the
            batch, or half of it (the two halves of classifier-free guidance, the unconditional one first).
        scale: Strength of the steering; 0 is the prior.
        start: Where steering sets in, as a share of the way from noise (0) to picture (1); see
            `powersteer.adapters.clock.progress`.
        end: Where it ends.
        steer_unconditional: Under classifier-free guidance, steer both halves (the authors' way, and the default), or
            the text-conditional half only.
        steering_guidance_scale: With w_c given, and w_text the pipeline's guidance scale, predict
            ε(∅) + w_text·(ε(text) − ε(∅)) + w_c·(ε(text, c) − ε(text)), which tempers the likelihood
            p(c | z, text)^w_c. Costs a second evaluation of the U-Net.
        unconditional: Whether each part of a bare U-Net's batch is unconditional, in order: ``[True, False]`` for the
            halves of classifier-free guidance, ``[False]`` for a call with the text alone.
        plan: Where residuals are kept for the next prompt or seed: ``auto`` (the network's own plan), a
            `SteeringPlan`, or None.
        strict_base: Refuse a network that was trained on another base.

    Raises:
        PowersteerError: The network does not fit the U-Net, a condition is malformed, the lists differ in length, or
            (within the block) the number of conditions or their size does not fit the batch.
    """
    backbone, outer, pipeline = _taken_apart(pipe)
    models: list[Any] = [model] if isinstance(model, nn.Module) else list(model)
    several = not isinstance(model, nn.Module)
    conditions = list(condition) if several and isinstance(condition, Sequence) else [condition]
    spans = [_spread(value, len(models), name) for name, value in (("scale", scale), ("start", start), ("end", end))]
    if not models or len(conditions) != len(models):
        raise PowersteerError(f"{len(models)} networks need as many conditions, not {len(conditions)}")
    if steering_guidance_scale is not None and not math.isfinite(steering_guidance_scale):
        raise PowersteerError(f"steering_guidance_scale must be a finite number, not {steering_guidance_scale}")
    sources: list[Source] = []
    for network, picture, *span in zip(models, conditions, *spans, strict=True):
        check_fits(network, pipe, strict_base=strict_base)
        kept = plan_of(network) if isinstance(plan, str) else plan
        sources.append(Source(network, backbone, picture, *span, plan=kept))
    block = _Block(backbone, sources, pipeline, steer_unconditional, steering_guidance_scale, unconditional)
    block.check_alone()
    with Engine.open(backbone, outer, block):
        yield


def check_fits(model: Any, pipe: DiffusionPipeline | nn.Module, *, strict_base: bool = True) -> None:
    """Refuse a network made for another base.

    Args:
        model: The network.
        pipe: The pipeline, or the bare U-Net, to steer.
        strict_base: Whether to compare text width and prediction type too, which the network itself never sees.

    Raises:
        PowersteerError: Widths or depths differ, or (``strict_base``) the fingerprints.
    """
    if not isinstance(model, Adapter):
        raise PowersteerError(f"a {type(model).__name__} is no adapter: give what load_adapter gives, or train one")
    backbone, _, pipeline = _taken_apart(pipe)
    scheduler = _scheduler_of(pipeline, backbone)
    given = backbone.fingerprint(None if scheduler is None else predicted_by(scheduler))
    spec, (widths, depths) = model.spec, backbone.shape
    if widths != spec.widths or spec.depths not in (None, depths):
        made, has = ("" if spec.depths is None else f", {each} layers a level" for each in (spec.depths, depths))
        raise PowersteerError(
            f"the adapter was made for {describe(spec.base)}{made}; this is {describe(given)}{has}: load the base it "
            "was trained on"
        )
    if strict_base and differences(spec.base, given):
        raise PowersteerError(
            f"the adapter was trained on {describe(spec.base)}; this is {describe(given)}: load that base, or give "
            "strict_base=False to try all the same"
        )


@dataclass
class _Block:
    """What one `attach` has the engine do."""

    backbone: Backbone
    sources: list[Source]
    pipeline: Any | None
    steer_unconditional: bool | None
    steering_guidance_scale: float | None
    unconditional: Sequence[bool] | None
    clock: Clock = field(default_factory=Clock)
    thread: int = field(default_factory=threading.get_ident)
    _delta: tuple[list[float], torch.Tensor] | None = None
    """What steering changed in the last call with the text, and when."""

    def check_alone(self) -> None:
        """Refuse two blocks of which one has a scale of guidance of its own."""
        others: Any = Engine.blocks_of(self.backbone)
        if others and any(block.steering_guidance_scale is not None for block in (self, *others)):
            raise PowersteerError("blocks with steering_guidance_scale do not nest: give all conditions to one block")

    def additions(self, call: Call, caller: Caller | None, hooks: ExitStack) -> dict[nn.Module, Addition]:
        """See `powersteer.adapters.engine.Block`."""
        found: dict[nn.Module, Addition] = {}
        time = self.backbone.schedule_time(call, None if caller is None else caller.variables)
        scheduler = _scheduler_of(self.pipeline if caller is None else caller.pipeline, self.backbone)
        look = self._looks(call, caller)
        for source in self.sources:
            rows = self._rows(call, caller, len(source.condition), look)
            both = self.steer_unconditional
            if both is None:
                # A network that spares the unconditional half may meet calls that have none, as in training.
                both = source.model.steers_unconditional or (rows.unconditional is None and caller is None)
            spare = None if both else rows.marks()
            evaluation = Evaluation(self.backbone, call, self.clock, rows, scheduler, time, spare)
            found = summed(found, source.additions(evaluation, hooks))
        return found

    def around(self, call: Call, caller: Caller | None, prior: Run, steered: Run) -> Any:
        """See `powersteer.adapters.engine.Block`."""
        if self.steering_guidance_scale is None:
            return steered()
        if caller is not None and caller.says("guidance_rescale"):
            raise PowersteerError("guidance_rescale and steering_guidance_scale do not go together: leave one out")
        rows = self._rows(call, caller, len(self.sources[0].condition), self._looks(call, caller))
        marks, parts = rows.marks(), len(rows.unconditional or ())
        time = self.clock.read(self.backbone.schedule_time(call, None if caller is None else caller.variables))
        first = prior()
        before = torch.stack(first[0]) if isinstance(first[0], list) else first[0]
        if all(marks):
            # Guidance in two calls: the text's came just before, and its δ serves both.
            if self._delta is None or self._delta[0] != time:
                raise PowersteerError(
                    "steering_guidance_scale needs the text's call before the unconditional one: leave it out here"
                )
            delta = self._delta[1]
        else:
            output = steered()[0]
            change = (torch.stack(output) if isinstance(output, list) else output) - before
            delta = change.unflatten(0, (parts, -1))[marks[:: rows.batch // parts].index(False)]
            self._delta = time, delta
        # Each part shifted by the same δ, the text's: guidance of the pipeline leaves δ as it is.
        shifted: Any = before + self.steering_guidance_scale * delta.repeat(parts, *[1] * (delta.ndim - 1))
        shifted = list(shifted.unbind()) if isinstance(first[0], list) else shifted
        return (shifted, *first[1:]) if isinstance(first, tuple) else type(first)(sample=shifted)

    def _rows(self, call: Call, caller: Caller | None, count: int, look: bool) -> Rows:
        guidance = Guidance() if caller is None else Guidance(*self.backbone.guidance(call, caller.variables))
        sample = self.backbone.samples(call)
        return rows_of(sample, count, caller, self.unconditional, guidance=guidance, look=look)

    def _looks(self, call: Call, caller: Caller | None) -> bool:
        """Whether the layout of this call's rows matters, and is not known from an earlier one."""
        if self.steering_guidance_scale is not None:
            marks = True
        elif self.steer_unconditional is None:
            marks = not all(source.model.steers_unconditional for source in self.sources)
        else:
            marks = not self.steer_unconditional
        matters = marks or any(len(source.condition) > 1 for source in self.sources)
        return caller is not None and matters and self._begins(call, caller)

    def _begins(self, call: Call, caller: Caller) -> bool:
        """Whether a picture begins, as far as the timestep tells."""
        self.clock.read(self.backbone.schedule_time(call, caller.variables))
        return self.clock.fresh


def _taken_apart(pipe: Any) -> tuple[Backbone, nn.Module, Any | None]:
    """The backbone, the module that is called for it, and the pipeline if there is one."""
    pipeline = pipe if isinstance(pipe, DiffusionPipeline) else None
    candidates: list[Any] = [pipe] if pipeline is None else list(pipeline.components.values())
    for module in candidates:
        backbone = find_backbone(module) if isinstance(module, nn.Module) else None
        if backbone is not None:
            return backbone, module, pipeline
    raise PowersteerError(
        f"{type(pipe).__name__} has no denoiser to steer: give Stable Diffusion's pipeline or U-Net, or those of a "
        f"transformer ({', '.join(family.title for family in FAMILIES.values())})"
    )


def _scheduler_of(pipeline: Any | None, backbone: Backbone) -> Any | None:
    """A pipeline's scheduler for a backbone: the only one, or the one that is named like the backbone's part."""
    if pipeline is None or hasattr(pipeline, "scheduler"):
        return getattr(pipeline, "scheduler", None)
    names = (name for name, part in pipeline.components.items() if getattr(part, "_orig_mod", part) is backbone.module)
    return getattr(pipeline, f"{next(names, '')}_scheduler", None)


def _spread(value: float | Sequence[float], count: int, name: str) -> list[float]:
    """One number for each network."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise PowersteerError(f"{name} has {len(value)} numbers for {count} networks: give one, or one for each")
    return list(value)
