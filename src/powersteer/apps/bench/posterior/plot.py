"""Share of the Bayes gap closed against pairs, and against noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from powersteer.core.errors import PowersteerError

if TYPE_CHECKING:
    from powersteer.apps.bench.posterior.bench import PosteriorBench

NAMES = {
    "paper": "BPS paper",
    "uniform": "BPS uniform",
    "lite": "BPS lite",
    "controlnet": "ControlNet",
    "controlnet-no-latents": "ControlNet without z",
    "controlnet-xs": "ControlNet-XS",
    "t2i-adapter": "T2I-Adapter",
}
FLOOR = -0.2
"""Shares far below the prior would flatten the rest."""


def plot(result: PosteriorBench, file: Path) -> None:
    """Draw two panels: over all timesteps against pairs; in each band of timesteps at the most pairs.

    Raises:
        PowersteerError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    overall, by_band = figure.subplots(1, 2, sharey=True)
    most = max(row.pairs for row in result.rows)
    for method in dict.fromkeys(row.method for row in result.rows):
        rows = sorted((row for row in result.rows if row.method == method), key=lambda row: row.pairs)
        errors = [row.error or 0.0 for row in rows]
        overall.errorbar(
            [row.pairs for row in rows],
            [row.share for row in rows],
            errors,
            marker="o",
            capsize=3,
            label=f"{NAMES[method]} ({rows[-1].parameters / 1e6:.2f} M)",
        )
        by_band.plot(result.bands, rows[-1].share_by_band, marker="o")
    for axes in (overall, by_band):
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.axhline(0, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    overall.set(xscale="log", xlabel="training pairs", ylabel="share of the Bayes gap closed", ylim=(FLOOR, 1.05))
    overall.yaxis.set_major_formatter("{x:.0%}")
    overall.annotate("exact posterior", (0.02, 1.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    overall.annotate("exact prior", (0.02, 0.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    overall.legend(fontsize=8)
    by_band.set(xlabel=f"timesteps, little noise to much; {most:,} pairs")
    figure.suptitle(f"Observation: {result.observation}, worth {result.information_nats:.0f} nats")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise PowersteerError(f"cannot write {file}: {error.strerror}") from None
