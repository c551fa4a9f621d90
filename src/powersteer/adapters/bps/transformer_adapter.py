"""What makes BPS for transformers an adapter: the method itself is `powersteer.adapters.bps.transformer`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from powersteer.adapters.protocol import ResidualAdapter, Spec
from powersteer.backbones.protocol import Backbone
from powersteer.backbones.transformer import TransformerBackbone


class BPSTransformerAdapter(ResidualAdapter):
    """A network of features, shaped after a diffusion transformer, with a head for each of its blocks."""

    has_heads = True
    gradient_checkpointing: bool

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether it is a transformer of the table."""
        return TransformerBackbone.fits(module)

    @classmethod
    def from_base(cls: Any, unet: Any, **options: Any) -> Any:
        """See `Adapter.from_base` and `BPSTransformerModel.from_transformer`."""
        return cls.from_transformer(unet, **options)

    @property
    def spec(self) -> Spec:
        """What it was made for."""
        config: Any = self.config
        return Spec(
            channels=config["conditioning_channels"],
            reads=config["conditioning_channels"],
            factor=config["pixel_unshuffle"],
            widths=[config["inner_dim"]],
            depths=[config["num_layers"]],
            base=config["base"] or {"block_out_channels": [config["inner_dim"]]},
            conditioning=config["conditioning"] or {},
        )

    def residuals(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> list[torch.Tensor]:
        """Features of the stages, (N, tokens, width)."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            features: Any = checkpoint(self, condition, time_embedding, use_reentrant=False)
            return features
        return self(condition, time_embedding)

    def sites(self, backbone: Backbone) -> list[tuple[int, nn.Module]]:
        """Every block, with its stage."""
        return [(self.stage_of(place), layer) for place, layer in backbone.sites()]

    @abstractmethod
    def stage_of(self, place: int) -> int:
        """Which of the features a block reads."""
