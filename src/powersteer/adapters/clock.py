"""What lies on the device is read once: timesteps of a schedule, and how far a timestep is from noise to picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

_LARGEST = 1 << 16
"""Numbers in the largest storage that is read whole."""


class Once:
    """Remembers what was computed of the tensor that was given last, until it changes."""

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self.value: Any = None
        """The last answer."""
        self.fresh = True
        """Whether the last answer was computed anew."""

    def __call__(self, tensor: torch.Tensor, compute: Callable[[torch.Tensor], T]) -> T:
        """``compute(tensor)``, or what it gave for the same numbers in the same place."""
        key = None if tensor.is_inference() else (*_place(tensor), tensor._version)
        self.fresh = key is None or key != self._key
        if self.fresh:
            # The tensor is kept: its memory cannot become another's meanwhile.
            self._tensor, self._key, self.value = tensor, key or (), compute(tensor)
        return self.value


class Clock:
    """Timesteps as numbers, read off the device once for each schedule."""

    def __init__(self) -> None:
        self._schedule = Once()

    @property
    def fresh(self) -> bool:
        """Whether the last timestep was the first that was read of its schedule: a picture begins."""
        return self._schedule.fresh

    def read(self, timestep: Any) -> list[float]:
        """The values of a timestep: a number, or a tensor of any shape."""
        if not torch.is_tensor(timestep):
            self._schedule.fresh = True
            return [float(timestep)]
        storage = timestep.untyped_storage()
        if storage.nbytes() > _LARGEST * timestep.itemsize:
            return timestep.flatten().tolist()
        values = self._schedule(_whole(timestep), torch.Tensor.tolist)
        if timestep.ndim == 0:
            return [float(values[timestep.storage_offset()])]
        places = torch.arange(len(values)).as_strided(timestep.shape, timestep.stride(), timestep.storage_offset())
        return [float(values[place]) for place in places.flatten().tolist()]

    def following(self, timestep: Any) -> float | None:
        """The value after this one in its schedule, if it was read and has one."""
        if not torch.is_tensor(timestep) or timestep.ndim or self._schedule.value is None:
            return None
        values, place = self._schedule.value, timestep.storage_offset() + 1
        return float(values[place]) if place < len(values) else None


def progress(value: float, scheduler: Any) -> float:
    """How far a timestep lies on the way from noise (0) to picture (1).

    The share of the training timesteps that is behind it. Where a scheduler tells a network ¼·ln σ instead (Karras et
    al., NeurIPS 2022): of EDM's own schedule, the place of σ on its ramp of σ^(1/ρ); of a discrete schedule, the
    timestep whose σ it is.

    Args:
        value: The timestep, as the denoiser is given it.
        scheduler: Its scheduler; 1000 training timesteps if there is none.

    Raises:
        ValueError: The timestep is none of that scheduler's.
    """
    config: Any = getattr(scheduler, "config", {})
    total = config.get("num_train_timesteps", 1000)
    low, high, rho = (config.get(name) for name in ("sigma_min", "sigma_max", "rho"))
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        alphas = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
        log_sigmas = np.log((1 - alphas) / alphas) / 2
        value = float(np.interp(4 * value, log_sigmas, np.arange(len(alphas))))
    elif low is not None and high is not None and rho is not None:
        told = 1 if hasattr(scheduler, "precondition_noise") else 1000  # consistency models multiply it
        sigma, first, last = (noise ** (1 / rho) for noise in (math.exp(4 * value / told), high, low))
        return min(max((first - sigma) / (first - last), 0.0), 1.0)
    if not 0 <= value <= total:
        raise ValueError(f"{value:g} is no timestep of 0 to {total}")
    return 1 - value / total


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The one-dimensional tensor of all numbers in a tensor's storage."""
    if tensor.ndim == 1 and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    base = tensor._base
    if base is not None and base.ndim == 1 and base.is_contiguous() and base.storage_offset() == 0:
        return base
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.detach().as_strided((size,), (1,), 0)
