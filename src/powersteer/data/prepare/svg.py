"""SVG → pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from powersteer.core.errors import PowersteerError


def rasterise(svg: str, size: int, background: str = "#ffffff", *, crisp: bool = False) -> np.ndarray[Any, Any]:
    """Draw a square SVG as (3, size, size) uint8 on ``background``; ``crisp`` edges mix no colours.

    Raises:
        PowersteerError: The rasteriser is not installed.
        ValueError: The SVG is malformed.
    """
    try:
        import resvg_py
    except ImportError:
        raise PowersteerError("drawing SVGs needs resvg-py: pip install 'powersteer[demo]'") from None
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size,
        height=size,
        background=background,
        skip_system_fonts=True,
        shape_rendering="crisp_edges" if crisp else "geometric_precision",
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()


@dataclass(frozen=True)
class Rasteriser:
    """The work of a process that draws numbered SVGs, ``size`` pixels a side."""

    size: int

    def __call__(self, numbered: tuple[int, str]) -> tuple[int, np.ndarray[Any, Any]]:
        """The number, and the picture (3, size, size) on white."""
        place, svg = numbered
        return place, rasterise(svg, self.size)
