"""One adapter under one condition: what it adds to which layer in a call of the backbone."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from powersteer.adapters.clock import Clock, Once, progress
from powersteer.adapters.plan import Residuals, SteeringPlan, Step
from powersteer.adapters.protocol import Addition, CallAdapter, Headed, ResidualAdapter, Strength
from powersteer.adapters.rows import Rows
from powersteer.adapters.watch import Versions, digest, versions, weights_digest
from powersteer.backbones.protocol import Backbone, Call
from powersteer.conditions import to_condition
from powersteer.conditions.kind import BLIND, KINDS
from powersteer.core.errors import PowersteerError, PowersteerWarning


@dataclass(frozen=True)
class Evaluation:
    """One call of the backbone, as a source meets it."""

    backbone: Backbone
    call: Call
    clock: Clock
    rows: Rows
    scheduler: Any
    time: Any
    """The scheduler's timestep: a number or a tensor."""
    spare: list[bool] | None
    """Whether each row is left unsteered; None steers all."""

    @property
    def sample(self) -> torch.Tensor:
        """Noisy latents (B, C, h, w), or (B, N, C)."""
        return self.backbone.samples(self.call)

    def timesteps(self, known: bool) -> list[float] | None:
        """The timestep's values: one, or one a row; None if they need not be known and cannot be without a wait.

        Args:
            known: Whether they are needed.
        """
        timestep = self.time
        one = not torch.is_tensor(timestep) or timestep.numel() == 1
        if not known and (one or torch.is_grad_enabled()):
            return None
        values = self.clock.read(timestep)
        return values[:1] if len(set(values)) == 1 else values


class Source:
    """A network, its condition, and how strongly and how long it steers.

    Args:
        model: The network.
        backbone: What it steers.
        picture: The condition, in any form that `to_condition` takes.
        scale: Strength.
        start: Where steering sets in, from noise (0) to picture (1).
        end: Where it ends.
        plan: Where residuals are kept.

    Raises:
        PowersteerError: The condition is malformed, or a number out of its range.
    """

    def __init__(
        self,
        model: ResidualAdapter | CallAdapter,
        backbone: Backbone,
        picture: Any,
        scale: float,
        start: float,
        end: float,
        plan: SteeringPlan | None,
    ) -> None:
        if not math.isfinite(scale):
            raise PowersteerError(f"scale must be a finite number, not {scale}")
        if not 0 <= start <= end <= 1:
            raise PowersteerError(f"start and end must satisfy 0 ≤ start ≤ end ≤ 1, not {start:g} and {end:g}")
        self.model, self.backbone, self.plan = model, backbone, plan
        self.scale, self.start, self.end = float(scale), start, end
        self.spec = model.spec
        self.condition = self._read(picture)
        if not self.spec.conditioning.get(BLIND):
            kind = KINDS.find(self.spec.conditioning.get("kind"))
            # Training leaves some conditions out on purpose.
            for told in kind.warnings(self.condition, may_be_blank=model.training):
                warnings.warn(told, PowersteerWarning, stacklevel=5)
        self._given = picture
        given = picture if isinstance(picture, list | tuple) else [picture]
        self._tensors = [one for one in given if torch.is_tensor(one)]
        self._read_at = versions(self._tensors)
        self._parameters = [*model.parameters(), *backbone.time_layers.parameters()]
        self._key: tuple[Versions | None, str | None] | None = None
        self._inputs_read = Once()

    def additions(self, given: Evaluation, hooks: ExitStack) -> dict[nn.Module, Addition]:
        """What to add to which layer's output."""
        self._notice_changes()
        self._check_size(*given.backbone.grid(given.call))
        strength = self._strength(given)
        if isinstance(strength, float) and not strength:
            return {}
        model = self.model
        if isinstance(model, CallAdapter):
            condition = _placed(self._on(given.sample.device), given.rows, 1.0)
            batch = len(given.sample)
            condition = condition if len(condition) == batch else condition.expand(batch, -1, -1, -1)
            model.intervene(self.backbone, given.call, condition, strength, hooks)
            return {}
        placed, rows = self._residuals(model, given)
        device = given.sample.device
        if model.has_heads:
            features = [_placed(one.to(device), rows, 1.0) for one in placed]
            return {
                layer: Headed(model, place, features[position], strength)
                for place, (position, layer) in enumerate(model.sites(self.backbone))
            }
        as_they_are = isinstance(strength, float) and strength == 1.0 and rows.index is None
        if not as_they_are or placed[0].device != device:
            placed = [_placed(residual.to(device), rows, strength) for residual in placed]
        # Asked for in every call: a pipeline may have put other layers in since the last.
        return {layer: placed[position] for position, layer in model.sites(self.backbone)}

    def _residuals(self, model: ResidualAdapter, given: Evaluation) -> tuple[Residuals, Rows]:
        """The residuals, and whose they are."""
        plan = None if torch.is_grad_enabled() or self.model.training else self.plan
        if self._differing(model, given):
            condition = _placed(self._on(given.sample.device), given.rows, 1.0)
            batch = len(given.sample)
            embedding = given.backbone.time_embedding(given.call, given.call.get(given.backbone.timestep), batch)
            found = model.residuals(condition.expand(batch, -1, -1, -1), embedding.to(condition))
            return found, Rows(batch, batch, 1, None)
        source = None if plan is None else self._digest()
        if plan is None or source is None:
            return self._evaluate(model, given), given.rows
        step, device = self._step(model, given), given.sample.device
        found = plan.get(source, step[0], device)
        if found is None:
            found = self._evaluate(model, given)
            plan.put(source, step[0], found)
        if step[1] is not None:
            plan.fetch(source, step[1], device)
        return found, given.rows

    def _differing(self, model: ResidualAdapter, given: Evaluation) -> bool:
        """Whether rows have timesteps of their own, or other inputs of the time features."""
        if not model.reads_time:
            return False
        if torch.is_tensor(given.time) and given.time.numel() > 1:
            values = given.timesteps(known=False)
            if values is None or len(values) > 1:
                return True
        inputs = given.backbone.time_inputs(given.call)
        if inputs is None or len(inputs) == 1:
            return False
        return not self._inputs_read(inputs, lambda rows: (bool((rows == rows[:1]).all()), digest(rows[:1])))[0]

    def _evaluate(self, model: ResidualAdapter, given: Evaluation) -> Residuals:
        """Run the network, once for each condition."""
        condition = self._on(given.sample.device)
        timestep = given.call.get(given.backbone.timestep)
        if torch.is_tensor(timestep):
            timestep = timestep.flatten()[:1]
        embedding = given.backbone.time_embedding(given.call, timestep, 1)
        return model.residuals(condition, embedding.to(condition))

    def _step(self, model: ResidualAdapter, given: Evaluation) -> tuple[Step, Step | None]:
        """What the time features depend on, now and (as far as it is known) in the next step."""
        if not model.reads_time:
            return (), None
        inputs = given.backbone.time_inputs(given.call)
        told = "" if inputs is None else self._inputs_read(inputs, lambda rows: (True, digest(rows[:1])))[1]
        kind = given.sample.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given.sample.dtype
        now = (given.timesteps(known=True) or [0])[0]
        later = given.clock.following(given.time)
        return (now, told, precision), None if later is None else (later, told, precision)

    def _strength(self, given: Evaluation) -> Strength:
        """A number where it is the same for every row, else (B, 1, 1, 1)."""
        strength: list[float] = [self.scale]
        if (self.start, self.end) != (0.0, 1.0):
            try:
                ways = [progress(value, given.scheduler) for value in given.timesteps(known=True) or ()]
            except ValueError as error:
                raise PowersteerError(
                    f"where start={self.start:g} and end={self.end:g} lie cannot be told under this scheduler "
                    f"({error}): leave them out, or take another scheduler"
                ) from None
            strength = [self.scale * (self.start <= way and (way < self.end or self.end == 1)) for way in ways]
        if given.spare is not None:
            strength = strength * len(given.spare) if len(strength) == 1 else strength
            strength = [0.0 if spared else one for one, spared in zip(strength, given.spare, strict=True)]
        if len(set(strength)) == 1:
            return strength[0]
        return _column(tuple(strength), given.sample.device)

    def _digest(self) -> str | None:
        """A digest of network, time features' weights and condition: once a block, and after every change."""
        now = versions(self._parameters)
        if self._key is None or now is None or self._key[0] != now:
            found = [weights_digest(module) for module in (self.model, self.backbone.time_layers)]
            parts = None if None in found else f"{found[0]} {found[1]} {digest(self.condition)}"
            self._key = now, parts
        return self._key[1]

    def _notice_changes(self) -> None:
        """Read a condition again that was changed in place."""
        if not self._tensors:
            return
        now = versions(self._tensors)
        if now is not None and now == self._read_at:
            return
        condition = self._read(self._given)
        if now is None and torch.equal(condition, self.condition):
            return
        self.condition, self._read_at, self._key = condition, now, None

    def _read(self, picture: Any) -> torch.Tensor:
        """The condition (N, C, H, W) as the network reads it, a copy of its own."""
        spec, said = self.spec, self.spec.conditioning
        if spec.reads == 3 and torch.is_tensor(picture) and picture.ndim == 4 and picture.shape[1] == 1:
            picture = picture.expand(-1, 3, -1, -1)
        read = to_condition(picture, spec.reads, said.get("range", (0, 1)), said.get("kind"))
        parameter = next(self.model.parameters())
        device = read.device if parameter.is_meta else parameter.device
        own = read.to(device, parameter.dtype, copy=True)
        return torch.zeros_like(own) if said.get(BLIND) else own

    def _on(self, device: torch.device) -> torch.Tensor:
        """The condition where the network computes."""
        parameter = next(self.model.parameters())
        wanted = device if parameter.is_meta else parameter.device  # offloaded weights come with hooks of their own
        if (self.condition.device, self.condition.dtype) != (wanted, parameter.dtype):
            self.condition = self.condition.to(wanted, parameter.dtype)
        return self.condition

    def _check_size(self, height: int, width: int) -> None:
        wanted = self.spec.factor * height, self.spec.factor * width
        if tuple(self.condition.shape[-2:]) != wanted:
            raise PowersteerError(
                f"the condition is {self.condition.shape[-2]}×{self.condition.shape[-1]} pixels, the picture "
                f"{wanted[0]}×{wanted[1]}: resize the condition"
            )


def _placed(values: torch.Tensor, rows: Rows, strength: Strength) -> torch.Tensor:
    """(N, …) → (1 or B, …): of each row its own, times its strength."""
    index = rows.index
    if index is not None and index != list(range(len(values))):
        values = values[_places(tuple(index), values.device)]
    if isinstance(strength, torch.Tensor):
        return values * strength.to(values)
    return values if strength == 1 else values * strength


@lru_cache(maxsize=16)
def _places(index: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(index, device=device)


@lru_cache(maxsize=16)
def _column(strength: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(strength, device=device)[:, None, None, None]
