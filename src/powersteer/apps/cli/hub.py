"""`powersteer card` and `powersteer push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from powersteer.apps.cli.output import show


def card(
    folder: Annotated[Path, typer.Argument(help="Folder that `train` wrote.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="Name on the Hub that the card tells readers to load: user/name.")
    ] = None,
) -> None:
    """Write an adapter's model card again, as `train` does at its end."""
    from powersteer.core.card import CARD, write_card

    written = write_card(folder, name)
    note = "" if written else ": yours, and left as it is"
    show(f"{folder / CARD}{note}")


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `train` wrote.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the Hub (user/name); created if missing.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    commit_message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload adapter",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Upload an adapter with its card and pictures to the Hugging Face Hub."""
    from powersteer.adapters.hub import push as run

    address = run(folder, repo_id, private=private or None, commit_message=commit_message, create_pr=create_pr)
    show(address)
