"""Bayesian Power Steering for frozen text-to-image diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from powersteer.core.errors import PowersteerError

if TYPE_CHECKING:
    from powersteer.adapters.attach import attach as steer
    from powersteer.adapters.bps.model import BPSModel
    from powersteer.adapters.bps.transformer import BPSTransformerModel
    from powersteer.adapters.load import load_adapter
    from powersteer.adapters.plan import SteeringPlan
    from powersteer.backbones.load import load_base

__all__ = [
    "BPSModel",
    "BPSTransformerModel",
    "PowersteerError",
    "SteeringPlan",
    "load_adapter",
    "load_base",
    "steer",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use: ``powersteer --help`` need not wait for torch."""
    import importlib

    rooms = {
        "BPSModel": "adapters.bps.model",
        "BPSTransformerModel": "adapters.bps.transformer",
        "SteeringPlan": "adapters.plan",
        "load_adapter": "adapters.load",
        "load_base": "backbones.load",
        "steer": "adapters.attach",
    }
    if name in rooms:
        return getattr(importlib.import_module(f"powersteer.{rooms[name]}"), {"steer": "attach"}.get(name, name))
    raise AttributeError(f"module 'powersteer' has no attribute '{name}'")
