"""The commands: parse, call, print. No logic lives here."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image
from rich.table import Table

from powersteer.apps.cli import bench, hub, pairs
from powersteer.apps.cli.given import refuse_idle
from powersteer.apps.cli.help import Commands
from powersteer.apps.cli.output import err, out, show, show_json, tell, write_json
from powersteer.core.errors import PowersteerError, PowersteerWarning

if TYPE_CHECKING:
    from powersteer.training.config import TrainConfig

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
for command in (pairs.prepare, hub.card, hub.push):
    app.command()(command)


@app.command()
def generate(
    ctx: typer.Context,
    condition: Annotated[
        list[Path] | None,
        typer.Option(help="What to follow: PNG, JPEG, … (features: .npy); once for each adapter."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the picture shows.", show_default=False)] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="'sketch' (the default), a folder that `train` wrote, or user/name on the Hub; may be repeated."
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(help="The frozen base: a name, a folder, or a model of the Hub.")
    ] = "powersteer-tiny",
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.", show_default=False)] = "",
    seed: Annotated[int, typer.Option(help="Of the first picture's noise; then one more for each.")] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures, one seed each.")] = 4,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Many at once: JSONL with prompt, condition, negative_prompt, seed. Goes on where it stopped."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Many at once: a folder of pairs, each one's caption and condition. Goes on, too."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 30,
    guidance_scale: Annotated[float, typer.Option(min=1.0, help="Strength of the text; 1 is none.")] = 3.0,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, dpm++, euler, euler-a, heun, lcm, pndm or unipc; else the base's.")
    ] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Strength of the steering (1); 0 is the prior.")] = None,
    start: Annotated[
        list[float] | None, typer.Option(help="When steering sets in (0), from noise 0 to picture 1.")
    ] = None,
    end: Annotated[list[float] | None, typer.Option(help="When it ends (1).")] = None,
    init_image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    mask_image: Annotated[Path | None, typer.Option(help="Repaint only where this is white.")] = None,
    strength: Annotated[float, typer.Option(min=0.0, max=1.0, help="How far from the init image.")] = 0.8,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 4,
    out_dir: Annotated[Path, typer.Option("--out", help="Where the pictures go.")] = Path("generated"),
) -> None:
    """Make pictures that follow a drawing, or several conditions at once."""
    from powersteer.core.config import build_config
    from powersteer.denoising.generate import GenerateSettings, jobs_of, jobs_of_pairs, read_manifest
    from powersteer.denoising.generate import generate as run

    of_each = ("condition", "prompt", "num_images")
    if pairs is not None:
        refuse_idle(ctx, "with --pairs, whose pairs have their own", *of_each, "manifest")
    elif manifest is not None:
        refuse_idle(ctx, "with --manifest, whose lines have their own", *of_each, "negative_prompt", "seed")
    if init_image is None:
        refuse_idle(ctx, "without --init-image", "strength")
    given = {"adapter": adapter, "scale": scale, "start": start, "end": end, "scheduler": scheduler}
    settings = build_config(
        {
            "base": base,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "init_image": init_image,
            "mask_image": mask_image,
            "strength": strength,
            "prepared": pairs is not None,
            **{name: value for name, value in given.items() if value},
        },
        GenerateSettings,
        where="generate",
    )
    if pairs is not None:
        jobs = jobs_of_pairs(pairs, negative_prompt, seed)
    elif manifest is not None:
        jobs = read_manifest(manifest)
    else:
        jobs = jobs_of(prompt, condition or [], negative_prompt, seed, num_images)
    for path in run(settings, jobs, out_dir, batch_size=batch_size, resume=pairs is not None or manifest is not None):
        show(str(path))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As many as you like; they win over the file.")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and the memory it takes; load nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result, or the dry run, as JSON.")] = False,
) -> None:
    """Train a steering network on pairs. The same command goes on with an interrupted run.

    On several GPUs or machines: accelerate launch --config_file configs/accelerate/one-machine.yaml
    -m powersteer.train CONFIG [KEY=VALUE]... What keys there are: see --dry-run.
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
        shown = (
            " × ".join(map(str, fact))
            if isinstance(fact, list)
            else f"{fact:,}"
            if isinstance(fact, int)
            else str(fact)
        )
        table.add_row(name.replace("_", " "), shown)
    out.print(table)
    memory = Table("memory of a process, estimated", "GB")
    for name, size in {**plan.memory.rows, "total": plan.memory.total, "free now": plan.free_memory}.items():
        memory.add_row(name, f"{size / 1e9:.2f}")
    out.print(memory)


_OF_PAIRS = (
    *("adapter", "base", "pairs", "pictures", "draws", "diversity"),
    *("seed", "steps", "guidance_scale", "scheduler", "save_pictures"),
)


@app.command()
def evaluate(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(help="Pairs; of a data set with splits the held-out one is taken.", show_default=False),
    ] = None,
    adapter: Annotated[str, typer.Option(help="'sketch', a folder that `train` wrote, or none: the prior.")] = "sketch",
    base: Annotated[
        str, typer.Option(help="The frozen base: a name, a folder, or a model of the Hub.")
    ] = "powersteer-tiny",
    real: Annotated[
        Path | None, typer.Option(help="Instead of DATA: a folder of pictures, or of pairs (cropped as in training) …")
    ] = None,
    generated: Annotated[Path | None, typer.Option(help="… and another to compare with it.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Take so many of the held-out pairs; else all.")] = None,
    pictures: Annotated[int, typer.Option(help="To make of each kind; 0 for the denoising figures alone.")] = 120,
    draws: Annotated[int, typer.Option(help="Of noise and log-SNR for each pair.")] = 8,
    seed: Annotated[int, typer.Option(help="Of noise, and of the first picture.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 30,
    guidance_scale: Annotated[float, typer.Option(min=1.0, help="Strength of the text; 1 is none.")] = 3.0,
    scheduler: Annotated[str | None, typer.Option(help="As in `generate`; else the base's.")] = None,
    features: Annotated[
        list[str] | None, typer.Option(help="clip, hed or inception; may be repeated. clip where there is one.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="A CLIP in transformers' format; else the base's own.")] = None,
    inception_weights: Annotated[Path | None, typer.Option(help="A file; else they are fetched.")] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="LPIPS too; its weights are fetched.")] = False,
    extractor: Annotated[
        str | None, typer.Option(help="Look for edges or labels in pictures with it: hed, canny, model, …")
    ] = None,
    extractor_model: Annotated[str | None, typer.Option(help="Of the extractor 'model'.")] = None,
    diversity: Annotated[int, typer.Option(help="Conditions drawn under several seeds; 0 for none.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 20,
    save_pictures: Annotated[Path | None, typer.Option(help="A folder for all pictures and grids.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures and their protocol here.")] = None,
) -> None:
    """Measure an adapter on held-out pairs, or one folder of pictures against another."""
    from powersteer.core.config import build_config
    from powersteer.evaluation.evaluate import EvaluateSettings
    from powersteer.evaluation.evaluate import evaluate as run
    from powersteer.evaluation.folders import evaluate_folders
    from powersteer.evaluation.measures import MeasureSettings

    measures: dict[str, Any] = {
        "features": features or None,
        "clip": clip,
        "inception_weights": inception_weights,
        "lpips": lpips,
        "extractor": extractor,
        "extractor_model": extractor_model,
        "batch_size": batch_size,
    }
    if data is not None and real is None and generated is None:
        values = measures | {
            "data": data,
            "adapter": None if adapter == "none" else adapter,
            "base": base,
            "pairs": pairs,
            "pictures": pictures,
            "draws": draws,
            "diversity": diversity,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
            "save_pictures": save_pictures,
        }
        result = run(build_config(values, EvaluateSettings, where="evaluate"), err)
    elif data is None and real is not None and generated is not None:
        refuse_idle(ctx, "with --real and --generated", *_OF_PAIRS)
        result = evaluate_folders(real, generated, build_config(measures, MeasureSettings, where="evaluate"))
    else:
        raise PowersteerError("give DATA, the folder of pairs; or --real and --generated, two folders of pictures")
    table = Table("", *result.columns)
    for figure in result.figures:
        table.add_row(figure.heading, *(str(figure.values.get(column, "")) for column in result.columns))
    out.print(table)
    for warning in result.warnings:
        tell("warning", "yellow", warning)
    write_json(json_file, result.as_json())


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="See configs/powersteer-tiny.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="They win over the file; a dot reaches into sections."),
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="A folder of what was learned elsewhere: taken where output_dir has nothing, and renewed."),
    ] = None,
) -> None:
    """Build the embedded base from icon sets, stage by stage. The same command goes on where it stopped."""
    from powersteer.apps.pretrain.config import PretrainConfig
    from powersteer.apps.pretrain.stages import pretrain as run
    from powersteer.core.config import load_config

    show(run(load_config(config, PretrainConfig, overrides or []), snapshot))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help=".ckpt, .pt or .safetensors; read safely.", show_default=False)],
    out_dir: Annotated[Path, typer.Argument(help="A new folder for the adapter.", show_default=False)],
    conditioning_channels: Annotated[int, typer.Option(min=1, help="1 sketch, 3 RGB, 4 style.")] = 1,
    unshuffle: Annotated[int, typer.Option(min=1, help="Pixels a side of one latent; 1 for feature maps.")] = 8,
    attention_head_dim: Annotated[int, typer.Option(min=1, help="Head width of self-attention (SDXL).")] = 64,
    norm_num_groups: Annotated[int, typer.Option(min=1, help="Of every GroupNorm.")] = 32,
    kind: Annotated[str, typer.Option(help="What the condition is, recorded in the config.")] = "sketch",
) -> None:
    """Make an adapter of a checkpoint in the paper authors' format."""
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


@app.command()
def studio(
    base: Annotated[
        str, typer.Option(help="The frozen base: a name, a folder, or a model of the Hub.")
    ] = "powersteer-tiny",
    adapter: Annotated[
        list[str] | None, typer.Option(help="'sketch', or a folder that `train` wrote; may be repeated.")
    ] = None,
    adapters_dir: Annotated[
        Path, typer.Option(help="Adapters in it can be chosen; new ones are trained into it.")
    ] = Path("runs"),
    host: Annotated[str, typer.Option(help="Of this machine; others' access needs --auth.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Else the first free from 7860.")] = None,
    auth: Annotated[str | None, typer.Option(help="user:password.", envvar="POWERSTEER_AUTH", show_envvar=True)] = None,
) -> None:
    """Draw and see, compare with the prior, and train, on a page in the browser."""
    import signal
    import threading

    from powersteer.apps.studio.serve import served

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a training under way is ended too

    with served(base, adapter or [], adapters_dir, host=host, port=port, auth=auth) as address:
        show(f"the studio is at {address} (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("demo"),
    pairs: Annotated[
        int | None, typer.Option(min=8, help="Train on so few pairs only, with the preset few-shot.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer updates at most.")] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Held-out drawings to generate for.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the training and the first picture.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Learn to follow OpenMoji's drawings, then show on held-out ones that it does."""
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


@app.command()
def compare(
    ctx: typer.Context,
    experiment: Annotated[Path, typer.Argument(help="See configs/experiments/.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="They win over the file; a dot reaches into sections."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write tables and plots of what is done.")] = False,
    out_file: Annotated[Path, typer.Option("--out", help="The report; plots go beside it.")] = Path("docs/results.md"),
) -> None:
    """Train methods × numbers of pairs × seeds and measure them alike. The same command goes on where it stopped."""
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
