"""The steering of a condition over a schedule, kept: the network reads only (condition, timestep).

Every further prompt or seed under the same condition and schedule then costs no evaluation of the network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch

from powersteer.adapters.protocol import Adapter

Residuals = list[torch.Tensor]
"""One weighted residual (N, C, H, W) for each of the backbone's positions, N conditions."""
Step = tuple[Hashable, ...]
"""What the time features depend on."""
Key = tuple[str, Step]
"""Digest of network and condition, and what the time features depend on."""


class SteeringPlan:
    """A memory-bounded store of residuals.

    When it is full, the conditions not used for longest make room; a schedule that does not fit alone is kept as far
    as it fits.

    Args:
        dtype: Of the kept residuals; the network's own by default, and then results are those without a plan.
        device: Where they are kept; where the network is by default. ``cpu`` spares a GPU's memory: the residuals of
            the next step then come to it while this one is computed.
        memory_limit: Bytes; by default a quarter of what is free there.
    """

    FREE_MEMORY_SHARE = 0.25

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.dtype, self.memory_limit = dtype, memory_limit
        self.device = None if device is None else torch.device(device)
        self.nbytes = 0
        """Bytes that the kept residuals take."""
        self._kept: OrderedDict[str, dict[Step, Residuals]] = OrderedDict()
        self._coming: tuple[Key, Residuals, Any] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        """How many evaluations of the network are kept."""
        return sum(len(steps) for steps in self._kept.values())

    def get(self, source: str, step: Step, device: torch.device | None = None) -> Residuals | None:
        """What was kept under these keys, in the plan's dtype; None if nothing was.

        Args:
            source: Digest of network and condition.
            step: What the time features depend on.
            device: Where it is wanted; where it is kept by default.
        """
        if source not in self._kept:
            return None
        self._kept.move_to_end(source)
        kept = self._kept[source].get(step)
        if kept is None or device is None or kept[0].device == device:
            return kept
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != (source, step) or coming[1][0].device != device:
            return [residual.to(device, non_blocking=residual.is_pinned()) for residual in kept]
        _, residuals, arrived = coming
        here = torch.cuda.current_stream(device)
        here.wait_event(arrived)  # the GPU waits, not the program
        for residual in residuals:
            residual.record_stream(here)
        return residuals

    def fetch(self, source: str, step: Step, device: torch.device) -> None:
        """Have what was kept under these keys come to a GPU while it computes something else.

        Args:
            source: See `get`.
            step: See `get`.
            device: Where it will be wanted.
        """
        kept = self._kept.get(source, {}).get(step)
        if kept is None or device.type != "cuda" or kept[0].device == device:
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            residuals = [residual.to(device, non_blocking=True) for residual in kept]
            self._coming = (source, step), residuals, self._stream.record_event()

    def put(self, source: str, step: Step, residuals: Residuals) -> None:
        """Keep the residuals, if there is room or older conditions can make some.

        Args:
            source: See `get`.
            step: See `get`.
            residuals: What the network returned.
        """
        size = sum(tensor.numel() * (self.dtype or tensor.dtype).itemsize for tensor in residuals)
        limit = self._limit(self.device or residuals[0].device)
        while self.nbytes + size > limit and any(other != source for other in self._kept):
            self._drop(next(other for other in self._kept if other != source))
        if self.nbytes + size <= limit:
            self._kept.setdefault(source, {})[step] = [self._copied(residual) for residual in residuals]
            self.nbytes += size

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._coming, self.nbytes = None, 0

    def _copied(self, residual: torch.Tensor) -> torch.Tensor:
        device, dtype = self.device or residual.device, self.dtype or residual.dtype
        if device.type == "cpu" and residual.device.type == "cuda":
            return torch.empty(residual.shape, dtype=dtype, pin_memory=True).copy_(residual)
        return residual.to(device, dtype, copy=True)

    def _drop(self, source: str) -> None:
        steps = self._kept.pop(source)
        self.nbytes -= sum(tensor.nbytes for residuals in steps.values() for tensor in residuals)

    def _limit(self, device: torch.device) -> int:
        if self.memory_limit is not None:
            return self.memory_limit
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return int(self.FREE_MEMORY_SHARE * (free + self.nbytes))


_plans: WeakKeyDictionary[Adapter, SteeringPlan] = WeakKeyDictionary()


def plan_of(adapter: Adapter) -> SteeringPlan:
    """The plan that `attach` uses for a network when it is given none; it lives as long as the network."""
    return _plans.setdefault(adapter, SteeringPlan())
