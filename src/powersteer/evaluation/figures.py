"""Figures with all that is needed to get them again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from powersteer.core.hardware import machine

PRIOR, STEERED, SHUFFLED, REAL, GENERATED = COLUMNS = ("prior", "steered", "shuffled", "real", "generated")
"""What is measured, in the order of a table. ``shuffled``: steered by another pair's condition, the floor; ``real``:
the data's own picture, the ceiling; ``generated``: pictures of unknown origin."""
PACKAGES = ("powersteer", "torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Value:
    """A figure, and its standard error where it is a mean over pictures (a kernel distance: spread over subsets)."""

    value: float
    error: float | None = None

    @classmethod
    def mean(cls, values: torch.Tensor) -> Value:
        """The mean of one number for each picture (N,), and its standard error; a picture with NaN is not counted."""
        values = values.double()
        values = values[~values.isnan()]
        if not len(values):
            return cls(float("nan"))
        return cls(values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.error is None else f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    better: Literal["higher", "lower", ""]
    values: Mapping[str, Value]
    """By column; see `COLUMNS`."""
    protocol: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How it was measured."""

    @property
    def heading(self) -> str:
        """The name, and the direction that is better."""
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[self.better]
        return self.name + arrow

    def under(self, conditions: Mapping[str, Any]) -> Figure:
        """The same, with more said of how it was measured."""
        return replace(self, protocol={**self.protocol, **conditions})


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured."""

    figures: list[Figure]
    settings: Mapping[str, Any]
    """As they were given."""
    provenance: Mapping[str, Any]
    """What was measured, with hashes; versions; hardware."""
    warnings: list[str]

    @property
    def columns(self) -> list[str]:
        """Those that some figure has."""
        return [name for name in COLUMNS if any(name in figure.values for figure in self.figures)]

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes null."""
        return {
            "figures": {
                figure.name: {
                    "better": figure.better or None,
                    "values": {
                        name: {"value": _finite(value.value), "error": _finite(value.error)}
                        for name, value in figure.values.items()
                    },
                    "protocol": dict(figure.protocol),
                }
                for figure in self.figures
            },
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
            "warnings": self.warnings,
        }


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware."""
    versions = {name: version(name) for name in PACKAGES}
    return {"versions": {"python": platform.python_version(), **versions}, "hardware": machine(device)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
