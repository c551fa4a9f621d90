"""What makes BPS an adapter: the method itself is `powersteer.adapters.bps.model`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from powersteer.adapters.protocol import ResidualAdapter, Spec


class BPSAdapter(ResidualAdapter):
    """A network of residuals, shaped after a U-Net."""

    gradient_checkpointing: bool

    @classmethod
    def from_base(cls: Any, unet: Any, **options: Any) -> Any:
        """See `Adapter.from_base` and `BPSModel.from_unet`."""
        return cls.from_unet(unet, **options)

    @property
    def spec(self) -> Spec:
        """What it was made for."""
        config: Any = self.config
        widths = list(config["block_out_channels"])
        return Spec(
            channels=config["conditioning_channels"],
            reads=config["conditioning_channels"],
            factor=config["pixel_unshuffle"],
            widths=widths,
            depths=list(config["layers_per_block"]),
            base=config["base"] or {"block_out_channels": widths},
            conditioning=config["conditioning"] or {},
        )

    def residuals(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> list[torch.Tensor]:
        """Down, middle, up."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            steering: Any = checkpoint(self, condition, time_embedding, use_reentrant=False)
        else:
            steering = self(condition, time_embedding)
        return [*steering.down, steering.mid, *steering.up]
