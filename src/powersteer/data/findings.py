"""What was found in data: one line of it each, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""The worst first."""


@dataclass(frozen=True)
class Finding:
    """One kind of thing, however often it was found."""

    severity: Severity
    """``error``: training stops at it. ``warning``: it suffers from it. ``note``: it is so, and may be meant so."""
    name: str
    """For programs: ``blank_conditions``."""
    count: int
    text: str
    """What is so, with the count: ``3 conditions are blank``."""
    example: str = ""
    """One of them."""
    remedy: str = ""
    """What to do."""

    @property
    def line(self) -> str:
        """All of it, for people."""
        example = f", such as {self.example}" if self.example else ""
        return f"{self.text}{example}{f': {self.remedy}' if self.remedy else ''}"


def finding(severity: Severity, name: str, text: str, found: Sequence[str], remedy: str = "") -> list[Finding]:
    """One finding, or none.

    Args:
        severity: How bad it is.
        name: For programs.
        text: The first ``{}`` in it is the count.
        found: All that it was found in; the first is the example.
        remedy: What to do.
    """
    text = text.replace("{}", str(len(found)), 1)
    return [Finding(severity, name, len(found), text, found[0], remedy)] if found else []


@dataclass(frozen=True)
class DataReport:
    """What `powersteer.data.check.check_pairs` found."""

    facts: dict[str, Any]
    """Plain values: counts, sizes, aspect ratios, conditions, captions, look-alikes."""
    errors: list[str]
    """What training would stop at, each by itself."""
    warnings: list[str]
    """What it would suffer from: the lines of such findings."""
    findings: list[Finding] = field(default_factory=list[Finding])
    """Errors by kind, warnings, and notes."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
