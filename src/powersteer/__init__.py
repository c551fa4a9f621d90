"""Bayesian Power Steering for frozen text-to-image diffusion models."""

from powersteer.errors import PowersteerError
from powersteer.model import BPSModel
from powersteer.steering import steer

__all__ = ["BPSModel", "PowersteerError", "steer"]
__version__ = "0.1.0"
