"""`powersteer bench`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from powersteer.apps.cli.help import Commands
from powersteer.apps.cli.lines import Lines, shown, shown_time
from powersteer.apps.cli.options import Given, with_fields
from powersteer.apps.cli.output import err, out, show, show_json, write_json
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError

if TYPE_CHECKING:
    import torch

    from powersteer.apps.bench.shapes import Shape

app = typer.Typer(
    cls=Commands, help="Measure what the documentation states.", no_args_is_help=True, rich_markup_mode=None
)


class Subject(StrictConfig):
    """What is measured where, in the benches of networks."""

    shape: str = "sd15"
    """Shape of the networks: tiny (64 px), sd15 (512 px) or sdxl (1024 px)."""
    device: str = "cpu"
    """Device to measure on, such as cpu or cuda."""
    dtype: str = "float32"
    """Precision of the frozen weights: float32, bfloat16 or float16."""
    only: tuple[str, ...] = ()
    """Row to measure beside the first, such as ControlNet or bps-paper. Repeatable. All by default."""


_Rounds = Annotated[int, typer.Option(min=1, help="Number of measured turns.")]
_Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the U-Net and the adapters with torch.compile first.")
]
_JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]
_JsonRows = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too, after every row.")]


@app.command("steering")
@with_fields
def bench_steering(
    subject: Given[Subject],
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of pictures at once; guidance doubles the U-Net's batch.")
    ] = 1,
    compiled: _Compile = False,
    rounds: _Rounds = 5,
    json_file: _JsonRows = None,
) -> None:
    """Time a steered denoising step against a bare U-Net's, on random weights."""
    from powersteer.apps.bench.steering import WAYS, SteeringBench
    from powersteer.apps.bench.steering import bench_steering as run
    from powersteer.apps.bench.turns import chosen

    settings = _settings(subject.build(), rounds)
    names = chosen(list(WAYS), settings["only"])
    headings = ["ratio", "time", "parameters", "extra memory", "plan", *["waits"] * _is_cuda(settings["device"])]
    lines = Lines(f"a step, guidance batch of {2 * batch_size}", names, *headings)

    def on_row(result: SteeringBench) -> None:
        row = result.rows[-1]
        lines.show(
            row.name,
            row.error or shown(row.ratio, digits=3),
            shown_time(row.seconds),
            shown(row.parameters, 1e-6, 1, "M"),
            shown(row.extra_peak_memory, 1e-6, 0, "MB"),
            shown(row.plan_bytes, 1e-6, 1, "MB"),
            shown(row.device_waits),
        )
        write_json(json_file, result.as_json())

    result = run(batch_size=batch_size, compiled=compiled, on_row=on_row, **settings)
    show(f"{result.shape}, {result.pixels} px, {result.dtype}, median of {result.rounds}; {result.machine}")


@app.command("train")
@with_fields
def bench_train(
    subject: Given[Subject],
    batch_size: Annotated[int, typer.Option(min=1, help="Number of samples per step.")] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Compute activations again in U-Net and adapter, to save memory."
        ),
    ] = False,
    rounds: _Rounds = 3,
    json_file: _JsonRows = None,
) -> None:
    """Time a training step beside ControlNet's and T2I-Adapter's, on random weights, and an epoch with the cache."""
    from powersteer.apps.bench.train import METHODS, TrainBench
    from powersteer.apps.bench.train import bench_train as run
    from powersteer.apps.bench.turns import chosen

    settings = _settings(subject.build(), rounds, precision="precision")
    names, headings = (
        chosen(METHODS, settings["only"]),
        ("ratio", "time", "pictures/s", "trained", "peak memory", "estimated"),
    )
    lines = Lines(f"training step, batch {batch_size}", names, *headings)

    def on_row(result: TrainBench) -> None:
        row = result.rows[-1]
        lines.show(
            row.name,
            row.error or shown(row.ratio, digits=3),
            shown_time(row.seconds),
            shown(row.pictures_per_second, digits=2),
            shown(row.parameters, 1e-6, 1, "M"),
            shown(row.peak_memory, 1e-9, 2, "GB"),
            shown(row.estimated_memory, 1e-9, 2, "GB"),
        )
        write_json(json_file, result.as_json())

    settings |= {"batch_size": batch_size, "gradient_checkpointing": gradient_checkpointing}
    result = run(on_row=on_row, **settings)
    show(f"{result.shape}, {result.pixels} px, {result.precision}, median of {result.rounds}; {result.machine}")
    for epochs in result.epochs:
        show(
            f"an epoch of {epochs.pairs} pairs, files of {epochs.stored} px: {epochs.cached:.2f} s cached, "
            f"{epochs.uncached:.2f} s not, {epochs.ratio:.2f} times as long"
        )
    write_json(json_file, result.as_json())


@app.command("generate")
@with_fields
def bench_generate(
    subject: Given[Subject],
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of pictures to make at once. Repeatable.", show_default="1 and 8"),
    ] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1, max=1000, help="Number of denoising steps.")] = 30,
    compiled: _Compile = False,
    rounds: _Rounds = 3,
    json_file: _JsonRows = None,
) -> None:
    """Count the pictures per second of whole pipelines, steered and bare, on random weights."""
    from powersteer.apps.bench.generate import WAYS, GenerateBench
    from powersteer.apps.bench.generate import bench_generate as run
    from powersteer.apps.bench.turns import chosen

    settings = _settings(subject.build(), rounds)
    names = chosen(list(WAYS), settings["only"])
    headings = ["batch", "ratio", "time", "pictures/s", *["peak memory"] * _is_cuda(settings["device"])]
    lines = Lines(f"{num_inference_steps} step{'s' * (num_inference_steps > 1)} and decoding", names, *headings)

    def on_row(result: GenerateBench) -> None:
        row = result.rows[-1]
        lines.show(
            row.name,
            str(row.batch_size),
            row.error or shown(row.ratio, digits=3),
            shown_time(row.seconds),
            shown(row.pictures_per_second, digits=3),
            shown(row.peak_memory, 1e-9, 2, "GB"),
        )
        write_json(json_file, result.as_json())

    settings |= {"num_inference_steps": num_inference_steps, "compiled": compiled}
    result = run(batch_sizes=batch_size or (1, 8), on_row=on_row, **settings)
    show(f"{result.shape}, {result.pixels} px, {result.dtype}, median of {result.rounds}; {result.machine}")


@app.command("cost")
def bench_cost(
    pixels: Annotated[int, typer.Option(min=256, max=4096, help="Side of the picture, in pixels.")] = 1024,
    preset: Annotated[str, typer.Option(help="Shape of the adapter: paper or lite.")] = "paper",
    only: Annotated[
        list[str] | None, typer.Option(help="Base to count, such as z-image. Repeatable. All by default.")
    ] = None,
    json_file: _JsonRows = None,
) -> None:
    """Count what steering a large transformer costs, at its true shape without its weights."""
    from powersteer.apps.bench.cost import BASES, CostBench
    from powersteer.apps.bench.cost import bench_cost as run
    from powersteer.apps.bench.turns import chosen

    if preset not in ("paper", "lite"):
        raise PowersteerError(f"--preset must be paper or lite, not {preset}")
    if pixels % 32:
        raise PowersteerError(f"--pixels must be a multiple of 32, not {pixels}")
    names = chosen(list(BASES), only or [], baseline=False)
    headings = ["parameters", "of the base's", "operations, cold", "warm", "plan", "control net"]
    lines = Lines(f"a step at {pixels} px", names, *headings)

    def on_row(result: CostBench) -> None:
        row = result.rows[-1]
        lines.show(
            row.name,
            shown(row.parameters, 1e-6, 1, "M"),
            shown(row.parameter_share, 100, 2, "%"),
            shown(row.cold_share, 100, 2, "%"),
            shown(row.warm_share, 100, 2, "%"),
            shown(row.plan_bytes, 1e-6, 1, "MB"),
            shown(row.control_net_parameters, 1e-6, 0, "M"),
        )
        write_json(json_file, result.as_json())

    run(pixels, preset, only or [], on_row)


@app.command("prepare")
def bench_prepare(
    task: Annotated[str | None, typer.Option(help="Measure the extractors of this task only.")] = None,
    pictures: Annotated[int, typer.Option(min=8, help="Number of pictures per extractor.")] = 64,
    side: Annotated[int, typer.Option(min=16, help="Side of each picture, in pixels.")] = 512,
    json_file: _JsonFile = None,
) -> None:
    """Count the pairs per second that each extractor makes, with one process and with two."""
    from powersteer.apps.bench.prepare import bench_prepare as run

    result = run(task, pictures=pictures, side=side)
    table = Table(f"{side} px", "", "pictures/s, one process", "two", "scaling")
    for row in result.rows:
        figures = [f"{row.one:.1f}", f"{row.two:.1f}", f"{row.scaling:.2f}"] if row.reason is None else [row.reason]
        table.add_row(row.task, row.extractor, *figures)
    out.print(table)
    out.print(result.machine)
    write_json(json_file, result.as_json())


@app.command("posterior")
def bench_posterior(
    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder for prior, runs, figures and plot. The same command resumes.")
    ] = Path("posterior"),
    observation: Annotated[str, typer.Option(help="What is observed: blur, mask or edges.")] = "edges",
    pairs: Annotated[
        list[int] | None, typer.Option(help="Number of training pairs. Repeatable.", show_default="40 to 20,000")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Method: paper, uniform, lite, controlnet, controlnet-no-latents, controlnet-xs or t2i-adapter. "
            "Repeatable.",
            show_default="most",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each method, from other pairs.")] = 1,
    updates: Annotated[int, typer.Option(min=1, help="Maximum number of updates per run.")] = 1000,
    prior_updates: Annotated[
        int, typer.Option(min=1, help="Number of updates to train the prior, if --out holds none yet.")
    ] = 2500,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure how near adapters come to the exact posterior of a Gaussian field, by number of training pairs."""
    from powersteer.apps.bench.posterior.bench import METHODS, PAIRS
    from powersteer.apps.bench.posterior.bench import bench_posterior as run

    result = run(
        out_dir,
        observation=observation,
        pairs=pairs or PAIRS,
        methods=methods or METHODS,
        seeds=seeds,
        updates=updates,
        prior_updates=prior_updates,
        say=err.print,
    )
    if as_json:
        show_json(result.as_json())
        return
    table = Table("method", "pairs", "overall", *result.bands, title="share of the Bayes gap closed")
    prior = [-e / gap for e, gap in zip(result.prior_excess_by_band, result.gap_by_band, strict=True)]
    table.add_row("prior U-Net", "", f"{result.prior_share:.1%}", *(f"{share:.1%}" for share in prior))
    for row in result.rows:
        error = f" ± {row.error:.1%}" if row.error is not None else ""
        bands = (f"{share:.1%}" for share in row.share_by_band)
        table.add_row(row.method, f"{row.pairs:,}", f"{row.share:.1%}{error}", *bands)
    out.print(table)
    out.print("0 % is the exact prior, 100 % the exact posterior; columns are bands of timesteps")
    for kind in ("json", "png"):
        show(str(out_dir / f"{observation}.{kind}"))


def _settings(subject: Subject, rounds: int, *, precision: str = "dtype") -> dict[str, Any]:
    """Arguments of a bench, which calls its precision ``precision``."""
    return {
        "shape": _shape(subject.shape),
        "device": _device(subject.device),
        precision: _dtype(subject.dtype),
        "only": subject.only,
        "rounds": rounds,
    }


def _shape(shape: str) -> Shape:
    if shape not in ("tiny", "sd15", "sdxl"):
        raise PowersteerError(f"--shape must be tiny, sd15 or sdxl, not '{shape}'")
    return shape


def _dtype(dtype: str) -> torch.dtype:
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise PowersteerError(f"--dtype must be float32, bfloat16 or float16, not '{dtype}'")
    return getattr(torch, dtype)


def _device(device: str) -> str:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PowersteerError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _is_cuda(device: str) -> bool:
    from powersteer.apps.bench.turns import is_cuda

    return is_cuda(device)


@app.command("studio")
def bench_studio(
    strokes: Annotated[int, typer.Option(min=1, help="Number of measured strokes.")] = 12,
    chromium: Annotated[Path, typer.Option(help="Path of the browser.")] = Path("/usr/bin/chromium"),
    json_file: _JsonFile = None,
) -> None:
    """Time from the end of a stroke to its picture, drawn in a headless Chromium."""
    from powersteer.apps.bench.studio import bench_studio as run

    result = run(strokes, chromium)
    table = Table("seconds from a stroke's end", "median", "greatest")
    for name, values, median in zip(
        ("preview", "picture"), (result.preview, result.picture), result.median, strict=True
    ):
        table.add_row(name, f"{median:.2f}", f"{max(values):.2f}")
    out.print(table)
    out.print(f"{len(result.picture)} strokes; {result.machine}")
    write_json(json_file, result.as_json())
