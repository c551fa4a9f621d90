"""`powersteer evaluate`: a steering network on held-out pairs, or one folder of pictures beside another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from powersteer.adapters.attach import check_fits
from powersteer.adapters.load import load_network
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.load import load_base
from powersteer.backbones.options import base_options
from powersteer.backbones.protocol import base_of
from powersteer.conditions import condition_picture
from powersteer.conditions.extractor import Extractor
from powersteer.core.console import PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.hardware import best_device
from powersteer.core.pictures import as_bytes, as_floats, by_batch, from_pil, save_grid, to_pil
from powersteer.data.conditioning import conditioning_of
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs, condition_values, spread
from powersteer.data.splits import held_out_folder
from powersteer.denoising.heldout import HeldOut
from powersteer.denoising.objective import objective_of
from powersteer.denoising.sampling.sample import check_steps, make_scheduler, steered_pictures
from powersteer.evaluation.features import Clip, FeatureExtractor, weights_sha256
from powersteer.evaluation.figures import PRIOR, REAL, SHUFFLED, STEERED, Evaluation, Figure, Value, environment
from powersteer.evaluation.information import denoiser_errors, measure_information
from powersteer.evaluation.measures import (
    Pictures,
    distances,
    fidelity,
    load_clip_of,
    load_condition_extractor,
    load_extractors,
    paired,
    text,
)
from powersteer.evaluation.paired import spread_map
from powersteer.evaluation.settings import EvaluateSettings

FEWEST = 4
"""The fewest pictures that can be measured."""
LOSS_DRAWS = 4
GRID_ROWS = 8
SHOWN_SEEDS = 4


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, loaded."""

    pipe: Any
    model: Adapter | None
    pairs: Pairs
    kind: str
    palette: dict[str, list[int]]


def evaluate(settings: EvaluateSettings, console: Console | None = None) -> Evaluation:
    """Every figure of a steering network on held-out pairs; of the prior, those that it has.

    Args:
        settings: What, and how.
        console: Where progress is told.

    Raises:
        PowersteerError: No such base, adapter or data, weights or a package are missing, or a folder cannot be written.
    """
    console = console or PlainConsole(quiet=True)
    subject = _load(settings)
    looks = _load_looks(settings, subject.kind)  # what is missing is said before anything is made
    if settings.pictures and min(settings.pictures, len(subject.pairs)) < FEWEST:
        raise PowersteerError(f"measures of pictures need {FEWEST} at least: give --pictures 0 for none, or more pairs")
    warnings: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        figures = list(_denoising(subject, settings, Path(cache), console))
    if settings.pictures:
        chosen = spread(len(subject.pairs), settings.pictures)
        pictures, conditions = _draw(subject, chosen, settings, console)
        of_pictures, warnings = _of_pictures(subject, chosen, pictures, conditions, settings, looks)
        sampling = {"sampling": _sampling(settings, subject.pipe) | {"pictures": len(chosen)}}
        figures += [figure.under(sampling) for figure in of_pictures]
        if settings.diversity:
            figures.append(_diversity(subject, settings, console))
        if settings.save_pictures is not None:
            _save(settings.save_pictures, pictures, conditions)
    return Evaluation(figures, settings.model_dump(mode="json"), _provenance(subject, settings), warnings)


@dataclass(frozen=True)
class _Looks:
    """What looks at pictures, loaded."""

    clip: Clip | None
    condition: Extractor | None
    """Makes conditions of pictures."""
    features: dict[str, FeatureExtractor]


def _load_looks(settings: EvaluateSettings, kind: str) -> _Looks:
    clip = load_clip_of(settings, settings.base)
    return _Looks(clip, load_condition_extractor(settings, kind), load_extractors(settings, clip))


def _of_pictures(
    subject: _Subject,
    chosen: Sequence[int],
    pictures: Pictures,
    conditions: torch.Tensor,
    settings: EvaluateSettings,
    looks: _Looks,
) -> tuple[list[Figure], list[str]]:
    """Every measure of the pictures made for the ``chosen`` pairs, and warnings."""
    size, prompts = settings.batch_size, [subject.pairs.texts[i] for i in chosen]
    figures = fidelity(subject.kind, subject.palette, pictures, conditions, size, looks.condition)
    figures += paired(pictures, settings)
    if looks.clip is not None:
        figures.append(text(looks.clip, pictures, prompts, size))
    real = as_bytes(torch.stack([subject.pairs[i][0] for i in range(len(subject.pairs))]))
    warnings: list[str] = []
    for name, extractor in looks.features.items():
        made = {kind: by_batch(extractor, size, pictures[kind]) for kind in (PRIOR, STEERED) if kind in pictures}
        of_one, warning = distances(name, extractor.record(), by_batch(extractor, size, real), made)
        figures += of_one
        if warning is not None and warning not in warnings:
            warnings.append(warning)
    return figures, warnings


def _provenance(subject: _Subject, settings: EvaluateSettings) -> dict[str, Any]:
    """Data, weights and machine."""
    digests = {f"{name}_sha256": weights_sha256(part) for name, part in base_of(subject.pipe).parts.items()}
    adapter: dict[str, Any] | None = None
    if subject.model is not None:
        adapter = {
            "name": settings.adapter,
            "network": type(subject.model).__name__,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "sha256": weights_sha256(subject.model),
        }
    return {
        "data": {"folder": str(subject.pairs.folder), "pairs": len(subject.pairs), "kind": subject.kind},
        "base": {"name": settings.base, **digests},
        "adapter": adapter,
        **environment(subject.pipe.device.type),
    }


def _load(settings: EvaluateSettings) -> _Subject:
    pipe: Any = load_base(settings.base, **base_options(settings))
    pipe.to(best_device())
    if settings.scheduler is not None:
        pipe.scheduler = make_scheduler(settings.scheduler, pipe.scheduler)
    check_steps(pipe, settings.num_inference_steps)
    folder = held_out_folder(settings.data)
    found = conditioning_of(str(folder))
    record, channels = dict(found.record), found.channels
    model = None if settings.adapter is None else load_network(settings.adapter)
    if model is not None:
        check_fits(model, pipe)
        channels = model.spec.channels
        known = model.spec.conditioning
        record |= {key: value for key, value in known.items() if value is not None}
        model.to(pipe.device)
    base = base_of(pipe)
    side = base.size
    kind = record["kind"]
    pairs = Pairs(folder, (side, side), channels, kind=kind, vae_scale_factor=base.factor)
    if settings.pairs is not None:
        pairs = pairs.subset(spread(len(pairs), settings.pairs))
    return _Subject(pipe, model, pairs, kind, record.get("palette") or {})


def _denoising(subject: _Subject, settings: EvaluateSettings, cache: Path, console: Console) -> Iterator[Figure]:
    """Information, and the plain denoising loss."""
    pairs = encode_pairs(subject.pipe, subject.pairs, cache, console=console)
    objective = objective_of(subject.pipe.scheduler)
    if subject.model is not None:
        errors = denoiser_errors(subject.pipe, subject.model, pairs)
        with console.status(f"information: {len(pairs):,} pairs, {settings.draws} draws each"):
            found = measure_information(errors, objective, len(pairs), draws=settings.draws, seed=settings.seed)
        yield Figure(
            "information, nats a latent dimension",
            "higher",
            {
                STEERED: Value(found.steered.mean, found.steered.error),
                SHUFFLED: Value(found.shuffled.mean, found.shuffled.error),
            },
            {
                "estimator": "½ ∫ (ε-error of the prior − of the steered) dλ over the schedule's log-SNR, paired noise",
                "prediction_type": objective.prediction_type,
                "log_snr_from": found.bands[0][0],
                "log_snr_to": found.bands[-1][1],
                "bands": [{"from": low, "to": high, "nats": nats} for low, high, nats in found.bands],
                "pairs": found.pairs,
                "draws": found.draws,
                "seed": found.seed,
            },
        )
    held_out = HeldOut(subject.pipe, pairs, draws=LOSS_DRAWS, seed=settings.seed)
    with console.status(f"denoising loss: {len(pairs):,} pairs, {LOSS_DRAWS} draws each"):
        losses = {PRIOR: held_out.losses(None)}
        if subject.model is not None:
            losses[STEERED] = held_out.losses(subject.model)
            losses[SHUFFLED] = held_out.losses(subject.model, shuffled=True)
    protocol = {"target": objective.prediction_type, "pairs": len(pairs), "draws": LOSS_DRAWS, "seed": settings.seed}
    yield Figure("denoising loss", "lower", {k: Value.mean(loss.mean(0)) for k, loss in losses.items()}, protocol)


def _draw(
    subject: _Subject, chosen: Sequence[int], settings: EvaluateSettings, console: Console
) -> tuple[Pictures, torch.Tensor]:
    """The data's pictures and those made of the same prompts and seeds; and the conditions (N, C, H, W) in [0, 1]."""
    pairs = [subject.pairs[i] for i in chosen]
    conditions = condition_values(torch.stack([condition for _, condition in pairs]))
    others = conditions.roll(-(len(chosen) // 2), 0)  # half the folder away is another concept
    given = {PRIOR: None} if subject.model is None else {PRIOR: None, STEERED: conditions, SHUFFLED: others}
    made: dict[str, list[torch.Tensor]] = {name: [] for name in given}
    batches = torch.arange(len(chosen)).split(settings.batch_size)
    for batch in track(batches, "generating", transient=True, console=console, disable=not console.is_terminal):
        prompts = [subject.pairs.texts[chosen[int(i)]] for i in batch]
        seeds = [settings.seed + int(i) for i in batch]
        for name, condition in given.items():
            steering = None if condition is None else condition[batch]
            made[name] += _sample(subject, steering, prompts, seeds, settings)
    pictures = {name: as_bytes(torch.stack(images)) for name, images in made.items()}
    return pictures | {REAL: as_bytes(torch.stack([picture for picture, _ in pairs]))}, conditions


def _sample(
    subject: _Subject,
    condition: torch.Tensor | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: EvaluateSettings,
) -> list[torch.Tensor]:
    images = steered_pictures(
        subject.pipe,
        None if condition is None else subject.model,
        prompts,
        condition,
        seeds=seeds,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    return [from_pil(image) for image in images]


def _sampling(settings: EvaluateSettings, pipe: Any) -> dict[str, Any]:
    return {
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "first_seed": settings.seed,
        "size": [base_of(pipe).size] * 2,
    }


def _diversity(subject: _Subject, settings: EvaluateSettings, console: Console) -> Figure:
    """How far pictures of one prompt and condition lie apart under several seeds; a map, where there is a folder."""
    chosen = spread(len(subject.pairs), settings.diversity)
    kinds = (PRIOR,) if subject.model is None else (PRIOR, STEERED)
    spreads: dict[str, list[float]] = {kind: [] for kind in kinds}
    shown: list[torch.Tensor] = []
    for i in track(chosen, "several seeds", transient=True, console=console, disable=not console.is_terminal):
        picture, condition = subject.pairs[i][0], condition_values(subject.pairs[i][1][None])
        prompts = [subject.pairs.texts[i]] * settings.diversity_seeds
        seeds = [settings.seed + k for k in range(settings.diversity_seeds)]
        shown.append(_as_picture(condition[0], picture))
        for kind in kinds:
            images = torch.stack(_sample(subject, None if kind == PRIOR else condition, prompts, seeds, settings))
            spread_of = spread_map((images + 1) / 2)  # (H, W)
            spreads[kind].append(spread_of.mean().item())
            bright = (spread_of / 0.5).clamp(0, 1) * 2 - 1  # half of black and half of white spread by 0.5
            shown += [*images[:SHOWN_SEEDS], bright.float().expand(3, -1, -1)]
    if settings.save_pictures is not None:
        columns = 1 + len(kinds) * (min(SHOWN_SEEDS, settings.diversity_seeds) + 1)
        _write(lambda folder: save_grid(torch.stack(shown), folder / "diversity.png", columns), settings.save_pictures)
    protocol = {
        "of": "standard deviation of a pixel in [0, 1] over seeds, mean over pixels",
        "conditions": len(chosen),
        "seeds": settings.diversity_seeds,
        "sampling": _sampling(settings, subject.pipe),
    }
    return Figure("spread over seeds", "", {k: Value.mean(torch.tensor(v)) for k, v in spreads.items()}, protocol)


def _as_picture(condition: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A condition (C, h, w) as a picture (3, H, W) in [-1, 1], of the size of another: a drawing is dark on light."""
    shown = condition_picture(condition, (like.shape[-2], like.shape[-1]))
    return -shown if len(condition) == 1 else shown


def _save(folder: Path, pictures: Pictures, conditions: torch.Tensor) -> None:
    """Every picture, one folder a column, and a grid."""

    def write(folder: Path) -> None:
        for name, images in pictures.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                to_pil(as_floats(image)).save(folder / name / f"{i:05d}.png")
        shown = [
            cell
            for i in spread(len(conditions), GRID_ROWS)
            for cell in (_as_picture(conditions[i], pictures[REAL][i]), *(as_floats(x[i]) for x in pictures.values()))
        ]
        scale = max(1, 128 // shown[0].shape[-1])
        headings = ("condition", *pictures)
        save_grid(torch.stack(shown), folder / "grid.png", columns=len(headings), scale=scale, headings=headings)

    _write(write, folder)


def _write(write: Callable[[Path], None], folder: Path) -> None:
    try:
        write(folder)
    except OSError as error:
        raise PowersteerError(f"cannot write to {folder}: {reason_of(error)}") from None
