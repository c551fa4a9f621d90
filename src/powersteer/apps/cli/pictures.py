"""`powersteer generate` and `powersteer evaluate`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from powersteer.apps.cli.options import Fields, Given, refuse_idle, with_fields
from powersteer.apps.cli.output import err, out, show, tell, write_json
from powersteer.core.errors import PowersteerError
from powersteer.denoising.settings import OPTIONS, GenerateSettings, PictureJob
from powersteer.evaluation.settings import EvaluateSettings, MeasureSettings


@with_fields
def generate(
    ctx: typer.Context,
    job: Annotated[Given[PictureJob], Fields(optional=("prompt", "condition"))],
    settings: Annotated[Given[GenerateSettings], Fields(OPTIONS, leave_out=("prepared",))],
    num_images: Annotated[int, typer.Option(min=1, help="Number of pictures, each with its own seed.")] = 4,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Make many: a JSONL file with prompt, condition, negative_prompt and seed. Resumes."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Make many: a folder of pairs, one picture for each caption and condition. Resumes."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of pictures to make at once.")] = 4,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("generated"),
) -> None:
    """Make pictures that follow a drawing, or several conditions at once."""
    own = ("condition", "prompt", "num_images")
    if pairs is not None:
        refuse_idle(ctx, "with --pairs, whose pairs have their own", *own, "manifest")
    elif manifest is not None:
        refuse_idle(ctx, "with --manifest, whose lines have their own", *own, "negative_prompt", "seed")
    if settings["init_image"] is None:
        refuse_idle(ctx, "without --init-image", "strength")
    wanted = settings.build(prepared=pairs is not None)

    from powersteer.denoising.sampling.generate import generate as run
    from powersteer.denoising.sampling.jobs import jobs_of, jobs_of_pairs, read_manifest

    if pairs is not None:
        jobs = jobs_of_pairs(pairs, job["negative_prompt"], job["seed"])
    elif manifest is not None:
        jobs = read_manifest(manifest)
    else:
        jobs = jobs_of(job["prompt"] or "", job["condition"] or (), job["negative_prompt"], job["seed"], num_images)
    for path in run(wanted, jobs, out_dir, batch_size=batch_size, resume=pairs is not None or manifest is not None):
        show(str(path))


@with_fields
def evaluate(
    ctx: typer.Context,
    settings: Annotated[Given[EvaluateSettings], Fields(OPTIONS, arguments=("data",), optional=("data",))],
    real: Annotated[
        Path | None,
        typer.Option(help="Instead of DATA: a folder of pictures, or of pairs, which are cropped as in training."),
    ] = None,
    generated: Annotated[Path | None, typer.Option(help="Folder of pictures to compare with --real.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures, and how they were measured, to this file.")
    ] = None,
) -> None:
    """Measure an adapter on held-out pairs, or compare one folder of pictures with another."""
    data = settings["data"]
    if data is not None and real is None and generated is None:
        adapter = settings["adapter"]
        wanted = settings.build(adapter=None if adapter == "none" else adapter)

        from powersteer.evaluation.evaluate import evaluate as run

        result = run(wanted, err)
    elif data is None and real is not None and generated is not None:
        of_pairs = [name for name in EvaluateSettings.model_fields if name not in MeasureSettings.model_fields]
        refuse_idle(ctx, "with --real and --generated", *of_pairs)
        measures = settings.build_as(MeasureSettings)

        from powersteer.evaluation.folders import evaluate_folders

        result = evaluate_folders(real, generated, measures)
    else:
        raise PowersteerError("give DATA, the folder of pairs; or --real and --generated, two folders of pictures")
    table = Table("", *result.columns)
    for figure in result.figures:
        table.add_row(figure.heading, *(str(figure.values.get(column, "")) for column in result.columns))
    out.print(table)
    for warning in result.warnings:
        tell("warning", "yellow", warning)
    write_json(json_file, result.as_json())
