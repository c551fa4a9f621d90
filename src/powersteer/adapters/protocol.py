"""What the house asks of an adapter: a network that steers a frozen backbone.

A new network is one file in `adapters/baselines/`, with a subclass of one of the two kinds. Nothing else asks which it
is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from powersteer.backbones.protocol import Backbone, Call

Strength = float | torch.Tensor
"""A number, or one for each row of the batch: (B, 1, 1, 1)."""


@dataclass(frozen=True)
class Spec:
    """What a network was made for."""

    channels: int
    """Channels of the conditions."""
    reads: int
    """Channels that the network itself takes; a condition of one serves as three."""
    factor: int
    """Condition pixels per latent pixel, along each side."""
    widths: list[int]
    """Widths of the backbone's levels."""
    depths: list[int] | None
    """Layers in each level; None where the network does not depend on it."""
    base: Mapping[str, Any]
    """See `powersteer.backbones.fingerprint`; block widths at least."""
    conditioning: Mapping[str, Any]
    """Kind, range, polarity and palette, as far as they were recorded."""


class Adapter(nn.Module, ABC):
    """A network that steers; a mixin for diffusers' models.

    There are two kinds. What reads the condition and the time alone gives residuals, which are shared by the rows of a
    batch and kept for the next prompt: `ResidualAdapter`. What reads the latents or the text too is evaluated for every
    call and has a hand in it: `CallAdapter`.
    """

    presets: ClassVar[tuple[str, ...]] = ()
    """Its names in a configuration."""
    ablation: ClassVar[str | None] = None
    """What it leaves out, by the configuration's name."""
    steers_unconditional: ClassVar[bool] = True
    """Whether both halves of classifier-free guidance are steered, unless one says otherwise."""

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether it is for such denoisers: U-Nets, if a network does not say otherwise."""
        return hasattr(module, "down_blocks")

    @classmethod
    @abstractmethod
    def from_base(
        cls,
        unet: Any,
        *,
        preset: str,
        conditioning_channels: int,
        pixel_unshuffle: int,
        prediction_type: str | None = None,
        conditioning: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """An untrained network, which steers nothing yet.

        Args:
            unet: What it will steer.
            preset: One of ``presets``.
            conditioning_channels: Channels of the condition.
            pixel_unshuffle: The VAE's scale factor.
            prediction_type: The scheduler's, recorded with the base.
            conditioning: What the condition is; recorded, too.
            **options: Of one kind of network; others have no use for them.
        """

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """What it was made for."""

    def save_activation_memory(self: Any) -> None:
        """Gradient checkpointing, in networks that know it."""
        if self._supports_gradient_checkpointing:
            self.enable_gradient_checkpointing()


@dataclass(frozen=True)
class Headed:
    """What a network's head makes of features, at the layer that it is added to."""

    model: ResidualAdapter
    place: int
    """The layer's place in `ResidualAdapter.sites`."""
    features: torch.Tensor
    """(1 or B, tokens, width)."""
    strength: Strength = 1.0
    rest: Headed | None = None
    """What another condition adds."""

    def __call__(self) -> torch.Tensor:
        """(1 or B, tokens, D)."""
        made = self.model.residual(self.place, self.features)
        made = made * (self.strength.flatten(1)[..., None] if torch.is_tensor(self.strength) else self.strength)
        return made if self.rest is None else made + self.rest()

    def __add__(self, other: Headed) -> Headed:
        return replace(other, rest=self if other.rest is None else self + other.rest)


Addition = torch.Tensor | Headed
"""What is added to a layer's output: (1 or B, C, h, w), or what makes (1 or B, tokens, D)."""


class ResidualAdapter(Adapter):
    """An adapter that reads the condition and the time alone."""

    reads_time: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False
    """Whether `residuals` gives features, of which `residual` makes what is added."""

    def sites(self, backbone: Backbone) -> Iterable[tuple[int, nn.Module]]:
        """The layers that residuals are added to, with the residual's position."""
        return backbone.sites()

    def residual(self, place: int, features: torch.Tensor) -> torch.Tensor:
        """What a head makes of features (N, tokens, width) for the layer of a place in `sites`: (N, tokens, D)."""
        raise TypeError(f"{type(self).__name__} has no heads")

    @abstractmethod
    def residuals(self, condition: torch.Tensor, time_embedding: torch.Tensor) -> list[torch.Tensor]:
        """One residual (N, C, H, W) a position, or features (N, tokens, width).

        Args:
            condition: (N, C, H, W).
            time_embedding: (N, D) or (1, D), the backbone's own.
        """


class CallAdapter(Adapter):
    """An adapter that reads the latents or the text too, and so is evaluated for every row of every call."""

    @abstractmethod
    def intervene(
        self, backbone: Backbone, call: Call, condition: torch.Tensor, strength: Strength, hooks: ExitStack
    ) -> None:
        """Have a hand in one call: extend ``call.kwargs``, or put hooks on layers until ``hooks`` close.

        Args:
            backbone: What is called.
            call: The call.
            condition: (B, C, H, W), one for each row.
            strength: Of the steering.
            hooks: Closes when the call is over.
        """
