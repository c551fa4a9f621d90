"""What a person typed, and what of it a command cannot obey."""

from __future__ import annotations

import typer

from powersteer.core.errors import PowersteerError


def refuse_idle(ctx: typer.Context, reason: str, *names: str) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        ctx: Of the command.
        reason: Why they would: ``with --manifest``.
        *names: Parameters of the command.

    Raises:
        PowersteerError: One of them was given.
    """
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            parameter = next(one for one in ctx.command.params if one.name == name)
            raise PowersteerError(f"{parameter.opts[0]} has no effect {reason}: leave it out")
