"""What the networks of diffusers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from powersteer.adapters.protocol import Adapter, Spec
from powersteer.backbones.fingerprint import fingerprint
from powersteer.core.records import BASELINE_RECORD


class Baseline(Adapter):
    """A network of diffusers' own, whose config keeps what powersteer knows of it under one key."""

    @classmethod
    def from_base(
        cls,
        unet: Any,
        *,
        conditioning_channels: int,
        pixel_unshuffle: int,
        prediction_type: str | None = None,
        conditioning: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        """See `Adapter.from_base`; baselines have no options."""
        network = cls.untrained(unet, conditioning_channels, pixel_unshuffle)
        known = {"base": fingerprint(unet, prediction_type), "conditioning": conditioning}
        network.register_to_config(**{BASELINE_RECORD: known})
        return network

    @classmethod
    @abstractmethod
    def untrained(cls, unet: Any, channels: int, factor: int) -> Any:
        """The network as it starts.

        Args:
            unet: What it will steer.
            channels: Channels of the condition.
            factor: Condition pixels per latent pixel, along each side.
        """

    @property
    def spec(self) -> Spec:
        """What it was made for."""
        known: Mapping[str, Any] = self.recorded.get(BASELINE_RECORD) or {}
        widths, conditioning = self.base_widths, known.get("conditioning") or {}
        return Spec(
            channels=conditioning.get("channels") or self.reads,
            reads=self.reads,
            factor=self.factor,
            widths=widths,
            depths=None,
            base={"block_out_channels": widths, **(known.get("base") or {})},
            conditioning=conditioning,
        )

    @property
    def recorded(self: Any) -> Mapping[str, Any]:
        """Diffusers' record of how it was made."""
        return self.config

    @property
    def reads(self) -> int:
        """Channels that it reads."""
        return self.recorded["conditioning_channels"]

    @property
    def factor(self) -> int:
        """Condition pixels per latent pixel, along each side."""
        return 2 ** (len(self.recorded["conditioning_embedding_out_channels"]) - 1)

    @property
    def base_widths(self) -> list[int]:
        """Block widths of the U-Net that it was made for."""
        return list(self.recorded["block_out_channels"])


def conditioning_widths(factor: int) -> tuple[int, ...]:
    """The widths of the embedding through which ControlNet reads a condition, for the VAE's scale factor."""
    return (16, 32, 96, 256)[: factor.bit_length()]


def in_precision(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in the network's precision, however deeply they are packed."""
    if isinstance(value, dict):
        return {name: in_precision(inner, dtype) for name, inner in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
