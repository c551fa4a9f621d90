"""Tables and plots of an experiment, from its results alone."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from powersteer.adapters import BASELINES
from powersteer.compare import ExperimentConfig
from powersteer.errors import PowersteerError

HEADINGS = {
    "information.nats": ("Information, nats a latent dimension ↑", 1.0, ""),
    "denoising.reduction": ("Denoising loss below the prior's ↑", 100.0, " %"),
    "lines.f1": ("Line fidelity, F1 ↑", 1.0, ""),
    "denoising.loss": ("Denoising loss ↓", 1.0, ""),
    "information.control": ("Information lost by exchanged conditions ↑", 1.0, ""),
    "denoising.control": ("Loss added by exchanged conditions ↑", 1.0, ""),
}
"""Heading, factor and unit of a figure, in the order shown; others have their own name."""
_HIDDEN = ("information.nats_error", "denoising.gain", "denoising.gain_error", "denoising.control_error")
BESIDE: dict[str, Any] = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
"""Where a plot's legend stands: many methods would cover their own curves."""
QUALITY = ("information.nats", "denoising.reduction")
"""What is plotted: the first that was measured."""
SET_AGAINST = (*QUALITY, "lines.f1")
"""What the reference is compared in."""


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and its standard error (None with one seed)."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        """Of one value a seed."""
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(mean(values), error)

    def difference(self, factor: float = 1.0, unit: str = "") -> str:
        """As text, with its sign; bold where it is more than two errors from zero."""
        shown = f"{'+' if self.mean > 0 else ''}{self.shown(factor, unit)}"
        return f"**{shown}**" if self.error is not None and abs(self.mean) > 2 * self.error else shown

    def shown(self, factor: float = 1.0, unit: str = "") -> str:
        """As text, with the digits that the error warrants."""
        if self.error is None:
            return f"{factor * self.mean:.3g}{unit}"
        error = factor * self.error
        digits = 2 if error >= 0.1 else 3 if error >= 0.001 else 4
        return f"{factor * self.mean:.{digits}f} ± {error:.{digits}f}{unit}"


@dataclass(frozen=True)
class Results:
    """What an experiment's results folder holds."""

    runs: list[dict[str, Any]]
    tuning: dict[str, dict[str, Any]]
    prior: dict[str, Any] | None

    @classmethod
    def read(cls, experiment: ExperimentConfig) -> Results:
        """All results of the experiment's methods and numbers of pairs.

        Raises:
            PowersteerError: There are none, or one is damaged.
        """
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for file in sorted(experiment.results_dir.glob("*.json")):
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                found[values["kind"]].append(values)
            except (ValueError, KeyError, TypeError):
                raise PowersteerError(f"{file} is no result of powersteer compare: remove it") from None
        wanted = {(method, pairs) for method in experiment.methods for pairs in experiment.pairs}
        runs = [run for run in found["run"] if (run["method"], run["pairs"]) in wanted]
        if not runs:
            raise PowersteerError(f"{experiment.results_dir} holds no results yet: run without --report first")
        return cls(runs, {row["method"]: row for row in found["tuning"]}, next(iter(found["prior"]), None))

    def methods(self, experiment: ExperimentConfig, pairs: int | str | None = None) -> list[str]:
        """The methods with at least one run, of that number of pairs or of any."""
        ran = {run["method"] for run in self.runs if pairs is None or run["pairs"] == pairs}
        return [method for method in experiment.methods if method in ran]

    def panels(self, experiment: ExperimentConfig) -> list[int | str]:
        """The numbers of pairs with at least one run."""
        return [pairs for pairs in experiment.pairs if any(run["pairs"] == pairs for run in self.runs)]

    def of(self, method: str, pairs: int | str) -> list[dict[str, Any]]:
        """Runs of one cell, one a seed."""
        return [run for run in self.runs if (run["method"], run["pairs"]) == (method, pairs)]

    def figure(self, method: str, pairs: int | str, key: str) -> Figure | None:
        """A test figure, ``metric.figure``, over the seeds there are."""
        values = self.by_seed(method, pairs, key)
        return Figure.of(list(values.values())) if values else None

    def difference(self, method: str, other: str, pairs: int | str, key: str) -> Figure | None:
        """How far a method lies above another, seed by seed, over the seeds that both have."""
        values = _less(self.by_seed(method, pairs, key), self.by_seed(other, pairs, key))
        return Figure.of(list(values.values())) if values else None

    def of_condition(self, methods: tuple[str, str], pairs: int | str, key: str) -> dict[int, float]:
        """What a method (the first) has that the same without its condition (the second) has not; by seed."""
        return _less(*(self.by_seed(method, pairs, key) for method in methods))

    def by_seed(self, method: str, pairs: int | str, key: str) -> dict[int, float]:
        """A test figure of every run of one cell."""
        metric, _, name = key.partition(".")
        rows = {run["seed"]: run["test"].get(metric, {}) for run in self.of(method, pairs)}
        return {seed: row[name] for seed, row in sorted(rows.items()) if name in row}

    @property
    def keys(self) -> list[str]:
        """Every test figure that is shown."""
        keys = {f"{metric}.{name}" for run in self.runs for metric, row in run["test"].items() for name in row}
        return sorted(keys - set(_HIDDEN), key=lambda key: ([*HEADINGS, key].index(key), key))


def write_report(experiment: ExperimentConfig, file: Path) -> Path:
    """Write ``file`` (Markdown) and, in ``<its folder>/results``, the plots it shows.

    Raises:
        PowersteerError: matplotlib is missing, there are no results, or the files cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PowersteerError("the plots need matplotlib: pip install 'powersteer[plots]'")
    results = Results.read(experiment)
    plots = file.parent / "results"
    try:
        plots.mkdir(parents=True, exist_ok=True)
        names = _draw(experiment, results, plots)
        file.write_text(_markdown(experiment, results, file, [plots / name for name in names]), encoding="utf-8")
    except OSError as error:
        raise PowersteerError(f"cannot write {file}: {error.strerror}") from None
    return file


def _markdown(experiment: ExperimentConfig, results: Results, file: Path, plots: list[Path]) -> str:
    seeds = sorted({run["seed"] for run in results.runs})
    some = results.runs[0]
    finished, wanted = len(results.runs), len(experiment.methods) * len(experiment.pairs) * len(experiment.seeds)
    tuning = experiment.tuning
    text = [f"# Results: {experiment.name}", ""]
    text += [experiment.description.strip(), ""] if experiment.description else []
    text += [
        f"Generated by `powersteer compare … --report` from {finished} of {wanted} runs. Mean ± standard error over "
        f"up to {len(seeds)} seeds, no error where there is one; {some['test_pairs']} test pairs, on which nothing was "
        "chosen. Every method trains by the same loop on the same pairs, noise and prompts; the validation "
        "split chooses its learning rate, where none is given, and each run's best step.",
        "",
        "Hardware and versions: "
        + "; ".join(sorted({run["hardware"] for run in results.runs}))
        + "; "
        + ", ".join(f"{name} {number}" for name, number in some["versions"].items())
        + ".",
        "",
    ]
    text += ["## What came out", "", experiment.findings.strip(), ""] if experiment.findings else []
    for pairs in results.panels(experiment):
        text += [f"## {pairs} pairs", "", *_table(["method", *(_heading(key) for key in results.keys)])]
        if results.prior is not None:
            text.append(_line(["prior", *(_cell(_prior(results.prior, key), key) for key in results.keys)]))
        for method in results.methods(experiment, pairs):
            text.append(_line([method, *(_cell(results.figure(method, pairs, key), key) for key in results.keys)]))
        text.append("")
    text += _differences(experiment, results)
    text += _of_condition(experiment, results)
    text += ["## What each took", ""]
    text += _table(["method", "trained parameters", "learning rate", "seconds a run", "updates", "memory, estimated"])
    for method in results.methods(experiment):
        runs = [run for run in results.runs if run["method"] == method]
        seconds, updates = (mean(run[key] for run in runs) for key in ("seconds", "updates"))
        size, memory = runs[0]["trained_parameters"], max(run["memory_estimated"] for run in runs)
        rate = f"{runs[0]['learning_rate']:g}"
        rate += " (at the edge of the sweep)" if _at_edge(results.tuning.get(method)) else ""
        cells = [f"{size / 1e6:.2f} M", rate, f"{seconds:.0f}", f"{updates:.0f}", f"{memory / 1e9:.2f} GB"]
        text.append(_line([method, *cells]))
    given = [method for method, keys in experiment.methods.items() if "learning_rate" in keys]
    rates = []
    if len(given) < len(experiment.methods):
        rates += [
            f"The sweep: {', '.join(f'{rate:g}' for rate in tuning.learning_rates)}; {tuning.pairs} pairs, "
            f"{tuning.max_train_steps} updates, seed {tuning.seed}; the lowest loss on the validation split.",
            "Where that lies at an end, the sweep goes on past it.",
        ]
    rates += [f"{method} takes the rate of {other}." for method, other in experiment.rates_of.items()]
    rates += [f"The rates of {', '.join(given)} were given."] if given else []
    text += ["", " ".join(rates), ""]
    grids = [experiment.grid(pairs) for pairs in experiment.pairs]
    for picture in [*plots, *(grid for grid in grids if grid.exists())]:
        text += [f"![{picture.stem}]({Path(os.path.relpath(picture, file.parent)).as_posix()})", ""]
    return "\n".join(text).rstrip() + "\n"


def _differences(experiment: ExperimentConfig, results: Results) -> list[str]:
    """How far the reference lies above each other method."""
    reference = experiment.reference
    if reference is None:
        return []
    text = [
        f"## How far {reference} lies above the others",
        "",
        f"Differences seed by seed, mean ± standard error; above zero {reference} is better, and per cent are "
        "percentage points. Bold: by more than two standard errors, either way.",
        "",
    ]
    keys = [key for key in SET_AGAINST if key in results.keys]
    for pairs in results.panels(experiment):
        text += _table([f"{pairs} pairs", *(_heading(key, arrow=False) for key in keys)])
        for method in (method for method in results.methods(experiment, pairs) if method != reference):
            cells = [_gap(results.difference(reference, method, pairs, key), key) for key in keys]
            text.append(_line([method, *cells]))
        text.append("")
    return text


def _of_condition(experiment: ExperimentConfig, results: Results) -> list[str]:
    """What each method gains above itself without its condition."""
    twins = {seeing: (seeing, blind) for blind in experiment.methods if (seeing := experiment.sighted(blind))}
    reference = next((method for method in twins if method == experiment.reference), None)
    keys = [key for key in QUALITY if key in results.keys]
    tables: list[str] = []
    for pairs in results.panels(experiment):
        rows = {m: [results.of_condition(both, pairs, key) for key in keys] for m, both in twins.items()}
        if reference is not None:
            for other in (other for other in twins if other != reference):
                both = zip(rows[reference], rows[other], strict=True)
                rows[f"{reference} above {other}"] = [_less(values, others) for values, others in both]
        rows = {name: row for name, row in rows.items() if any(row)}
        tables += _table([f"{pairs} pairs", *(_heading(key, arrow=False) for key in keys)]) if rows else []
        for name, row in rows.items():
            found = [Figure.of(list(values.values())) if values else None for values in row]
            tables.append(_line([name, *(_gap(one, key) for one, key in zip(found, keys, strict=True))]))
        tables += [""] if rows else []
    if not tables:
        return []
    return [
        "## What of it the condition brings",
        "",
        "Differences seed by seed to the same network, trained alike, whose conditions are empty. What that gains is "
        "no information from the condition: the frozen base is at fault on such pictures, and the network mends it.",
        "",
        *tables,
    ]


def _heading(key: str, arrow: bool = True) -> str:
    heading = HEADINGS.get(key, (key, 1.0, ""))[0]
    return heading if arrow else heading.removesuffix(" ↑")


def _labelled(key: str) -> str:
    """An axis' label."""
    unit = HEADINGS[key][2]
    return f"{_heading(key, arrow=False)}{unit and ','}{unit}"


def _cell(figure: Figure | None, key: str) -> str:
    return "" if figure is None else figure.shown(*HEADINGS.get(key, (key, 1.0, ""))[1:])


def _gap(figure: Figure | None, key: str) -> str:
    return "" if figure is None else figure.difference(*HEADINGS[key][1:])


def _prior(prior: dict[str, Any], key: str) -> Figure | None:
    metric, _, name = key.partition(".")
    row = prior["test"].get(metric, {})
    return Figure(row[name], None) if name in row else None


def _less(values: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    """Differences of what both have."""
    return {seed: value - others[seed] for seed, value in values.items() if seed in others}


def _draw(experiment: ExperimentConfig, results: Results, folder: Path) -> list[str]:
    """Quality of each method, against pairs and parameters, and curves over updates and seconds; the files' names."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot, ticker = (importlib.import_module(f"matplotlib.{name}") for name in ("pyplot", "ticker"))
    drawn: list[str] = []

    def save(figure: Any, kind: str) -> None:
        drawn.append(f"{experiment.name}-{kind}.png")
        figure.savefig(folder / drawn[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)

    panels, methods = results.panels(experiment), results.methods(experiment)
    colors = [pyplot.get_cmap("tab20")(index) for index in (*range(0, 20, 2), *range(1, 20, 2))]  # the dark ones first
    styles: dict[str, dict[str, Any]] = {
        method: {"color": color, "linestyle": "--" if experiment.methods[method].get("network") in BASELINES else "-"}
        for method, color in zip(methods, itertools.cycle(colors), strict=False)
    }

    def side_by_side(height: float, label: str) -> tuple[Any, list[tuple[Any, int | str]]]:
        """A panel for each number of pairs, with the same axis upwards."""
        size = (4 * len(panels), height)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for axis, pairs in zip(axes[0], panels, strict=True):
            axis.set(title=f"{pairs} pairs", xlabel=label)
        return figure, list(zip(axes[0], panels, strict=True))

    columns = [key for key in SET_AGAINST if key in results.keys]
    if columns:
        size = (3.6 * len(columns), (0.8 + 0.26 * len(methods)) * len(panels))
        figure, axes = pyplot.subplots(
            len(panels), len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for (row, pairs), (column, key) in itertools.product(enumerate(panels), enumerate(columns)):
            axis = axes[row][column]
            for at, method in enumerate(methods):
                seeds = [HEADINGS[key][1] * value for value in results.by_seed(method, pairs, key).values()]
                axis.plot(seeds, [at] * len(seeds), "|", color="gray")
                axis.plot([mean(seeds)] if seeds else [], [at] if seeds else [], "o", color=styles[method]["color"])
            axis.grid(alpha=0.3)
            axis.set(title=f"{pairs} pairs")
            if row + 1 == len(panels):
                axis.set_xlabel(_labelled(key))
        axes[0][0].set_yticks(range(len(methods)), methods)
        axes[0][0].set_ylim(len(methods) - 0.5, -0.5)
        save(figure, "methods")

    measured = next((key for key in QUALITY if key in results.keys), None)
    if measured is not None:
        factor, label = HEADINGS[measured][1], _labelled(measured)

        def points(axis: Any, method: str, cells: list[tuple[float, int | str]]) -> None:
            """Means with their standard errors at numbers of pairs, each with its place on the axis across."""
            found = [(x, figure) for x, pairs in cells if (figure := results.figure(method, pairs, measured))]
            height = [factor * figure.mean for _, figure in found]
            errors = [factor * (figure.error or 0.0) for _, figure in found]
            style = {"marker": "o", "capsize": 3, "label": method, **styles[method]}
            axis.errorbar([x for x, _ in found], height, yerr=errors, **style)

        if len(panels) > 1:
            figure, axis = pyplot.subplots(figsize=(5, 3.6))
            for method in methods:
                points(axis, method, list(enumerate(panels)))
            axis.set_xticks(range(len(panels)), [str(pairs) for pairs in panels])
            axis.set(xlabel="pairs", ylabel=label)
            axis.legend(**BESIDE)
            save(figure, "pairs")

        figure, axes = side_by_side(3.2, "trained parameters")
        for axis, pairs in axes:
            for method in results.methods(experiment, pairs):
                size = mean(run["trained_parameters"] for run in results.of(method, pairs))
                points(axis, method, [(size, pairs)])
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ticker.EngFormatter())
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes[0][0].set_ylabel(label)
        axes[-1][0].legend(**BESIDE)
        save(figure, "trained-parameters")

    for kind, across, label in (("curves", "step", "updates"), ("seconds", "seconds", "training seconds")):
        figure, axes = side_by_side(3.6, label)
        for axis, pairs in axes:
            for method in methods:
                curve = _mean_curve(results.of(method, pairs), across)
                axis.plot([x for x, _ in curve], [loss for _, loss in curve], label=method, **styles[method])
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=range(1, 10)))
            axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes[0][0].set_ylabel("validation loss")
        axes[-1][0].legend(**BESIDE)
        save(figure, kind)
    return drawn


def _mean_curve(runs: list[dict[str, Any]], across: str) -> list[tuple[float, float]]:
    """Means of ``across`` and of the validation loss, over the seeds, at each validation."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in (row for run in runs for row in run["curve"]):
        rows[row["step"]].append(row)
    return [(mean(row[across] for row in at), mean(row["steered"] for row in at)) for _, at in sorted(rows.items())]


def _at_edge(tuning: dict[str, Any] | None) -> bool:
    """Whether a better learning rate may lie outside what was tried."""
    rates = sorted(tuning["learning_rates"]) if tuning else []
    return len(rates) > 1 and tuning is not None and tuning["chosen"] in (rates[0], rates[-1])


def _table(headings: list[str]) -> list[str]:
    return [_line(headings), _line(["---"] * len(headings))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
