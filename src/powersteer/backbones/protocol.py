"""What the house asks of a backbone: the frozen denoiser that adapters steer.

A new family of backbones is one file beside this one, with a subclass of `Backbone`. Nothing else asks which it is.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn

from powersteer.core.errors import PowersteerError


@dataclass(frozen=True)
class Call:
    """One call of a denoiser."""

    names: tuple[str, ...]
    """What the positional arguments are called."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        """An argument by name; None if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        place = self.names.index(name)
        return self.args[place] if place < len(self.args) else None

    @property
    def inputs(self) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self.names, self.args, strict=False)) | self.kwargs


class Backbone(ABC):
    """A frozen denoiser.

    Args:
        module: The network, which reads noisy latents (B, C, h, w), a timestep, and text.
    """

    arguments: ClassVar[tuple[str, ...]]
    """Names of the network's positional arguments."""
    sample: ClassVar[str] = "sample"
    """Name of the noisy latents among them."""
    timestep: ClassVar[str] = "timestep"

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    @abstractmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the network is of this family."""

    @abstractmethod
    def sites(self) -> Iterator[tuple[int, nn.Module]]:
        """Every layer whose output is steered, with the position of its residual in `Steering`'s order."""

    @abstractmethod
    def time_embedding(self, call: Call, timestep: Any, rows: int) -> torch.Tensor:
        """The network's own time features, as its layers read them: (rows, D), or (1, D).

        Args:
            call: The call whose other arguments the features may depend on.
            timestep: A number, or a tensor of one or of as many as rows.
            rows: How many.
        """

    @property
    @abstractmethod
    def time_layers(self) -> nn.Module:
        """The trained layers of `time_embedding`."""

    def time_inputs(self, call: Call) -> torch.Tensor | None:
        """What `time_embedding` depends on beside the timestep: (B, …), or None."""
        del call
        return None

    @property
    @abstractmethod
    def shape(self) -> tuple[list[int], list[int]]:
        """Widths of the levels, and layers in each: what an adapter must have been made for."""

    @abstractmethod
    def fingerprint(self, prediction_type: str | None = None) -> dict[str, Any]:
        """What an adapter must know of its base to refuse another.

        Args:
            prediction_type: The scheduler's, where it is known.
        """

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A call with these arguments."""
        return Call(self.arguments, args, dict(kwargs))

    @property
    def recomputes(self) -> bool:
        """Whether layers run again in the backward pass: gradient checkpointing."""
        return bool(getattr(self.module, "is_gradient_checkpointing", False))


def find_backbone(module: nn.Module) -> Backbone | None:
    """The backbone of a network, beneath what ``torch.compile`` wrapped around it; None if no family knows it."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    found = next((family for family in _families() if family.fits(inner)), None)
    return None if found is None else found(inner)


def backbone_of(module: nn.Module) -> Backbone:
    """`find_backbone`, or an error.

    Raises:
        PowersteerError: No family knows the network.
    """
    found = find_backbone(module)
    if found is None:
        raise PowersteerError(f"{type(module).__name__} is no denoiser that powersteer knows")
    return found


def _families() -> list[type[Backbone]]:
    """Every subclass in this folder."""
    if not Backbone.__subclasses__():
        package = __name__.rpartition(".")[0]
        for module in pkgutil.iter_modules(import_module(package).__path__):
            import_module(f"{package}.{module.name}")
    return Backbone.__subclasses__()
