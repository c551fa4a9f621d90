"""`powersteer train`, `compare`, `pretrain` and `convert`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from powersteer.apps.cli.options import refuse_idle
from powersteer.apps.cli.output import out, show, show_json

if TYPE_CHECKING:
    from powersteer.training.config import TrainConfig

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Override keys of the file. A dot reaches into sections."),
]


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.", show_default=False)],
    overrides: _Overrides = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration, shapes and memory needed; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the dry run, as JSON.")] = False,
) -> None:
    """Train an adapter on pairs. The same command resumes an interrupted run.

    On several GPUs or machines: accelerate launch --config_file configs/accelerate/one-machine.yaml
    -m powersteer.train CONFIG [KEY=VALUE]...
    """
    from powersteer.core.config import load_config
    from powersteer.training.config import TrainConfig

    settings = load_config(config, TrainConfig, overrides or [])
    if dry:
        _dry_run(settings, as_json)
        return
    from powersteer.training.run import train as run

    result = run(settings)
    if not result.main_process:
        return
    if as_json:
        show_json(result.as_json())
    elif result.interrupted:
        out.print(f"stopped at step {result.step}; the same command goes on from there")
    else:
        show(f"{result.adapter_dir}: best weights are of step {result.best_step} of {result.step}")
    if result.interrupted:
        raise typer.Exit(130)


def _dry_run(settings: TrainConfig, as_json: bool) -> None:
    import os

    from powersteer.training.dry_run import dry_run

    plan = dry_run(settings, int(os.environ.get("WORLD_SIZE", "1")))
    if as_json:
        show_json(plan.as_json())
        return
    show("\n".join(f"{name}: {value}" for name, value in plan.config.items()))
    table = Table("dry run", "")
    for name, fact in plan.facts.items():
        table.add_row(name.replace("_", " "), _shown(fact))
    out.print(table)
    memory = Table("memory of a process, estimated", "GB")
    for name, size in {**plan.memory.rows, "total": plan.memory.total, "free now": plan.free_memory}.items():
        memory.add_row(name, f"{size / 1e9:.2f}")
    out.print(memory)


def _shown(fact: object) -> str:
    """A size such as ``3 × 64 × 64``, a whole number with commas, or anything else as it is."""
    if isinstance(fact, list):
        return " × ".join(map(str, cast(list[object], fact)))
    return f"{fact:,}" if isinstance(fact, int) else str(fact)


def compare(
    ctx: typer.Context,
    experiment: Annotated[Path, typer.Argument(help="YAML file; see configs/experiments/.", show_default=False)],
    overrides: _Overrides = None,
    report: Annotated[bool, typer.Option("--report", help="Only write tables and plots of finished runs.")] = False,
    out_file: Annotated[Path, typer.Option("--out", help="Report to write; plots go beside it.")] = Path(
        "docs/results.md"
    ),
) -> None:
    """Train methods × numbers of pairs × seeds and measure them alike. The same command resumes."""
    from powersteer.apps.experiments.compare import ExperimentConfig
    from powersteer.apps.experiments.compare import compare as run
    from powersteer.apps.experiments.report import write_report
    from powersteer.core.config import load_config

    if not report:
        refuse_idle(ctx, "without --report", "out_file")
    settings = load_config(experiment, ExperimentConfig, overrides or [])
    if not report and run(settings):
        out.print("stopped; the same command goes on from there")
        raise typer.Exit(130)
    if report:
        show(str(write_report(settings, out_file)))
    else:
        show(f"{settings.results_dir}: done; --report writes tables and plots")


def pretrain(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/powersteer-tiny.yaml.", show_default=False)],
    overrides: _Overrides = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="Folder with a copy of the progress: read if output_dir has none, then kept up to date."),
    ] = None,
) -> None:
    """Build the embedded base from icon sets, stage by stage. The same command resumes."""
    from powersteer.apps.pretrain.config import PretrainConfig
    from powersteer.apps.pretrain.stages import pretrain as run
    from powersteer.core.config import load_config

    show(run(load_config(config, PretrainConfig, overrides or []), snapshot))


def convert(
    source: Annotated[
        Path, typer.Argument(help="Checkpoint (.ckpt, .pt or .safetensors), read safely.", show_default=False)
    ],
    out_dir: Annotated[Path, typer.Argument(help="New folder for the adapter.", show_default=False)],
    conditioning_channels: Annotated[
        int, typer.Option(min=1, help="Channels of the condition: 1 (sketch), 3 (RGB), 4 (style).")
    ] = 1,
    unshuffle: Annotated[
        int,
        typer.Option(min=1, help="Condition pixels per latent pixel, along each side. 1 for feature maps."),
    ] = 8,
    attention_head_dim: Annotated[int, typer.Option(min=1, help="Width of an attention head (SDXL).")] = 64,
    norm_num_groups: Annotated[int, typer.Option(min=1, help="Number of groups of each GroupNorm.")] = 32,
    kind: Annotated[str, typer.Option(help="Kind of condition, recorded in the adapter's config.")] = "sketch",
) -> None:
    """Convert a checkpoint in the paper authors' format to an adapter."""
    from powersteer.adapters.bps.convert import convert as run

    written = run(
        source,
        out_dir,
        conditioning_channels=conditioning_channels,
        unshuffle=unshuffle,
        attention_head_dim=attention_head_dim,
        norm_num_groups=norm_num_groups,
        kind=kind,
    )
    show(str(written))
