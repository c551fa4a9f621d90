"""Pictures of people → condition tensors: (N, C, H, W) in [0, 1]."""

from powersteer.conditions.tensors import condition_picture, to_condition

__all__ = ["condition_picture", "to_condition"]
