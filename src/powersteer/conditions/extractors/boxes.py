"""Layout: named boxes as filled rectangles in their classes' colours."""

from __future__ import annotations

from PIL import Image, ImageDraw

from powersteer.conditions.extractor import EXTRACTORS, Box, Subject
from powersteer.conditions.palettes import InColours
from powersteer.core.errors import PowersteerError

SLACK = 1.0
"""Pixels by which annotations may overshoot the picture: they are rounded in many ways."""


@EXTRACTORS.add("layout", "boxes", needs="named boxes in the source")
class Boxes(InColours):
    """Boxes on black, larger ones behind smaller ones, of one size in the order given.

    A box covers the pixels from its rounded left and top to before its rounded right and bottom, one at least.
    """

    kind = "layout", "boxes"
    palette: str = "coco-stuff"

    def __call__(self, subject: Subject) -> Image.Image:
        """RGB."""
        if subject.boxes is None:
            raise PowersteerError("there are no boxes here: a layout needs named boxes")
        width, height = subject.picture.size
        drawn = Image.new("RGB", (width, height))
        pen = ImageDraw.Draw(drawn)
        for box in sorted(subject.boxes, key=lambda box: -box.area):
            _check(box, width, height)
            colour = self.colours.colours[self.colours.index(box.label)].tolist()
            left, top = min(max(0, round(box.left)), width - 1), min(max(0, round(box.top)), height - 1)
            right, bottom = max(left, min(width, round(box.right)) - 1), max(top, min(height, round(box.bottom)) - 1)
            pen.rectangle((left, top, right, bottom), fill=tuple(colour))
        return drawn


def _check(box: Box, width: int, height: int) -> None:
    corners = f"({box.left:g}, {box.top:g}) to ({box.right:g}, {box.bottom:g})"
    if not (box.left < box.right and box.top < box.bottom):
        raise PowersteerError(f"box '{box.label}', {corners}, is empty")
    if min(box.left, box.top) < -SLACK or box.right > width + SLACK or box.bottom > height + SLACK:
        raise PowersteerError(f"box '{box.label}', {corners}, lies outside the picture of {width}×{height} pixels")
