"""Digests: whether something is still what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch


def content_digest(content: bytes) -> str:
    """SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's weights; on all cores, since a U-Net has gigabytes (some three seconds each, a core)."""
    tensors = sorted(module.state_dict().items())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(tensors_digest, [{name: tensor} for name, tensor in tensors])
        return content_digest("".join(digests).encode())


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by their names, types, shapes and bytes, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
