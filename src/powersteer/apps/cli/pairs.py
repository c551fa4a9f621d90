"""`powersteer prepare` and `powersteer data`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from powersteer.apps.cli.help import Commands
from powersteer.apps.cli.output import err, out, show, show_json, tell
from powersteer.core.errors import PowersteerError

if TYPE_CHECKING:
    from powersteer.data.findings import Finding

STYLES = {"error": "red", "warning": "yellow", "note": ""}
data = typer.Typer(cls=Commands, help="Look at training pairs.", no_args_is_help=True, rich_markup_mode=None)


def prepare(
    task: Annotated[
        str | None, typer.Argument(help="sketch, segmentation, layout, style, feature, depth, normal or pose.")
    ] = None,
    source: Annotated[
        str | None, typer.Argument(help="A folder of pictures, a COCO 2017 or ADE20K root, or openmoji.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Argument(help="A new folder for the pairs.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of the extractor.")
    ] = None,
    extractor: Annotated[str | None, typer.Option(help="What makes the conditions; --list has all.")] = None,
    captions: Annotated[str | None, typer.Option(help="Of several: all (the default), first or random.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels of the shorter side; else as they are.")] = None,
    background: Annotated[str | None, typer.Option(help="A colour behind what is transparent; else white.")] = None,
    shards: Annotated[bool, typer.Option("--shards", help="Write WebDataset shards.")] = False,
    num_shards: Annotated[int | None, typer.Option(help="Parts of the work, one a machine.")] = None,
    shard_index: Annotated[int | None, typer.Option(help="The part to do here, from 0.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Print all extractors, and what each needs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the list, as JSON.")] = False,
) -> None:
    """Make pairs to train on of pictures. The same command goes on with a run that was interrupted."""
    given: dict[str, Any] = {"task": task, "source": source, "out_dir": out_dir, "extractor": extractor}
    given |= {"captions": captions, "resolution": resolution, "background": background, "shards": shards or None}
    given |= {"num_shards": num_shards, "shard_index": shard_index, "workers": workers}
    given = {name: value for name, value in given.items() if value is not None}
    if show_list:
        if given or settings:
            raise PowersteerError("--list prints all extractors, and does nothing else: leave the rest out")
        _list_extractors(as_json)
        return
    if task is None or source is None or out_dir is None:
        raise PowersteerError("give TASK, SOURCE and OUT_DIR: such as prepare sketch my/pictures my/pairs")
    from powersteer.core.config import build_config
    from powersteer.data.prepare.prepare import PrepareConfig
    from powersteer.data.prepare.prepare import prepare as run

    overrides = [f"settings.{setting}" for setting in settings or []]
    result = run(build_config(given, PrepareConfig, overrides, where="prepare"))
    if as_json:
        show_json(result.as_json())
        return
    for split, count in result.pairs.items():
        show(f"{out_dir / split}: {count} pairs")
    if result.rejected:
        show(f"{result.rejected} refused: see rejected.csv")
    for one in result.findings:
        tell(one.severity, STYLES[one.severity], one.line, err)
    if not result.complete:
        show("other parts are not done yet: the last to be done completes the data set")


def _list_extractors(as_json: bool) -> None:
    from importlib import import_module

    from powersteer.conditions.extractors.extractor import EXTRACTORS

    import_module("powersteer.conditions.extractors.catalogue")  # registers them
    if as_json:
        known = [{"task": one.task, "extractor": one.name, "needs": one.needs} for one in EXTRACTORS.known.values()]
        show_json(known)
        return
    table = Table("task", "extractor", "needs")
    for one in EXTRACTORS.known.values():
        table.add_row(one.task, one.name, one.needs)
    out.print(table)


@data.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(help="The pairs, in any layout that `train` reads.", show_default=False)],
    validation: Annotated[Path | None, typer.Option(help="Held-out pairs, compared for leakage.")] = None,
    conditioning_channels: Annotated[
        int | None, typer.Option(min=1, help="1 (grey), 3 (RGB), 4 (RGBA), …; else what dataset.json says, else 1.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="sketch, segmentation, layout, …; else what dataset.json says, else sketch.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Of pictures, where columns have names.")] = "image",
    conditioning_image_column: Annotated[str, typer.Option(help="Of conditions.")] = "conditioning_image",
    caption_column: Annotated[str, typer.Option(help="Of captions.")] = "text",
    default_prompt: Annotated[str | None, typer.Option(help="Caption of pairs that have none.")] = None,
    base: Annotated[
        str, typer.Option(help="What is to be steered: its tokenizer says which captions are cut.")
    ] = "powersteer-tiny",
    resolution: Annotated[
        int | None, typer.Option(min=8, max=8192, help="Pixels of the side to train at; the base's own by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Read every pair and say what is there; exit status 1 where training would fail."""
    from powersteer.data.check import check_pairs
    from powersteer.data.layouts import Columns

    report = check_pairs(
        folder,
        validation=validation,
        conditioning_channels=conditioning_channels,
        kind=kind,
        columns=Columns(image_column, conditioning_image_column, caption_column),
        default_prompt=default_prompt,
        base=base,
        resolution=resolution,
    )
    if as_json:
        show_json(report.as_json())
    else:
        table = Table(str(folder), "")
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
