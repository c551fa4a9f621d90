"""What the machine does fast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from powersteer.errors import PowersteerError


def native_precision(device: torch.device) -> torch.dtype:
    """The fastest safe precision for autocast: bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage]
        return torch.bfloat16
    return torch.float32


def best_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` is the GPU where there is one.

    Raises:
        PowersteerError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise PowersteerError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None


def fast_attention(device_type: str, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Within it, attention trains fast: a CPU has a fast backward pass of attention in float32 alone.

    Forward and backward pass go within, for gradient checkpointing computes again on the way back.

    Args:
        device_type: ``cpu``, ``cuda``, …
        precision: Of autocast.
    """
    return _Float32Attention() if device_type == "cpu" and precision != torch.float32 else nullcontext()


class _Float32Attention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        with torch.autocast("cpu", enabled=False):
            result = func(query.float(), key.float(), value.float(), *rest, **(kwargs or {}))
        return result.to(query.dtype)
