"""The project's main job on any machine: learn to follow drawings, then show on held-out ones that it does."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from powersteer.adapters.load import load_adapter
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.load import load_base
from powersteer.backbones.protocol import base_of
from powersteer.conditions.fidelity.lines import line_f1
from powersteer.core.config import build_config
from powersteer.core.console import PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.pictures import from_pil, save_grid
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs, condition_values, spread
from powersteer.data.prepare.openmoji import prepare_openmoji
from powersteer.denoising.heldout import HeldOut
from powersteer.denoising.sampling.sample import steered_pictures
from powersteer.denoising.settings import GUIDANCE_SCALE
from powersteer.evaluation.report import write_report
from powersteer.training.config import TINY_LEARNING_RATE, TrainConfig
from powersteer.training.run import train

GRID_ROWS, REPORT_ROWS = 12, 24
TRAIN_MINUTES = 6.0
"""The most that a slow machine trains; a fast one is done with its steps before."""
MEASURED_PAIRS = 200
"""Held-out pairs, evenly spread, on which the denoising loss is measured."""
STEPS_A_PICTURE = 20


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's results are, and its figures."""

    out_dir: Path
    metrics: dict[str, Any]
    interrupted: bool = False


def run_demo(
    out_dir: Path, pairs: int | None = None, steps: int | None = None, pictures: int = 60, seed: int = 0
) -> DemoResult:
    """Prepare, train, generate, measure and report; a second run goes on where the first stopped.

    Args:
        out_dir: Everything is written here.
        pairs: Train on so few pairs only, with the preset ``few-shot``; on all of them by default.
        steps: Optimizer updates at most.
        pictures: How many held-out drawings to generate for.
        seed: Of the training and of the first picture.

    Raises:
        PowersteerError: A package is missing, or ``out_dir`` cannot be written.
    """
    console = PlainConsole(stderr=True)
    started = time.perf_counter()
    data = prepare_openmoji(out_dir / "openmoji")
    config = _training(out_dir, data, pairs, steps, seed)
    trained = train(config)
    if trained.interrupted:
        return DemoResult(out_dir, {}, interrupted=True)

    pipe, model = load_base(), load_adapter(str(trained.adapter_dir))
    side = base_of(pipe).size
    test = Pairs(data / "test", (side, side))
    held_out = HeldOut(pipe, encode_pairs(pipe, test, out_dir / "cache"), draws=2, limit=MEASURED_PAIRS)
    console.print(f"measuring on {len(held_out)} held-out pairs")
    losses = _denoising_losses(held_out, model)
    shown = _generate(pipe, model, test, pictures, seed)
    metrics: dict[str, Any] = {
        "pairs": len(Pairs(data / "train", (side, side), limit=pairs)),
        "held_out_pairs": len(held_out),
        "held_out_pictures": len(shown.texts),
        "steps": trained.step,
        "best_step": trained.best_step,
        "train_seconds": round(trained.seconds, 1),
        "parameters": model.num_parameters(),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": STEPS_A_PICTURE,
        "seed": seed,
        "denoising_loss": losses,
        "loss_reduction": 1 - losses["steered"] / losses["prior"],
        "line_f1": _line_fidelity(shown),
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }
    _report(out_dir, metrics, shown, config.output_dir / "log.jsonl")
    return DemoResult(out_dir, metrics)


def _training(out_dir: Path, data: Path, pairs: int | None, steps: int | None, seed: int) -> TrainConfig:
    """The recipe: all pairs with uniform weights, or few with the preset for few; see `run_demo`."""
    settings: dict[str, Any] = {
        "train_data_dir": str(data / "train"),
        "output_dir": out_dir / ("adapter" if pairs is None else f"adapter-{pairs}"),
        "learning_rate": TINY_LEARNING_RATE,
        "cache_dir": out_dir / "cache",
        "max_train_minutes": TRAIN_MINUTES,
        "seed": seed,
    }
    if pairs is None:
        settings |= {"weights": "uniform", "validation_data_dir": data / "validation", "max_train_steps": steps or 2000}
    else:
        settings |= {"preset": "few-shot", "max_train_samples": pairs}
        settings |= {"max_train_steps": steps} if steps else {}
    return build_config(settings, TrainConfig)


def _denoising_losses(held_out: HeldOut, model: Adapter) -> dict[str, float]:
    return {
        "prior": held_out.losses(None).mean().item(),
        "steered": held_out.losses(model).mean().item(),
        "shuffled": held_out.losses(model, shuffled=True).mean().item(),
    }


@dataclass(frozen=True)
class _Shown:
    """Held-out drawings and what was made of them, N each."""

    texts: list[str]
    drawings: torch.Tensor
    """(N, 1, H, W) in [0, 1]."""
    artist: torch.Tensor
    """(N, 3, H, W) in [-1, 1]: the data's own pictures."""
    made: dict[str, torch.Tensor]
    """(N, 3, H, W) in [-1, 1]: the ``prior``'s, ``steered``, and steered by another's drawing (``shuffled``)."""

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Drawing, prior's, steered and artist's picture, (3, H, W) each."""
        drawing = self.drawings[i].expand(3, -1, -1) * -2 + 1
        return drawing, self.made["prior"][i], self.made["steered"][i], self.artist[i]


def _generate(pipe: Any, model: Adapter, test: Pairs, pictures: int, seed: int) -> _Shown:
    """Pictures of ``pictures`` held-out concepts, each from the same noise for all kinds."""
    chosen = one_of_each_concept(test, pictures)
    texts = [test.texts[i] for i in chosen]
    drawings = condition_values(torch.stack([test[i][1] for i in chosen]))
    made: dict[str, list[torch.Tensor]] = {"prior": [], "steered": [], "shuffled": []}
    batches, console = torch.arange(len(chosen)).split(20), PlainConsole(stderr=True)
    for batch in track(batches, "generating", transient=True, console=console):
        prompts, seeds = [texts[int(i)] for i in batch], [seed + int(i) for i in batch]
        others = drawings[(batch + len(chosen) // 2) % len(chosen)]
        for kind, condition in (("prior", None), ("steered", drawings[batch]), ("shuffled", others)):
            network = None if condition is None else model
            images = steered_pictures(
                pipe, network, prompts, condition, seeds=seeds, num_inference_steps=STEPS_A_PICTURE
            )
            made[kind] += [from_pil(image) for image in images]
    artist = torch.stack([test[i][0] for i in chosen])
    return _Shown(texts, drawings, artist, {kind: torch.stack(images) for kind, images in made.items()})


def _line_fidelity(shown: _Shown) -> dict[str, float]:
    """F1 of the lines, and the share of the way from the prior to the artist that steering goes."""
    pictured = {**shown.made, "artist": shown.artist}
    fidelity = {kind: line_f1(shown.drawings, images).mean().item() for kind, images in pictured.items()}
    gained, possible = fidelity["steered"] - fidelity["prior"], fidelity["artist"] - fidelity["prior"]
    return {**fidelity, "share_of_way": gained / possible}


def _report(out_dir: Path, metrics: dict[str, Any], shown: _Shown, log: Path) -> None:
    """Write the grid, the figures and the page.

    Raises:
        PowersteerError: ``out_dir`` cannot be written.
    """
    count = len(shown.texts)
    cells = [picture for i in spread(count, GRID_ROWS) for picture in shown.row(i)]
    headings = ("drawing", "prior", "steered", "artist")
    names = ("drawing", "prior, same seed", "steered", "the artist's picture")
    rows = [
        {"text": shown.texts[i], "pictures": dict(zip(names, shown.row(i), strict=True))}
        for i in spread(count, REPORT_ROWS)
    ]
    try:
        save_grid(torch.stack(cells), out_dir / "grid.png", columns=8, scale=2, headings=headings * 2)
        (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        logged = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        write_report(out_dir / "report.html", metrics, rows, logged)
    except OSError as error:
        raise PowersteerError(f"cannot write to {out_dir}: {reason_of(error)}") from None


def one_of_each_concept(test: Pairs, limit: int) -> list[int]:
    """The first pair of each concept, at most ``limit``, spread evenly: not twenty skin tones of one emoji."""
    assert test.folder is not None
    metadata = (test.folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    first = {json.loads(line)["concept"]: i for i, line in reversed(list(enumerate(metadata)))}
    indices = sorted(first.values())
    return [indices[i] for i in spread(len(indices), limit)]
