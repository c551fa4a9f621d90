"""Whether numbers changed: digests of tensors, and their versions, which cost nothing to look at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter

import torch
from torch import nn

Versions = tuple[tuple[int, ...], tuple[int, ...]]
"""Addresses and versions of tensors."""
_ADDRESS, _VERSION = torch.Tensor.data_ptr, attrgetter("_version")


def versions(tensors: Sequence[torch.Tensor]) -> Versions | None:
    """Other ones after any change in place or exchange of the memory; None for tensors that have no version."""
    try:
        return tuple(map(_ADDRESS, tensors)), tuple(map(_VERSION, tensors))
    except RuntimeError:  # made in inference mode
        return None


def digest(*tensors: torch.Tensor) -> str:
    """A digest of the tensors' shapes, dtypes and values."""
    content = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        content.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


@torch.no_grad()
def weights_digest(module: nn.Module) -> str | None:
    """A digest of all weights, in one pass over them and one copy from the device; None if they lie elsewhere.

    Of each row of a weight: the exclusive or of its bits, which any single change alters, and its product with a fixed
    vector, which depends on the order.
    """
    found: list[torch.Tensor] = []
    content = hashlib.blake2b(digest_size=16)
    for name, weight in module.named_parameters():
        if weight.is_meta:
            return None
        content.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        rows = weight.detach().flatten(1) if weight.ndim > 1 else weight.detach().reshape(1, -1)
        found.append(torch.hash_tensor(rows, dim=1).view(torch.int64).flatten())
        found.append((rows.float() @ _vector(rows.shape[1], rows.device)).view(torch.int32).long())
    if found:
        content.update(torch.cat(found).cpu().numpy().tobytes())
    return content.hexdigest()


@lru_cache(maxsize=64)
def _vector(width: int, device: torch.device) -> torch.Tensor:
    """Numbers in [0.5, 1.5), none like its neighbours: multiples of an irrational number."""
    places = torch.arange(1, width + 1, device=device, dtype=torch.float64)
    return (places * 0.7548776662466927).frac().add(0.5).float()
