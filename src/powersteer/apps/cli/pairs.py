"""`powersteer prepare` and `powersteer data`: parse, call, print."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field
from rich.table import Column, Table

from powersteer.apps.cli.help import Commands
from powersteer.apps.cli.options import Fields, Given, described, with_fields
from powersteer.apps.cli.output import err, out, show, show_json, tell
from powersteer.backbones.options import EMBEDDED_BASE
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.data.prepare.config import PrepareConfig
from powersteer.training.config import TrainConfig

if TYPE_CHECKING:
    from powersteer.data.findings import Finding

_PLACES = ("task", "source", "out_dir")
STYLES = {"error": "red", "warning": "yellow", "note": ""}
data = typer.Typer(cls=Commands, help="Check training pairs.", no_args_is_help=True, rich_markup_mode=None)


@with_fields
def prepare(
    config: Annotated[Given[PrepareConfig], Fields(arguments=_PLACES, optional=_PLACES, leave_out=("settings",))],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help=described(PrepareConfig, "settings"))
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Print all extractors with what each needs, and do nothing else.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the list, as JSON.")] = False,
) -> None:
    """Make training pairs from pictures. The same command resumes an interrupted run."""
    if show_list:
        if config.values or settings:
            raise PowersteerError("--list prints all extractors, and does nothing else: leave the rest out")
        _list_extractors(as_json)
        return
    if not config.values.keys() >= {*_PLACES}:
        raise PowersteerError("give TASK, SOURCE and OUT_DIR: such as prepare sketch my/pictures my/pairs")
    wanted = config.build([f"settings.{setting}" for setting in settings or []])

    from powersteer.data.prepare.prepare import prepare as run

    result = run(wanted)
    if as_json:
        show_json(result.as_json())
        return
    for split, count in result.pairs.items():
        show(f"{wanted.out_dir / split}: {count} pairs")
    if result.rejected:
        show(f"{result.rejected} refused: see rejected.csv")
    for one in result.findings:
        tell(one.severity, STYLES[one.severity], one.line, err)
    if not result.complete:
        show("other parts are not done yet: the last to be done completes the data set")


def _list_extractors(as_json: bool) -> None:
    from importlib import import_module

    from powersteer.conditions.extractor import EXTRACTORS

    import_module("powersteer.conditions.extractors.catalogue")  # registers them
    if as_json:
        known = [{"task": one.task, "extractor": one.name, "needs": one.needs} for one in EXTRACTORS.known.values()]
        show_json(known)
        return
    table = Table("task", "extractor", "needs")
    for one in EXTRACTORS.known.values():
        table.add_row(one.task, one.name, one.needs)
    out.print(table)


def _of_training(name: str) -> Any:
    """A field of `TrainConfig`: the same range, default and description."""
    return copy(TrainConfig.model_fields[name])


class PairsToCheck(StrictConfig):
    """What `data check` reads."""

    folder: Path
    """Folder of pairs, in any layout that `train` reads."""
    validation: Path | None = None
    """Held-out pairs, to compare for leakage."""
    conditioning_channels: int | None = _of_training("conditioning_channels")
    kind: str | None = _of_training("conditioning_kind")
    image_column: str = _of_training("image_column")
    conditioning_image_column: str = _of_training("conditioning_image_column")
    caption_column: str = _of_training("caption_column")
    default_prompt: str | None = _of_training("default_prompt")
    base: str = EMBEDDED_BASE
    """Base to train for; its tokenizer says which captions are cut."""
    resolution: int | None = Field(default=None, ge=8, le=8192)
    """Side in pixels to train at. The base's own by default."""


@data.command("check")
@with_fields
def data_check(
    pairs: Annotated[Given[PairsToCheck], Fields(arguments=("folder",))],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Read every pair and report problems. Exit status 1 if training would fail."""
    wanted = pairs.build()

    from powersteer.data.check import check_pairs
    from powersteer.data.layouts import Columns

    report = check_pairs(
        wanted.folder,
        validation=wanted.validation,
        conditioning_channels=wanted.conditioning_channels,
        kind=wanted.kind,
        columns=Columns(wanted.image_column, wanted.conditioning_image_column, wanted.caption_column),
        default_prompt=wanted.default_prompt,
        base=wanted.base,
        resolution=wanted.resolution,
    )
    if as_json:
        show_json(report.as_json())
    else:
        table = Table(str(wanted.folder), "")
        for name, fact in report.facts.items():
            table.add_row(name.replace("_", " "), _shown(fact))
        out.print(table)
        if report.findings:
            out.print(_findings(report.findings))
        if len(report.errors) > sum(one.severity == "error" for one in report.findings):
            show(f"--json lists all {len(report.errors)} errors")
    if report.errors:
        raise typer.Exit(1)


def _findings(findings: list[Finding]) -> Table:
    """One a row: how bad, what, one example, what to do."""
    table = Table(*(Column(name, overflow="fold") for name in ("", "found", "such as", "what to do")), show_lines=True)
    for one in findings:
        table.add_row(one.severity, one.text, one.example, one.remedy, style=STYLES[one.severity])
    return table


def _shown(fact: object) -> str:
    """A figure, a spread of figures, or several by name."""
    if not isinstance(fact, dict):
        return f"{fact:.3g}" if isinstance(fact, float) else str(fact)
    if "median" in fact:
        return f"{fact['min']:.4g} to {fact['max']:.4g}, median {fact['median']:.4g}"
    return "\n".join(f"{name}: {_shown(part)}" for name, part in fact.items())
