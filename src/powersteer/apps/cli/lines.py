"""Tables whose rows are printed as they come, each once."""

from __future__ import annotations

from collections.abc import Iterable

from powersteer.apps.cli.output import show

NARROWEST = 8


class Lines:
    """Prints the headings, and then row by row under them.

    Args:
        heading: Of the names.
        names: All that may come.
        *headings: Of the figures.
    """

    def __init__(self, heading: str, names: Iterable[str], *headings: str) -> None:
        self._width = max(map(len, (heading, *names)))
        self._widths = [max(len(one), NARROWEST) for one in headings]
        self.show(heading, *headings)

    def show(self, name: str, *cells: str) -> None:
        """Print a row: as many cells as there are headings, or fewer."""
        padded = [f"  {cell:>{width}}" for cell, width in zip(cells, self._widths, strict=False)]
        show(f"{name:<{self._width}}{''.join(padded)}".rstrip())


def shown(value: float | None, scale: float = 1.0, digits: int = 0, unit: str = "") -> str:
    """A figure times ``scale`` with so many digits and its unit; nothing where it is not known."""
    return "" if value is None else f"{value * scale:.{digits}f} {unit}".rstrip()


def shown_time(seconds: float | None) -> str:
    """Seconds, in milliseconds when under one."""
    return shown(seconds, 1e3, 1, "ms") if seconds is not None and seconds < 1 else shown(seconds, 1, 2, "s")
