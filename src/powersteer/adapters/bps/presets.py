"""The network's shape for a U-Net: how wide each part is, and how strongly it steers."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any


def network_shape(unet: Any, preset: str, weights: str | Sequence[float]) -> dict[str, Any]:
    """The arguments of `BPSModel` that follow from a U-Net.

    Args:
        unet: A `UNet2DConditionModel`.
        preset: ``paper``: the U-Net's own widths, 3×3 output convolutions, and for SDXL self-attention in CP and TP;
            or ``lite``: `lite_widths`, 1×1 output convolutions, no attention.
        weights: ``head-heavy``, ``uniform``, or one number for each level of CP, then TP's, then EP's.

    Raises:
        ValueError: ``preset`` or ``weights`` is unknown, or ``weights`` of the wrong length.
    """
    widths = tuple(unet.config["block_out_channels"])
    depth = unet.config["layers_per_block"]
    if isinstance(weights, str):
        down, mid, up = integration_weights(weights, len(widths))
    elif len(weights) == len(widths) + 2:
        *down, mid, up = weights
    else:
        raise ValueError(f"weights has {len(weights)} numbers; {len(widths)} levels, TP and EP need {len(widths) + 2}")
    shape: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": (depth,) * len(widths) if isinstance(depth, int) else tuple(depth),
        "time_embed_dim": unet.time_embedding.linear_2.out_features,
        "norm_num_groups": unet.config["norm_num_groups"],
        "down_weights": tuple(down),
        "mid_weight": mid,
        "up_weight": up,
    }
    if preset == "lite":
        hidden, foot = lite_widths(widths)
        return shape | {"hidden_channels": hidden, "up_channels": foot, "output_kernel_size": 1}
    if preset != "paper":
        raise ValueError(f"preset must be 'paper' or 'lite', not '{preset}'")
    if unet.config["addition_embed_type"] == "text_time":
        shape["attention_head_dim"] = gcd(64, *widths)
    return shape


def integration_weights(preset: str, levels: int) -> tuple[tuple[float, ...], float, float]:
    """How strongly each part of the U-Net is steered: (CP per level from the outermost, TP, EP).

    | preset      | levels   | CP           | TP | EP |
    |-------------|----------|--------------|----|----|
    | head-heavy  | 4 (SD)   | 16, 8, 4, 2  | 16 | 1  |
    | head-heavy  | 3 (SDXL) | 32, 16, 8    | 32 | 1  |
    | uniform     | any      | 1, …, 1      | 1  | 1  |

    Raises:
        ValueError: ``preset`` is neither ``head-heavy`` nor ``uniform``.
    """
    if preset == "uniform":
        return (1.0,) * levels, 1.0, 1.0
    if preset == "head-heavy":
        head = 32.0 if levels == 3 else 2.0**levels
        return tuple(head / 2**level for level in range(levels)), head, 1.0
    raise ValueError(f"weights must be 'head-heavy', 'uniform' or a list of numbers, not '{preset}'")


def lite_widths(widths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head-heavy in the parameters too: CP and TP at 3/8 of the U-Net's widths, EP at an eighth.

    Rounded to multiples of eight, at least eight.
    """

    def share(part: float) -> tuple[int, ...]:
        return tuple(max(8, 8 * round(part * width / 8)) for width in widths)

    return share(3 / 8), share(1 / 8)


def transformer_shape(width: int, preset: str) -> dict[str, Any]:
    """The widths of `BPSTransformerModel` for a transformer.

    Args:
        width: The transformer's.
        preset: ``paper``: features a sixteenth of the transformer's width, twice as many at the coarsest level; or
            ``lite``: half of that. Rounded to multiples of eight, from 32 on.

    Raises:
        ValueError: ``preset`` is unknown.
    """
    if preset not in ("paper", "lite"):
        raise ValueError(f"preset must be 'paper' or 'lite', not '{preset}'")
    share = 16 if preset == "paper" else 32
    first, middle, last = (max(32, 8 * round(part * width / share / 8)) for part in (1, 1.5, 2))
    return {"hidden_channels": (first, middle, last)}


def depth_weights(weights: str | Sequence[float], count: int) -> tuple[float, ...]:
    """How strongly each block of a transformer is steered, the first one first.

    | weights     | from … to              |
    |-------------|------------------------|
    | head-heavy  | 16 … 1, geometrically  |
    | foot-heavy  | 1 … 16                 |
    | uniform     | 1                      |

    Args:
        weights: One of these, or a number for each block.
        count: Blocks.

    Raises:
        ValueError: ``weights`` is unknown, or of the wrong length.
    """
    falling = tuple(16.0 ** (1 - place / max(1, count - 1)) for place in range(count))
    named = {"head-heavy": falling, "foot-heavy": falling[::-1], "uniform": (1.0,) * count}
    if isinstance(weights, str):
        if weights not in named:
            raise ValueError(f"weights must be {', '.join(named)} or a list of numbers, not '{weights}'")
        return named[weights]
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers for {count} blocks: give one for each")
    return tuple(weights)
