"""`powersteer studio` and `powersteer demo`: parse, call, print."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from powersteer.apps.cli.options import described
from powersteer.apps.cli.output import out, show, show_json
from powersteer.backbones.options import EMBEDDED_BASE
from powersteer.denoising.settings import GenerateSettings


def studio(
    base: Annotated[str, typer.Option(help=described(GenerateSettings, "base"))] = EMBEDDED_BASE,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter to choose from: 'sketch', or a folder that `train` wrote. Repeatable."),
    ] = None,
    adapters_dir: Annotated[
        Path, typer.Option(help="Folder of adapters to choose from; new ones are trained into it.")
    ] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on. Other machines need --auth.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. The first free one from 7860 by default.")
    ] = None,
    auth: Annotated[
        str | None, typer.Option(help="user:password to ask visitors for.", envvar="POWERSTEER_AUTH", show_envvar=True)
    ] = None,
) -> None:
    """Draw, generate, compare with the base alone, and train, in the browser."""
    import threading

    from powersteer.apps.studio.serve import end_on_signals, served

    end_on_signals()
    with (
        served(base, adapter or [], adapters_dir, host=host, port=port, auth=auth) as address,
        suppress(KeyboardInterrupt),
    ):
        show(f"the studio is at {address} (Ctrl-C ends it)")
        threading.Event().wait()


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for everything it writes.")] = Path("demo"),
    pairs: Annotated[
        int | None, typer.Option(min=8, help="Train on this many pairs, with the preset few-shot.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Maximum number of optimizer updates.")] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Number of held-out drawings to generate for.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the training, and of the first picture.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Train an adapter on OpenMoji's drawings, then test it on held-out ones."""
    from powersteer.apps.demo import run_demo

    result = run_demo(out_dir, pairs, steps, pictures, seed)
    if result.interrupted:
        out.print("stopped; the same command goes on from there")
        raise typer.Exit(130)
    if as_json:
        show_json(result.metrics)
        return
    metrics = result.metrics
    loss, lines = metrics["denoising_loss"], metrics["line_f1"]
    table = Table("held out", "prior", "steered", "shuffled", "artist")
    table.add_row("denoising loss ↓", *(f"{loss[kind]:.4f}" for kind in ("prior", "steered", "shuffled")), "")
    table.add_row("line fidelity F1 ↑", *(f"{lines[k]:.3f}" for k in ("prior", "steered", "shuffled", "artist")))
    out.print(table)
    out.print(
        f"loss {metrics['loss_reduction']:.0%} below the prior's; "
        f"{lines['share_of_way']:.0%} of the way to the artist's lines; {metrics['minutes']:.1f} minutes"
    )
    for name in ("report.html", "grid.png", "metrics.json"):
        show(str(out_dir / name))
