"""What the machine multiplies natively."""

from __future__ import annotations

import torch


def native_precision(device: torch.device) -> torch.dtype:
    """The fastest safe precision for autocast: bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage]
        return torch.bfloat16
    return torch.float32
