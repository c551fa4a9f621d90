"""The picture of the network, drawn from the models themselves: python docs/tools/network.py

Widths, depths, resolutions, integration weights, parameters and the layers that are steered are read from a
U-Net and a `BPSModel` on torch's meta device; nothing is written down here but where things stand on the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch

from powersteer import BPSModel
from powersteer.apps.bench.shapes import make_unet
from powersteer.backbones.protocol import backbone_of

PICTURES = {"network.svg": "paper", "network-lite.svg": "lite"}
"""Files in docs/, each with its preset; Stable Diffusion 1.5's shape."""

WIDTH, HEIGHT = 1120, 560
LEFT, RIGHT = 150, 1040
UNET_Y, BPS_Y = 170, 402
INK, GREY, PALE, LINE = "#263238", "#607d8b", "#eceff1", "#b0bec5"
STRONG, LIGHT, EDGE = "#3f51b5", "#9fa8da", "#283593"


@dataclass(frozen=True)
class Column:
    """One U-Net block, and the part of the network that steers it."""

    part: str
    side: int
    """Of its feature maps, in latent pixels."""
    unet_width: int
    width: int
    """Of CP, TP or EP here."""
    blocks: int
    """Residuals; one for each ResNet, or one in all for the middle."""
    weight: float
    added_after: tuple[str, ...]
    """Layers of the U-Net block, by kind."""


def columns(unet: Any, model: BPSModel) -> list[Column]:
    """From the outermost down block to the outermost up block."""
    config: Any = model.config
    widths, depths = config["block_out_channels"], config["layers_per_block"]
    hidden = config["hidden_channels"] or widths
    foot = config["up_channels"] or hidden
    layers = list(backbone_of(unet).sites())
    taken = 0

    def column(part: str, level: int, width: int, blocks: int, weight: float) -> Column:
        nonlocal taken
        kinds = [type(layer).__name__ for position, layer in layers if taken <= position < taken + blocks]
        taken += blocks
        counts = [(kinds.count(kind), name) for kind, name in (("ResnetBlock2D", "R"), ("Transformer2DModel", "T"))]
        added = tuple(f"{count} {name}" for count, name in counts if count)
        side = unet.config["sample_size"] // 2**level
        return Column(part, side, widths[level], width, blocks, weight, added)

    levels = range(len(widths))
    down = [column("CP", i, hidden[i], depths[i], config["down_weights"][i]) for i in levels]
    middle = column("TP", levels[-1], hidden[-1], 1, config["mid_weight"])
    return [*down, middle, *(column("EP", i, foot[i], depths[i] + 1, config["up_weight"]) for i in reversed(levels))]


def draw(preset: str) -> str:
    """The picture as SVG, for Stable Diffusion 1.5's U-Net."""
    with torch.device("meta"):
        unet, factor = make_unet("sd15")
        model = BPSModel.from_unet(unet, pixel_unshuffle=factor, preset=preset)  # pyright: ignore[reportArgumentType]
    parts = columns(unet, model)
    step = (RIGHT - LEFT) / (len(parts) - 1)
    at = [LEFT + 44 + i * (step - 6) for i in range(len(parts))]
    last = len(parts) - 1
    shapes = [rectangle(0, 0, WIDTH, HEIGHT, "#ffffff", rx=8)]

    # Skip connections, the U-Net's above and the network's below; then the way through.
    for i in range(last // 2):
        rise, top, bottom = 14 * (last // 2 - i), UNET_Y - tall(parts[i]) / 2, BPS_Y + tall(parts[i]) / 2
        shapes.append(hook(at[i], top, at[last - i], 104 - rise, LINE))
        shapes.append(hook(at[i], bottom, at[last - i], 468 + rise, LIGHT))
    for y, widths, colour in (
        (UNET_Y, [c.unet_width for c in parts], GREY),
        (BPS_Y, [c.width for c in parts], STRONG),
    ):
        for i in range(last):
            shapes.append(arrow(at[i] + wide(widths[i]) / 2, y, at[i + 1] - wide(widths[i + 1]) / 2, y, colour))

    # What goes in and out.
    shapes += [
        text(36, UNET_Y - 32, "text", GREY),
        arrow(56, UNET_Y - 32, at[0] - wide(parts[0].unet_width) / 2, UNET_Y - 32, GREY),
        text(36, UNET_Y + 5, "z_t", INK, size=16),
        arrow(56, UNET_Y, at[0] - wide(parts[0].unet_width) / 2, UNET_Y, GREY),
        text(36, UNET_Y + 42, "t", INK, size=16),
        arrow(56, UNET_Y + 37, at[0] - wide(parts[0].unet_width) / 2, UNET_Y + 37, GREY),
        text(36, BPS_Y + 5, "c", INK, size=16),
        text(102, BPS_Y - 8, f"unshuffle {factor}", GREY, size=12),
        text(102, BPS_Y + 18, "conv 3×3", GREY, size=12),
        arrow(48, BPS_Y, at[0] - wide(parts[0].width) / 2, BPS_Y, STRONG),
        # The time embedding, which the network borrows.
        f'<path d="M 84 {UNET_Y + 37} V {BPS_Y - 42} H {at[0] - wide(parts[0].width) / 2 - 2:.0f}" fill="none" '
        f'stroke="{STRONG}" stroke-dasharray="4 4" marker-end="url(#strong)"/>',
        text(78, (UNET_Y + BPS_Y) / 2 - 8, "time", STRONG, size=12, anchor="end"),
        text(78, (UNET_Y + BPS_Y) / 2 + 8, "embedding", STRONG, size=12, anchor="end"),
        arrow(at[-1] + wide(parts[-1].unet_width) / 2, UNET_Y, WIDTH - 48, UNET_Y, GREY),
        text(WIDTH - 28, UNET_Y + 6, "ε̄", INK, size=18),
    ]

    for x, column in zip(at, parts, strict=True):
        high, unet_wide, bps_wide = tall(column), wide(column.unet_width), wide(column.width)
        # The residuals' way up, as thick as they are strong.
        thick = 1.5 + 1.6 * log2(column.weight) if column.weight >= 1 else 1
        start, end = BPS_Y - high / 2, UNET_Y + high / 2 + 2 * thick + 2
        shapes.append(
            f'<path d="M {x:.0f} {start:.0f} V {end:.0f}" stroke="{STRONG}" stroke-width="{thick:.1f}"/>'
            f'<path d="M {x - 2 * thick - 2:.1f} {end + 1:.1f} H {x + 2 * thick + 2:.1f} L {x:.0f} '
            f'{UNET_Y + high / 2 + 1:.1f} Z" fill="{STRONG}"/>'
        )
        shapes.append(rectangle(x - 20, 277, 40, 24, "#ffffff", stroke=STRONG, rx=12))
        shapes.append(text(x, 294, f"×{column.weight:g}", EDGE, bold=True))
        shapes.append(rectangle(x - unet_wide / 2, UNET_Y - high / 2, unet_wide, high, PALE, stroke=GREY))
        lines = [(f"{column.unet_width}", INK, 13), *((line, GREY, 11) for line in column.added_after)]
        for row, (line, ink, size) in enumerate(lines):
            shapes.append(text(x, UNET_Y + 12 - 8 * len(lines) + 16 * row, line, ink, size=size))
        fill, ink = (LIGHT, INK) if column.part == "EP" else (STRONG, "#ffffff")
        shapes.append(rectangle(x - bps_wide / 2, BPS_Y - high / 2, bps_wide, high, fill, stroke=EDGE))
        shapes.append(text(x, BPS_Y + 5, f"{column.width}", ink))
        shapes.append(
            text(x + unet_wide / 2 + 3, UNET_Y + high / 2 + 12, f"{column.side}²", GREY, size=11, anchor="start")
        )

    middle = last // 2
    shapes += [
        text((at[0] + at[middle - 1]) / 2, 546, f"CP · {count(parts, 'CP')} time-aware blocks", EDGE),
        text(at[middle], 546, f"TP · {len(model.mid_blocks)}", EDGE),
        text((at[middle + 1] + at[-1]) / 2, 546, f"EP · {count(parts, 'EP')} light blocks", EDGE),
        text(20, 24, f"frozen U-Net, {millions(unet)}", GREY, anchor="start", bold=True),
        text(WIDTH - 20, 24, "R ResNets, T transformers: a residual is added after each", GREY, anchor="end"),
        text(20, 546, f"{preset}, {millions(model)}", EDGE, anchor="start", bold=True),
    ]
    marks = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M 0 0 L 8 4 L 0 8 Z" fill="{colour}"/></marker>'
        for name, colour in (("grey", GREY), ("strong", STRONG))
    )
    title = f"BPS, preset {preset}, beside the U-Net of Stable Diffusion 1.5"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<defs>{marks}</defs>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def wide(channels: int) -> float:
    """Of a box."""
    return 30 + 52 * channels / 1280


def tall(column: Column) -> float:
    """Of a box: less by a step with every halving of its maps."""
    return 24 * log2(column.side) - 20


def count(parts: list[Column], part: str) -> int:
    """Blocks of one path."""
    return sum(column.blocks for column in parts if column.part == part)


def millions(network: torch.nn.Module) -> str:
    """Parameters."""
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", rx: int = 4) -> str:
    """A box with round corners."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{rx}" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )


def text(
    x: float, y: float, words: str, colour: str, *, size: int = 13, anchor: str = "middle", bold: bool = False
) -> str:
    """Words; an underscore sets one letter low."""
    weight = ' font-weight="bold"' if bold else ""
    head, _, low = words.partition("_")
    shown = f'{head}<tspan font-size="{size * 0.7:.0f}" dy="4">{low}</tspan>' if low else words
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{shown}</text>"
    )


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    """A thin line with a head."""
    head = "grey" if colour == GREY else "strong"
    return (
        f'<path d="M {x:.1f} {y:.1f} L {to_x - 1:.1f} {to_y:.1f}" stroke="{colour}" stroke-width="1.2" '
        f'marker-end="url(#{head})"/>'
    )


def hook(x: float, y: float, to_x: float, by: float, colour: str) -> str:
    """From a box, along a level, to another box of the same height."""
    return (
        f'<path d="M {x:.1f} {y:.1f} V {by:.1f} H {to_x:.1f} V {y:.1f}" fill="none" stroke="{colour}" '
        f'stroke-width="1.5" stroke-linejoin="round"/>'
    )


if __name__ == "__main__":
    for name, preset in PICTURES.items():
        (Path(__file__).parents[1] / name).write_text(draw(preset), encoding="utf-8")
