"""The project's main job on any machine: learn to follow drawings, then show on held-out ones that it does."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from powersteer.backbones.load import load_adapter, load_base
from powersteer.core.config import build_config
from powersteer.core.console import PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.pictures import from_pil, save_grid
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs, condition_values, spread
from powersteer.data.prepare.openmoji import prepare_openmoji
from powersteer.denoising.generate import GUIDANCE_SCALE, steered_pictures
from powersteer.denoising.heldout import HeldOut
from powersteer.evaluation.lines import line_f1
from powersteer.evaluation.report import write_report
from powersteer.training.config import TINY_LEARNING_RATE, TrainConfig
from powersteer.training.run import train

GRID_ROWS = 12
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
    run_name = "adapter" if pairs is None else f"adapter-{pairs}"
    settings: dict[str, Any] = {
        "train_data_dir": str(data / "train"),
        "output_dir": out_dir / run_name,
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
    config = build_config(settings, TrainConfig)
    trained = train(config)
    if trained.interrupted:
        return DemoResult(out_dir, {}, interrupted=True)

    pipe = load_base()
    model = load_adapter(str(trained.adapter_dir))
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    test = Pairs(data / "test", (side, side))
    held_out = HeldOut(pipe, encode_pairs(pipe, test, out_dir / "cache"), draws=2, limit=MEASURED_PAIRS)
    console.print(f"measuring on {len(held_out)} held-out pairs")
    losses = {
        "prior": held_out.losses(None).mean().item(),
        "steered": held_out.losses(model).mean().item(),
        "shuffled": held_out.losses(model, shuffled=True).mean().item(),
    }

    chosen = one_of_each_concept(test, pictures)
    drawings = condition_values(torch.stack([test[i][1] for i in chosen]))
    made: dict[str, list[torch.Tensor]] = {"prior": [], "steered": [], "shuffled": []}
    for batch in track(torch.arange(len(chosen)).split(20), "generating", transient=True, console=console):
        prompts = [test.texts[chosen[int(i)]] for i in batch]
        seeds = [seed + int(i) for i in batch]
        others = drawings[(batch + len(chosen) // 2) % len(chosen)]
        for kind, condition in (("prior", None), ("steered", drawings[batch]), ("shuffled", others)):
            network = None if condition is None else model
            images = steered_pictures(
                pipe, network, prompts, condition, seeds=seeds, num_inference_steps=STEPS_A_PICTURE
            )
            made[kind] += [from_pil(image) for image in images]
    artist = torch.stack([test[i][0] for i in chosen])
    pictured = {kind: torch.stack(images) for kind, images in made.items()}
    fidelity = {kind: line_f1(drawings, images).mean().item() for kind, images in pictured.items()}
    fidelity["artist"] = line_f1(drawings, artist).mean().item()
    fidelity["share_of_way"] = (fidelity["steered"] - fidelity["prior"]) / (fidelity["artist"] - fidelity["prior"])

    metrics: dict[str, Any] = {
        "pairs": len(Pairs(data / "train", (side, side), limit=pairs)),
        "held_out_pairs": len(held_out),
        "held_out_pictures": len(chosen),
        "steps": trained.step,
        "best_step": trained.best_step,
        "train_seconds": round(trained.seconds, 1),
        "parameters": model.num_parameters(),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": STEPS_A_PICTURE,
        "seed": seed,
        "denoising_loss": losses,
        "loss_reduction": 1 - losses["steered"] / losses["prior"],
        "line_f1": fidelity,
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }
    try:
        rows = spread(len(chosen), GRID_ROWS)
        shown = torch.stack(
            [
                picture
                for i in rows
                for picture in (
                    drawings[i].expand(3, -1, -1) * -2 + 1,
                    pictured["prior"][i],
                    pictured["steered"][i],
                    artist[i],
                )
            ]
        )
        headings = ("drawing", "prior", "steered", "artist") * 2
        save_grid(shown, out_dir / "grid.png", columns=8, scale=2, headings=headings)
        (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        write_report(
            out_dir / "report.html",
            metrics,
            [
                {
                    "text": test.texts[chosen[i]],
                    "pictures": {
                        "drawing": drawings[i].expand(3, -1, -1) * -2 + 1,
                        "prior, same seed": pictured["prior"][i],
                        "steered": pictured["steered"][i],
                        "the artist's picture": artist[i],
                    },
                }
                for i in spread(len(chosen), 24)
            ],
            [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()],
        )
    except OSError as error:
        raise PowersteerError(f"cannot write to {out_dir}: {error.strerror}") from None
    return DemoResult(out_dir, metrics)


def one_of_each_concept(test: Pairs, limit: int) -> list[int]:
    """The first pair of each concept, at most ``limit``, spread evenly: not twenty skin tones of one emoji."""
    assert test.folder is not None
    metadata = (test.folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    first = {json.loads(line)["concept"]: i for i, line in reversed(list(enumerate(metadata)))}
    indices = sorted(first.values())
    return [indices[i] for i in spread(len(indices), limit)]
