"""How far a run is, and where it writes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from powersteer.core.errors import PowersteerError
from powersteer.training.checkpoint import Checkpoint, step_of
from powersteer.training.config import TrainConfig
from powersteer.training.folder import StillThere


@dataclass
class TrainState:
    """How far a run is: what a checkpoint keeps beside the tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: int = 0
    """Optimizer updates done."""
    seconds: float = 0.0
    """In the loop, over all its resumptions."""
    loss: float = math.nan
    best_step: int = 0
    best_loss: float = math.inf
    best_probe: float = math.inf
    """Loss on training pairs when the best was found."""
    validations_since: int = 0
    """Without a better one."""
    control_step: int | None = None
    """When the condition was first seen to be used."""
    order: str = field(default_factory=lambda: hashlib.sha256().hexdigest())
    """Digest of all samples trained on, in order."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: Path) -> TrainState:
        """What a checkpoint kept; a number that was not finite is None there.

        Raises:
            PowersteerError: It is no state of a run.
        """
        optional = {"control_step"}
        given = {key: value for key, value in values.items() if value is not None or key in optional}
        try:
            state = _STATES.validate_json(json.dumps(given))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            what = f"state.json: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            raise PowersteerError(f"{where} is damaged ({what}): it was not loaded") from None
        if state.step != step_of(where) or not 0 <= state.best_step <= state.step or state.validations_since < 0:
            raise PowersteerError(f"{where} is damaged (state.json: its steps cannot be): it was not loaded")
        return state

    def saw(self, names: list[str]) -> None:
        """Take note of what was trained on."""
        self.order = hashlib.sha256("\n".join([self.order, *names]).encode()).hexdigest()

    def finished(self, config: TrainConfig, last_step: int) -> bool:
        """Whether the updates, the time or the patience are used up."""
        out_of_time = config.max_train_minutes is not None and self.seconds >= 60 * config.max_train_minutes
        out_of_patience = config.patience is not None and self.validations_since >= config.patience
        return self.step >= last_step or out_of_time or out_of_patience


_STATES: TypeAdapter[TrainState] = TypeAdapter(TrainState)


@dataclass(frozen=True)
class Place:
    """Where a run writes, and what it goes on from."""

    folder: Path
    """Checkpoints, weights and log go here."""
    still_there: StillThere
    """Asked before anything is written."""
    checkpoint: Checkpoint | None = None
    """Whose weights are in the network already."""
    kept: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What every checkpoint keeps beside: the run's record, by its file's name."""
