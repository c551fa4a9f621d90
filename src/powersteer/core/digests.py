"""Digests: whether something is still what it was."""

from __future__ import annotations

import hashlib

import torch


def content_digest(content: bytes) -> str:
    """SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's weights, by their names, types and bytes; hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
