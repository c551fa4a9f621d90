"""Muon for a network's hidden matrices and convolutions, AdamW for the rest.

Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) takes torch.optim's implementation, which knows matrices
only: a convolution (out, in, h, w) is given to it as a view (out, in·h·w) of the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer over both, with AdamW's learning rate scale for all (update RMS matched)."""

    def __init__(self, model: nn.Module, lr: float, *, betas: tuple[float, float], weight_decay: float) -> None:
        """Args:
        model: Its parameters in their final place and memory format; not to be moved afterwards.
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
        super().__init__([{"params": part} for part in (hidden, rest) if part], {"lr": lr})
        self._views = [(p, nn.Parameter(_matrix(p.detach(), like=p))) for p in hidden]
        assert all(view.data_ptr() == p.data_ptr() for p, view in self._views)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if hidden:
            views = [view for _, view in self._views]
            muon = torch.optim.Muon(views, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._optimizers["muon"] = muon
        if rest:
            adamw = torch.optim.AdamW(rest, lr, betas=betas, weight_decay=weight_decay, fused=True)
            self._optimizers["adamw"] = adamw

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else _matrix(parameter.grad, like=parameter)
        for group, optimizer in zip(self.param_groups, self._optimizers.values(), strict=True):
            optimizer.param_groups[0]["lr"] = group["lr"]
            optimizer.step()
        for _, view in self._views:
            view.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for group, (name, optimizer) in zip(self.param_groups, self._optimizers.items(), strict=True):
            optimizer.load_state_dict(state_dict[name])
            group["lr"] = optimizer.param_groups[0]["lr"]


def _fans(parameter: torch.Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter[0].numel()


def _matrix(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A matrix (out, everything else) in the order of ``like``'s memory: of ``like`` itself, a view."""
    if tensor.ndim == 2 or like.is_contiguous():
        return tensor.flatten(1)
    return tensor.permute(0, 2, 3, 1).flatten(1)
