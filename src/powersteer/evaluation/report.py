"""A run's figures and pictures as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from powersteer.core.pictures import to_pil

COLOURS = {"prior": "#888", "steered": "#0a7d4f", "shuffled": "#c2410c"}
"""Colour of each loss's curve."""


def write_report(path: Path, metrics: dict[str, Any], rows: list[dict[str, Any]], log: list[dict[str, float]]) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        metrics: What `powersteer demo` measured.
        rows: Each a caption ``text`` and ``pictures``, a heading → picture (3, H, W) in [-1, 1].
        log: The training log: rows with ``step``, ``prior``, ``steered`` and ``shuffled``.
    """
    template = _templates().get_template("report.html.jinja")
    page = template.render(**metrics, rows=rows, curves=curves(log))
    path.write_text(page + "\n", encoding="utf-8")


def curves(log: list[dict[str, Any]], width: int = 720, height: int = 260) -> str:
    """The log's prior, steered and shuffled losses as an SVG line plot.

    Without matplotlib, which neither the demo nor the studio's page needs for anything else.
    """
    left, right, bottom, top = 50, width - 10, height - 25, 10
    last_step = max((row["step"] for row in log), default=0) or 1
    most = 1.05 * max((row[name] for row in log for name in COLOURS if name in row), default=1.0)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * step / last_step, bottom - (bottom - top) * loss / most

    drawn = [
        {"name": name, "colour": colour, "points": [place(row["step"], row[name]) for row in log if name in row]}
        for name, colour in COLOURS.items()
    ]
    ticks = [(place(0, most * share)[1], most * share) for share in (0, 0.5, 1)]
    settings = {"width": width, "height": height, "left": left, "right": right, "bottom": bottom}
    template = _templates().get_template("curves.svg.jinja")
    return template.render(curves=drawn, ticks=ticks, last_step=last_step, **settings)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["png_base64"] = _png_base64
    return environment


def _png_base64(picture: torch.Tensor) -> str:
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
