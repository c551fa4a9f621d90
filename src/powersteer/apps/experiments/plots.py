"""Plots of an experiment's results."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from powersteer.adapters.baselines import BASELINES
from powersteer.apps.experiments.compare import ExperimentConfig
from powersteer.apps.experiments.results import QUALITY, SET_AGAINST, Figure, Results, axis_label, shown_as

BESIDE: dict[str, Any] = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
"""Where a plot's legend stands: many methods would cover their own curves."""


def draw(experiment: ExperimentConfig, results: Results, folder: Path) -> list[str]:
    """Quality of each method, against pairs and parameters, and curves over updates and seconds; the files' names.

    Raises:
        OSError: A file cannot be written.
    """
    plots = Plots(experiment, results)
    quality = next((key for key in QUALITY if key in results.keys), None)
    figures: dict[str, Any] = {"methods": plots.methods_side_by_side()}
    if quality is not None:
        if len(plots.panels) > 1:
            figures["pairs"] = plots.against_pairs(quality)
        figures["trained-parameters"] = plots.against_parameters(quality)
    figures |= {"curves": plots.curves("step", "updates"), "seconds": plots.curves("seconds", "training seconds")}
    names = {f"{experiment.name}-{kind}.png": figure for kind, figure in figures.items() if figure is not None}
    for name, figure in names.items():
        figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return list(names)


class Plots:
    """One look for all plots of an experiment: a method keeps its colour; those that are not BPS are dashed."""

    def __init__(self, experiment: ExperimentConfig, results: Results) -> None:
        from matplotlib import colormaps

        self.results, self.panels, self.methods = results, results.panels(experiment), results.methods(experiment)
        colors = [colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]  # the dark ones first
        self.styles: dict[str, dict[str, Any]] = {}
        for method, color in zip(self.methods, itertools.cycle(colors), strict=False):
            baseline = experiment.methods[method].get("network") in BASELINES
            self.styles[method] = {"color": color, "linestyle": "--" if baseline else "-", "label": method}

    def methods_side_by_side(self) -> Any:
        """A row for each method, with a stroke for each seed and a dot for their mean; None without figures."""
        keys = [key for key in SET_AGAINST if key in self.results.keys]
        if not keys:
            return None
        figure, axes = _figure(3.6, 0.8 + 0.26 * len(self.methods), len(self.panels), len(keys), layout="constrained")
        for (row, pairs), (column, key) in itertools.product(enumerate(self.panels), enumerate(keys)):
            axis, (_, factor, _) = axes[row][column], shown_as(key)
            for at, method in enumerate(self.methods):
                if seeds := [factor * value for value in self.results.by_seed(method, pairs, key).values()]:
                    axis.plot(seeds, [at] * len(seeds), "|", color="gray")
                    axis.plot(mean(seeds), at, "o", color=self.styles[method]["color"])
            axis.grid(alpha=0.3)
            axis.locator_params(axis="x", nbins=5)
            axis.set(title=f"{pairs} pairs", xlabel=axis_label(key) if row + 1 == len(self.panels) else "")
        axes[0][0].set_yticks(range(len(self.methods)), self.methods)
        axes[0][0].set_ylim(len(self.methods) - 0.5, -0.5)
        return figure

    def against_pairs(self, key: str) -> Any:
        """A line for each method."""
        figure, axes = _figure(5, 3.6)
        axis = axes[0][0]
        for method in self.methods:
            self._points(axis, method, key, dict(enumerate(self.panels)))
        axis.set_xticks(range(len(self.panels)), [str(pairs) for pairs in self.panels])
        axis.set(xlabel="pairs", ylabel=axis_label(key))
        axis.legend(**BESIDE)
        return figure

    def against_parameters(self, key: str) -> Any:
        """A point for each method, on a log axis."""
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        figure, panels = self._panels(3.2, "trained parameters", axis_label(key))
        for axis, pairs in panels:
            for method in self.methods:
                size = {run["trained_parameters"]: pairs for run in self.results.of(method, pairs)}
                self._points(axis, method, key, size)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
        return figure

    def curves(self, across: str, label: str) -> Any:
        """Validation losses, on a log axis: what differs at the end would vanish beside the start."""
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        figure, panels = self._panels(3.6, label, "validation loss")
        for axis, pairs in panels:
            for method in self.methods:
                curve = _mean_curve(self.results.of(method, pairs), across)
                axis.plot([x for x, _ in curve], [loss for _, loss in curve], **self.styles[method])
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        return figure

    def _panels(self, height: float, across: str, upwards: str) -> tuple[Any, list[tuple[Any, int | str]]]:
        """A panel for each number of pairs, and a legend of every method, run there or not."""
        figure, axes = _figure(4, height, 1, len(self.panels))
        for axis, pairs in zip(axes[0], self.panels, strict=True):
            axis.set(title=f"{pairs} pairs", xlabel=across)
        axes[0][0].set_ylabel(upwards)
        for method in self.methods:
            axes[0][-1].plot([], [], **self.styles[method])
        axes[0][-1].legend(**BESIDE)
        return figure, list(zip(axes[0], self.panels, strict=True))

    def _points(self, axis: Any, method: str, key: str, places: dict[int, int | str]) -> None:
        """Means with their standard errors: of numbers of pairs, by their place on the axis across."""
        found: dict[int, Figure] = {}
        for place, pairs in places.items():
            if (figure := self.results.figure(method, pairs, key)) is not None:
                found[place] = figure
        _, factor, _ = shown_as(key)
        height = [factor * figure.mean for figure in found.values()]
        errors = [factor * (figure.error or 0.0) for figure in found.values()]
        axis.errorbar(list(found), height, yerr=errors, marker="o", capsize=3, **self.styles[method])


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, layout: Literal["constrained"] | None = None
) -> tuple[Any, Any]:
    """Axes (rows, columns) of that size each, in inches, with the same scale upwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure: Any = Canvas(figsize=(width * columns, height * rows), layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False)


def _mean_curve(runs: list[dict[str, Any]], across: str) -> list[tuple[float, float]]:
    """Means of ``across`` and of the validation loss, over the seeds, at each validation."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in (row for run in runs for row in run["curve"]):
        rows[row["step"]].append(row)
    return [(mean(row[across] for row in at), mean(row["steered"] for row in at)) for _, at in sorted(rows.items())]
