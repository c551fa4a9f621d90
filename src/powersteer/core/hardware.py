"""What the machine is, and what it does fast."""

from __future__ import annotations

import functools
import platform
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from powersteer.core.errors import PowersteerError


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
    return _float32_attention() if device_type == "cpu" and precision != torch.float32 else nullcontext()


def machine(device: str) -> str:
    """What was measured on."""
    if torch.device(device).type == "cuda":
        chip = torch.cuda.get_device_name()
    else:
        chip = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{chip}; Python {platform.python_version()}, torch {torch.__version__}, diffusers {version('diffusers')}"


@contextmanager
def _float32_attention() -> Generator[None]:
    """In place of torch's function, not as a mode of torch's: modes are off while a backward pass computes again."""
    plain = F.scaled_dot_product_attention

    @functools.wraps(plain)  # torch.compile asks for a function's name
    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return plain(query.float(), key.float(), value.float(), *args, **kwargs).to(query.dtype)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
