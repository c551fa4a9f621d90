"""The steering of a condition over a schedule, kept: the network reads only (condition, timestep).

Every further prompt or seed under the same condition and schedule then costs no evaluation of the network.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from weakref import WeakKeyDictionary

import psutil
import torch

from powersteer.adapters.bps.model import BPSModel

Residuals = list[torch.Tensor]
"""One weighted residual (N, C, H, W) for each of the U-Net's positions, N conditions."""


class SteeringPlan:
    """A memory-bounded store of residuals.

    When it is full, the conditions not used for longest make room; a schedule that does not fit alone is kept as far
    as it fits.

    Args:
        dtype: Of the kept residuals; the network's own by default, and then results are those without a plan.
        device: Where they are kept; where the network is by default. ``cpu`` spares a GPU's memory.
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
        self._kept: OrderedDict[str, dict[str, Residuals]] = OrderedDict()

    def __len__(self) -> int:
        """How many evaluations of the network are kept."""
        return sum(len(steps) for steps in self._kept.values())

    def get(self, source: str, step: str) -> Residuals | None:
        """What was kept under these keys, on the plan's device and in its dtype; None if nothing was."""
        if source not in self._kept:
            return None
        self._kept.move_to_end(source)
        return self._kept[source].get(step)

    def put(self, source: str, step: str, residuals: Residuals) -> None:
        """Keep the residuals, if there is room or older conditions can make some.

        Args:
            source: Digest of network and condition.
            step: Digest of the timestep's embedding.
            residuals: What the network returned.
        """
        kept = [
            residual.to(self.device or residual.device, self.dtype or residual.dtype, copy=True)
            for residual in residuals
        ]
        size = sum(tensor.nbytes for tensor in kept)
        limit = self._limit(kept[0].device)
        while self.nbytes + size > limit and any(other != source for other in self._kept):
            self._drop(next(other for other in self._kept if other != source))
        if self.nbytes + size <= limit:
            self._kept.setdefault(source, {})[step] = kept
            self.nbytes += size

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.nbytes = 0

    def _drop(self, source: str) -> None:
        steps = self._kept.pop(source)
        self.nbytes -= sum(tensor.nbytes for residuals in steps.values() for tensor in residuals)

    def _limit(self, device: torch.device) -> int:
        if self.memory_limit is not None:
            return self.memory_limit
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return int(self.FREE_MEMORY_SHARE * (free + self.nbytes))


_plans: WeakKeyDictionary[BPSModel, SteeringPlan] = WeakKeyDictionary()


def plan_of(model: BPSModel) -> SteeringPlan:
    """The plan that `steer` uses for a network when it is given none; it lives as long as the network."""
    return _plans.setdefault(model, SteeringPlan())


def digest(*tensors: torch.Tensor) -> str:
    """A digest of the tensors' shapes, dtypes and values."""
    content = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        content.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def weights_digest(model: BPSModel) -> str:
    """A digest of a sample of every weight: it changes whenever training, loading or casting changed the network."""
    samples = [p.detach().flatten()[:: max(1, p.numel() // 8)] for p in model.parameters()]
    return digest(torch.cat(samples))
