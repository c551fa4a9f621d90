"""Muon for a network's hidden matrices and convolutions, AdamW for the rest.

Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) takes torch.optim's implementation, which knows matrices
only: a convolution (out, in, h, w) is given to it as a view (out, h·w·in) of the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonAdamW:
    """One optimizer over both, with AdamW's learning rate scale for all (update RMS matched)."""

    def __init__(self, model: nn.Module, lr: float, *, betas: tuple[float, float], weight_decay: float) -> None:
        """Args:
        model: Its parameters in their final memory format; not to be moved afterwards.
        lr: AdamW's scale.
        betas: Of AdamW.
        weight_decay: Of both.
        """
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        hidden: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim in (2, 4) and id(parameter) not in tables and min(_fans(parameter)) >= 16
                (hidden if matrix else rest).append(parameter)
        self._hidden = [(p, nn.Parameter(_matrix(p.detach()))) for p in hidden]
        views = [view for _, view in self._hidden]
        assert all(view.data_ptr() == p.data_ptr() for p, view in self._hidden)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if views:
            muon = torch.optim.Muon(views, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._optimizers["muon"] = muon
        if rest:
            adamw = torch.optim.AdamW(rest, lr, betas=betas, weight_decay=weight_decay, fused=True)
            self._optimizers["adamw"] = adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both optimizers."""
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        """Apply the gradients."""
        for parameter, view in self._hidden:
            view.grad = None if parameter.grad is None else _matrix(parameter.grad)
        for optimizer in self._optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter, _ in self._hidden:
            parameter.grad = None
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])


def _fans(parameter: torch.Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter[0].numel()


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix (out, everything else), without copying a contiguous or channels-last tensor."""
    return tensor if tensor.ndim == 2 else tensor.permute(0, 2, 3, 1).flatten(1)
