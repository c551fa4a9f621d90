"""What an adapter's config.json may say: the ranges of its numbers, and the kinds of its records."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from powersteer.core.config import StrictConfig, build_config
from powersteer.core.errors import PowersteerError
from powersteer.core.weights import MOST, MOST_LAYERS, MOST_LEVELS, check_sizes, shown

BASELINE_RECORD = "_powersteer"
"""Key of a baseline's config; diffusers' own classes keep what begins so, and say nothing of it."""

Size = Annotated[int, Field(ge=1, le=MOST)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=MOST_LEVELS)]
Weights = Annotated[tuple[float, ...], Field(min_length=1, max_length=MOST_LEVELS)]


class _Open(StrictConfig):
    """What must be so of a record; a later version may have written more."""

    model_config = ConfigDict(extra="allow")


class BaseRecord(_Open):
    """See `powersteer.backbones.fingerprint`."""

    family: str | None = None
    block_out_channels: Sizes
    cross_attention_dim: Size | None = None
    prediction_type: str | None = None


class ConditioningRecord(_Open):
    """See `powersteer.conditions.kinds`."""

    kind: str | None = None
    channels: Size | None = None
    range: tuple[float, float] | None = None
    blind: bool = False


class Records(_Open):
    """What a network was trained on."""

    base: BaseRecord | None = None
    conditioning: ConditioningRecord | None = None


class BPSRecord(Records):
    """The arguments of `BPSModel`, in its order."""

    conditioning_channels: Size = 1
    pixel_unshuffle: int = Field(default=8, ge=1, le=64)
    block_out_channels: Sizes = (320, 640, 1280, 1280)
    layers_per_block: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=MOST_LEVELS)] = (2, 2, 2, 2)
    time_embed_dim: Size = 1280
    norm_num_groups: Size = 32
    attention_head_dim: Size | None = None
    hidden_channels: Sizes | None = None
    up_channels: Sizes | None = None
    output_kernel_size: Literal[1, 3, 5, 7] = 3
    down_weights: Weights = (16.0, 8.0, 4.0, 2.0)
    mid_weight: float = 16.0
    up_weight: float = 1.0
    trainable_weights: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)


def settings_of(kind: type) -> set[str]:
    """What the config.json of a class may set: a subclass's holds what its parents registered, too."""
    return {name for parent in kind.__mro__ for name in signature(parent.__init__).parameters}


def check_config(config: Mapping[str, Any], kind: type, name: str, where: str) -> None:
    """Refuse a config.json that ``kind`` would not understand, or would in part only.

    Args:
        config: What the file says.
        kind: The network's class.
        name: The network's, for messages.
        where: The file.

    Raises:
        PowersteerError: A setting is unknown, of another kind, or out of range.
    """
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = settings_of(kind)
    unknown = sorted(given.keys() - known)
    if unknown:
        package = "powersteer" if "conditioning" in known else "diffusers"
        raise PowersteerError(
            f"{name} was written by a newer {package}, with the setting '{shown(unknown[0])}' that this one does not "
            f"know: pip install --upgrade {package}"
        )
    if "conditioning" in known:
        build_config(given, BPSRecord, where=where)
    else:
        check_sizes(given, where)
        build_config(config.get(BASELINE_RECORD) or {}, Records, where=f"{where}, {BASELINE_RECORD}")
