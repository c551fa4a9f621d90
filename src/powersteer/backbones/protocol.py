"""What the house asks of a backbone: the frozen denoiser that adapters steer.

A new family of backbones is one file beside this one, with a subclass of `Backbone`. Nothing else asks which it is.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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


@dataclass(frozen=True)
class Place:
    """Where image tokens lie in what a layer gives."""

    index: int | None
    """Position of the image's stream in a tuple; None where a layer gives one tensor."""
    first: int
    """The first image token."""
    count: int
    """How many follow it."""


class Backbone(ABC):
    """A frozen denoiser.

    Args:
        module: The network, which reads noisy latents (B, C, h, w), a timestep, and text.
    """

    arguments: tuple[str, ...]
    """Names of the network's positional arguments."""
    sample: str = "sample"
    """Name of the noisy latents among them."""
    timestep: str = "timestep"
    has_places: ClassVar[bool] = False
    """Whether its layers give tokens, see `places`; else pictures of features."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    @abstractmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the network is of this family."""

    @abstractmethod
    def sites(self) -> Iterable[tuple[int, nn.Module]]:
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

    def samples(self, call: Call) -> torch.Tensor:
        """The noisy latents of a call, (B, C, h, w) or as its tokens (B, N, C)."""
        return call.get(self.sample)

    def grid(self, call: Call) -> tuple[int, int]:
        """Height and width of what a condition is laid on: latents, or tokens."""
        height, width = self.samples(call).shape[-2:]
        return height, width

    def schedule_time(self, call: Call, variables: Mapping[str, Any] | None) -> Any:
        """The scheduler's timestep of a call: a number, or a tensor of one or of as many as rows.

        Args:
            call: The call.
            variables: Of the pipeline's method that makes it, if there is one.
        """
        del variables
        return call.get(self.timestep)

    def guidance(self, call: Call, variables: Mapping[str, Any]) -> tuple[bool, bool | None]:
        """How its pipelines lay out classifier-free guidance.

        Args:
            call: The call.
            variables: Of the pipeline's method that makes it.

        Returns:
            Whether the unconditional half of a batch comes second; and whether this call is of the unconditional text
            alone, None where that is not known.
        """
        del call, variables
        return False, None

    def places(self, call: Call, count: int) -> Mapping[nn.Module, Place]:
        """Where in each steered layer's output the image's tokens are.

        Args:
            call: The call.
            count: How many they are.
        """
        del call, count
        return {}

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


class PipelineBackbone(Backbone):
    """A backbone with the other parts of its base: how pictures and prompts become what it reads.

    Args:
        module: The denoiser.
        pipe: The base, a pipeline of diffusers; without one, the backbone knows what concerns the denoiser alone.
    """

    part: ClassVar[str]
    """Name of the denoiser in the pipeline."""

    def __init__(self, module: nn.Module, pipe: Any = None) -> None:
        super().__init__(module)
        self.pipe = pipe

    @property
    def denoiser(self) -> Any:
        """The network as the pipeline calls it: with what ``torch.compile`` wrapped around it."""
        return getattr(self.pipe, self.part)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that a picture depends on, by name."""
        names = (self.part, "vae", "text_encoder", "text_encoder_2")
        return {name: getattr(self.pipe, name) for name in names if getattr(self.pipe, name, None) is not None}

    @property
    def tokenizers(self) -> list[Any]:
        """One for each text encoder."""
        found = (getattr(self.pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
        return [tokenizer for tokenizer in found if tokenizer is not None]

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel, along each side."""
        return self.pipe.vae_scale_factor

    @property
    def sample_size(self) -> int:
        """Side of the latents that it was trained on."""
        return self.module.config["sample_size"]

    @property
    def size(self) -> int:
        """Side of the pictures that it was trained on, in pixels."""
        return self.sample_size * self.factor

    @property
    @abstractmethod
    def step(self) -> int:
        """What both sides of a picture must be multiples of, in pixels."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens in one prompt's text states, at most."""

    @property
    @abstractmethod
    def text_numbers(self) -> int:
        """Numbers in one prompt's text states, about."""

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] → scaled latents (N, C, h, w), float32 on the CPU: the posterior's mode."""
        vae = self.pipe.vae
        mode = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return mode.float().cpu() * vae.config.scaling_factor

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) → pictures (N, 3, H, W), about [-1, 1], in the VAE's precision."""
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample

    def pixels(self, latents: torch.Tensor) -> tuple[int, int]:
        """Height and width of the pictures that latents (N, C, h, w) stand for."""
        return latents.shape[-2] * self.factor, latents.shape[-1] * self.factor

    @abstractmethod
    def texts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Text states by name, as the pipeline itself makes them, (N, …); float32 on the CPU."""

    @abstractmethod
    def example(self, batch: int, size: tuple[int, int], tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """All arguments of a call, of zeros.

        Args:
            batch: Samples.
            size: Height and width of the latents.
            tokens: Of each prompt.
            dtype: Of latents and text.
        """

    @staticmethod
    @abstractmethod
    def inputs(states: Mapping[str, torch.Tensor], size: tuple[int, int]) -> dict[str, Any]:
        """The denoiser's other arguments.

        Args:
            states: What `texts` gave, or rows of it.
            size: Height and width of the pictures, in pixels.
        """


def find_backbone(module: nn.Module) -> Backbone | None:
    """The backbone of a network, beneath what ``torch.compile`` wrapped around it; None if no family knows it."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    found = next((family for family in _families(Backbone) if family.fits(inner)), None)
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


def base_of(pipe: Any) -> PipelineBackbone:
    """The backbone of a pipeline, with the pipeline's other parts.

    Raises:
        PowersteerError: No family knows its denoiser.
    """
    for family in _families(PipelineBackbone):
        module = getattr(pipe, family.part, None)
        inner = getattr(module, "_orig_mod", module)
        if inner is not None and family.fits(inner):
            return family(inner, pipe)
    raise PowersteerError(f"{type(pipe).__name__} has no denoiser that powersteer knows: give another base")


@cache
def _import_all() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def _families(kind: Any) -> list[Any]:
    """Every family of a kind; each is a class in this folder."""
    _import_all()

    def below(one: Any) -> Iterator[Any]:
        for further in one.__subclasses__():
            yield from below(further)
            if not further.__abstractmethods__:
                yield further

    return list(below(kind))
