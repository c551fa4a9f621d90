"""Pictures of people → condition tensors: (N, C, H, W) in [0, 1]."""

from powersteer.conditions.tensors import to_condition

__all__ = ["to_condition"]
