"""The commands: parse, call, print. No logic lives here."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from PIL import Image

from powersteer.apps.cli import bench, hub, pairs, pictures, runs, studio
from powersteer.apps.cli.help import Commands, TrainCommand
from powersteer.apps.cli.output import err, tell
from powersteer.core.errors import PowersteerError, PowersteerWarning

app = typer.Typer(
    cls=Commands,
    help="Steer a frozen text-to-image diffusion model with a picture of yours (Bayesian Power Steering).",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench.app, name="bench")
app.add_typer(pairs.data, name="data")
for command in (
    *(studio.demo, studio.studio, pictures.generate, pictures.evaluate, pairs.prepare),
    *(runs.compare, runs.pretrain, runs.convert, hub.card, hub.push),
):
    app.command()(command)
app.command(cls=TrainCommand)(runs.train)


def main() -> None:
    """Run a command; what the user can mend is one line on stderr and exit status 2."""
    _quiet()
    try:
        app()
    except PowersteerError as error:
        tell("error", "red", str(error), err)
        sys.exit(2)


def _quiet() -> None:
    """Progress bars and notices of the libraries below say nothing that a user can act on; our own warnings do."""
    import os

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for category in (FutureWarning, UserWarning, Image.DecompressionBombWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("default", category=PowersteerWarning)
    plain = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, PowersteerWarning):
            tell("warning", "yellow", str(message), err)
        else:
            plain(message, category, *place)

    warnings.showwarning = shown
