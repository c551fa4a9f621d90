"""Bayesian Power Steering for frozen text-to-image diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from powersteer.errors import PowersteerError

if TYPE_CHECKING:
    from powersteer.base import load_adapter, load_base
    from powersteer.model import BPSModel
    from powersteer.plan import SteeringPlan
    from powersteer.steering import steer

__all__ = ["BPSModel", "PowersteerError", "SteeringPlan", "load_adapter", "load_base", "steer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use: ``powersteer --help`` need not wait for torch."""
    import importlib

    rooms = {
        "BPSModel": "model",
        "SteeringPlan": "plan",
        "load_adapter": "base",
        "load_base": "base",
        "steer": "steering",
    }
    if name in rooms:
        return getattr(importlib.import_module(f"powersteer.{rooms[name]}"), name)
    raise AttributeError(f"module 'powersteer' has no attribute '{name}'")
