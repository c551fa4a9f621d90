"""What an experiment's results hold: test figures of each method, number of pairs and seed."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from powersteer.apps.experiments.compare import ExperimentConfig
from powersteer.core.errors import PowersteerError

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
        """The mean and standard error of values, one for each seed."""
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
        values = less(self.by_seed(method, pairs, key), self.by_seed(other, pairs, key))
        return Figure.of(list(values.values())) if values else None

    def of_condition(self, methods: tuple[str, str], pairs: int | str, key: str) -> dict[int, float]:
        """What a method (the first) has that the same without its condition (the second) has not; by seed."""
        return less(*(self.by_seed(method, pairs, key) for method in methods))

    def by_seed(self, method: str, pairs: int | str, key: str) -> dict[int, float]:
        """A test figure of every run of one cell."""
        values = {run["seed"]: _value(run, key) for run in self.of(method, pairs)}
        return {seed: value for seed, value in sorted(values.items()) if value is not None}

    def of_prior(self, key: str) -> Figure | None:
        """A test figure of the frozen base."""
        value = None if self.prior is None else _value(self.prior, key)
        return None if value is None else Figure(value, None)

    @property
    def keys(self) -> list[str]:
        """Every test figure that is shown."""
        keys = {f"{metric}.{name}" for run in self.runs for metric, row in run["test"].items() for name in row}
        return sorted(keys - set(_HIDDEN), key=lambda key: ([*HEADINGS, key].index(key), key))


def shown_as(key: str) -> tuple[str, float, str]:
    """Heading, factor and unit of a figure."""
    return HEADINGS.get(key, (key, 1.0, ""))


def axis_label(key: str) -> str:
    """A figure's heading and unit, without the arrow."""
    heading, _, unit = shown_as(key)
    return f"{heading.removesuffix(' ↑')}{unit and ','}{unit}"


def less(values: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    """Differences of what both have."""
    return {seed: value - others[seed] for seed, value in values.items() if seed in others}


def _value(row: dict[str, Any], key: str) -> float | None:
    metric, _, name = key.partition(".")
    return row["test"].get(metric, {}).get(name)
