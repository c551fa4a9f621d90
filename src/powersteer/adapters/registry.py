"""The kinds of networks there are, by their names; each is found in its own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

from powersteer.adapters.protocol import Adapter
from powersteer.conditions.kind import BLIND

_ROOMS = ("powersteer.adapters.bps", "powersteer.adapters.baselines")


@cache
def adapter_classes() -> dict[str, type[Adapter]]:
    """Every kind of network by the name of its class, which a saved adapter's config tells."""
    for room in _ROOMS:
        for module in iter_modules(import_module(room).__path__):
            import_module(f"{room}.{module.name}")

    def named(kind: type[Adapter]) -> Iterator[type[Adapter]]:
        if kind.presets:
            yield kind
        for further in kind.__subclasses__():
            yield from named(further)

    return {kind.__name__: kind for kind in named(Adapter)}


def class_of(preset: str, ablation: str | None, module: nn.Module) -> type[Adapter]:
    """The kind of network that a configuration asks for.

    Args:
        preset: ``paper``, ``lite``, or a baseline's name.
        ablation: What it leaves out; ``blind`` is any network's.
        module: The denoiser that it will steer.

    Raises:
        ValueError: There is none.
    """
    wanted = None if ablation == BLIND else ablation
    for kind in adapter_classes().values():
        if preset in kind.presets and kind.ablation == wanted and kind.suits(module):
            return kind
    missing = f" without '{wanted}'" if wanted else ""
    raise ValueError(f"there is no network '{preset}'{missing} for a {type(module).__name__}")


def make_adapter(
    unet: Any,
    *,
    preset: str = "paper",
    ablation: str | None = None,
    conditioning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Adapter:
    """An untrained network for ``unet``; within `attach` it is exactly the prior.

    Args:
        unet: The U-Net or transformer that it will be attached to.
        preset: ``paper``, ``lite``, ``controlnet``, ``controlnet-xs`` or ``t2i-adapter``.
        ablation: BPS or ControlNet without something, or any network without its condition.
        conditioning: What the condition is; recorded, too.
        **options: See `Adapter.from_base`.

    Raises:
        ValueError: ``preset``, ``ablation`` or ``weights`` is unknown.
        PowersteerError: The baseline knows no such U-Net.
    """
    if ablation == BLIND:
        conditioning = {**(conditioning or {}), BLIND: True}
    given: Any = {"conditioning_channels": 1, "pixel_unshuffle": 8, **options}
    return class_of(preset, ablation, unet).from_base(unet, preset=preset, conditioning=conditioning, **given)
