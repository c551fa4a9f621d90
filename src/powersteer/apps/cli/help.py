"""How help reads: plain text in which no name is cut, what each value is, and commands by what people do first."""

from __future__ import annotations

from inspect import unwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.core import TyperCommand, TyperGroup

from powersteer.apps.cli.options import default_of, described
from powersteer.training.config import TrainConfig

PANELS = {
    "Start here": ("demo", "generate", "studio"),
    "Train your own": ("prepare", "data", "train", "evaluate", "card", "push", "convert"),
    "Research": ("compare", "bench", "pretrain"),
}
"""Commands in the order in which people come to them; others follow under a heading of their own."""

_METAVARS = {Path: "PATH", int: "N", float: "X", str: "TEXT"}


class Commands(TyperGroup):
    """A group whose list of commands has whole sentences, and whose commands name the kind of each value."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.commands.values():
            _name_values(command)

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the panels."""
        placed = [name for names in PANELS.values() for name in names if ctx.parent is None and name in self.commands]
        return list(dict.fromkeys([*placed, *self.commands]))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Panel by panel; sentences wrap where typer would cut them."""
        rows = {name: self.commands[name].get_short_help_str(limit=1000) for name in self.list_commands(ctx)}
        for panel, names in PANELS.items():
            _section(
                formatter, panel, [(name, rows.pop(name)) for name in names if name in rows and ctx.parent is None]
            )
        _section(formatter, "Commands", list(rows.items()))


class TrainCommand(TyperCommand):
    """`powersteer train`, whose help lists the keys of its configuration."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Options, then keys."""
        super().format_options(ctx, formatter)
        rows: list[tuple[str, str]] = []
        for name, info in TrainConfig.model_fields.items():
            default = "required" if info.is_required() else f"default: {default_of(TrainConfig, name)}"
            rows.append((name, described(TrainConfig, name) + f"  [{default}]".replace("  [default: ]", "")))
        _section(formatter, "Keys", rows)


def _section(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        with formatter.section(heading):
            formatter.write_dl(rows)


def _name_values(command: Any) -> None:
    """PATH, N, X or TEXT for an option's value, an argument's own name in capitals."""
    if command.callback is None or isinstance(command, TyperGroup):
        return
    hints = get_type_hints(unwrap(command.callback))
    for param in command.params:
        if getattr(param, "is_flag", False) or param.name not in hints:
            continue
        if param.param_type_name == "argument":
            param.metavar = param.metavar or param.name.upper()
            param.display_type_rich = _untold  # the name is enough
            continue
        kind: Any = hints[param.name]
        while get_args(kind):  # of `list[int] | None`, int
            kind = get_args(kind)[0]
        param.metavar = param.metavar or _METAVARS.get(kind)


def _untold(ctx: Any) -> str:
    return ""
