"""Pictures → figures: every measure applied to each column of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from powersteer.backbones.load import source_of
from powersteer.conditions.agreement import Pictures
from powersteer.conditions.extractor import EXTRACTORS, Extractor
from powersteer.conditions.kind import KINDS
from powersteer.core.files import is_file
from powersteer.core.pictures import by_batch
from powersteer.core.ssim import SSIM_WINDOW, ssim
from powersteer.evaluation.distribution import few_pictures, frechet_distance, kernel_distance
from powersteer.evaluation.features import Clip, FeatureExtractor, load_features
from powersteer.evaluation.figures import REAL, Figure, Value
from powersteer.evaluation.paired import lpips, psnr
from powersteer.evaluation.settings import MeasureSettings


def load_clip_of(settings: MeasureSettings, base: str) -> Clip | None:
    """The CLIP that was asked for, or the base's own, if it has one."""
    if settings.clip is None and not is_file(Path(source_of(base)) / "clip" / "config.json"):
        return None
    return Clip.load(settings.clip or base)


def load_extractors(settings: MeasureSettings, clip: Clip | None) -> dict[str, FeatureExtractor]:
    """Those that were asked for, by name."""
    names = settings.features
    if names is None:
        names = () if clip is None else ("clip",)
    return {name: load_features(name, clip=clip, inception_weights=settings.inception_weights) for name in names}


def load_condition_extractor(settings: MeasureSettings, kind: str) -> Extractor | None:
    """The extractor that was asked for: one that finds conditions of the kind in pictures."""
    if settings.extractor is None:
        return None
    import_module("powersteer.conditions.extractors.catalogue")  # registers them all
    registered = EXTRACTORS.find(KINDS.find(kind).seen_as or kind, settings.extractor)
    return registered.build(**({} if settings.extractor_model is None else {"model": settings.extractor_model}))


def fidelity(
    kind: str,
    palette: Mapping[str, Sequence[int]],
    pictures: Pictures,
    conditions: torch.Tensor,
    batch_size: int,
    extractor: Extractor | None = None,
) -> list[Figure]:
    """How well pictures keep to their conditions; none for a kind that has no measure.

    Args:
        kind: Of the condition.
        palette: Of label maps: RGB of each class.
        pictures: By column.
        conditions: (N, C, H, W) in [0, 1].
        batch_size: Pictures looked at at once.
        extractor: Finds edges or labels in pictures; by default dark lines and nearest colours are looked for.
    """
    measured = KINDS.find(kind).fidelity(
        pictures, conditions, palette=palette, extractor=extractor, batch_size=batch_size
    )
    figures: list[Figure] = []
    for one in measured:
        values = {
            column: Value.mean(value) if isinstance(value, torch.Tensor) else Value(value)
            for column, value in one.values.items()
        }
        figures.append(Figure(one.name, one.better, values, one.protocol))
    return figures


def paired(pictures: Pictures, settings: MeasureSettings) -> list[Figure]:
    """Picture by picture, against the real ones."""

    def each(measure: Callable[..., torch.Tensor]) -> dict[str, Value]:
        """The mean, for each column, of a measure of its pictures in [0, 1] and the real ones."""

        def scaled(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
            return measure((images + 1) / 2, (references + 1) / 2)

        return {
            name: Value.mean(by_batch(scaled, settings.batch_size, images, pictures[REAL]))
            for name, images in pictures.items()
            if name != REAL
        }

    figures = [Figure("PSNR, dB", "higher", each(psnr)), Figure("SSIM", "higher", each(ssim), SSIM_WINDOW)]
    if settings.lpips:
        figures.append(Figure("LPIPS", "lower", each(lpips), {"network": "VGG-16, as torch-fidelity has it"}))
    return figures


def text(clip: Clip, pictures: Pictures, prompts: Sequence[str], batch_size: int) -> Figure:
    """Agreement of pictures and prompts."""

    def score(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return clip.score(images, [prompts[int(i)] for i in places])

    places = torch.arange(len(prompts))
    values = {name: Value.mean(by_batch(score, batch_size, images, places)) for name, images in pictures.items()}
    return Figure("CLIP score", "higher", values, clip.record() | {"score": "100 × max(cosine, 0)"})


def distances(
    name: str, record: Mapping[str, Any], real: torch.Tensor, made: Mapping[str, torch.Tensor]
) -> tuple[list[Figure], str | None]:
    """Fréchet and kernel distance of features from those of real pictures.

    Args:
        name: Of the extractor.
        record: What it is.
        real: (N, D).
        made: By column, (M, D).

    Returns:
        The figures, and what is to be said of so few pictures.
    """
    counts = {REAL: len(real), **{kind: len(features) for kind, features in made.items()}}
    protocol = {**record, "pictures": counts, "precision": "float64"}
    frechet, kernel = ("FID", "KID") if name == "inception" else (f"FD, {name}", f"KD, {name}")
    fd = {kind: Value(frechet_distance(real, features)) for kind, features in made.items()}
    kd = {kind: kernel_distance(real, features) for kind, features in made.items()}
    of_one = next(iter(kd.values()))
    subsets = {
        "subsets": of_one.subsets,
        "subset_size": of_one.subset_size,
        "seed": of_one.seed,
        "spread_over_subsets": {kind: distance.spread for kind, distance in kd.items()},
    }
    figures = [
        Figure(frechet, "lower", fd, protocol),
        Figure(kernel, "lower", {kind: Value(one.mean, one.spread) for kind, one in kd.items()}, protocol | subsets),
    ]
    return figures, few_pictures(min(counts.values()))
