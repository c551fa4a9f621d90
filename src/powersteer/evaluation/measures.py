"""Pictures → figures: every measure applied to each column of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from powersteer.base import source_of
from powersteer.config import StrictConfig
from powersteer.evaluation.distribution import few_pictures, frechet_distance, kernel_distance
from powersteer.evaluation.features import Clip, FeatureExtractor, FeatureName, load_features
from powersteer.evaluation.fidelity import box_iou, class_boxes, mean_iou, nearest_labels, palette_distance
from powersteer.evaluation.figures import REAL, Figure, Value
from powersteer.evaluation.lines import TOLERANCE, dark_lines, line_scores
from powersteer.evaluation.paired import lpips, psnr, ssim

Pictures = Mapping[str, torch.Tensor]
"""By column, (N, 3, H, W), uint8: a quarter of the memory of floats."""


class MeasureSettings(StrictConfig):
    """How pictures are measured."""

    features: tuple[FeatureName, ...] | None = None
    """Of the distances between distributions; ``clip`` by default, where there is one."""
    clip: str | None = None
    """A CLIP in transformers' format, or a base that has one; the base's own by default."""
    inception_weights: Path | None = None
    lpips: bool = False
    batch_size: int = Field(default=20, gt=0)
    """Pictures made, or measured, at once."""


def load_clip_of(settings: MeasureSettings, base: str) -> Clip | None:
    """The CLIP that was asked for, or the base's own, if it has one."""
    if settings.clip is None and not (Path(source_of(base)) / "clip" / "config.json").exists():
        return None
    return Clip.load(settings.clip or base)


def load_extractors(settings: MeasureSettings, clip: Clip | None) -> dict[str, FeatureExtractor]:
    """Those that were asked for, by name."""
    names = settings.features
    if names is None:
        names = () if clip is None else ("clip",)
    return {name: load_features(name, clip=clip, inception_weights=settings.inception_weights) for name in names}


def fidelity(
    kind: str, palette: Mapping[str, Sequence[int]], pictures: Pictures, conditions: torch.Tensor, batch_size: int
) -> list[Figure]:
    """How well pictures keep to conditions (N, C, H, W) in [0, 1]; none for a kind that has no measure."""

    def each(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, Value]:
        """Of a measure of pictures in [-1, 1] and conditions."""
        return {name: Value.mean(by_batch(measure, batch_size, x, conditions)) for name, x in pictures.items()}

    if kind == "sketch":
        edges = {"edges": "dark lines of the picture, ink of the drawing"}
        within = edges | {"tolerance_pixels": TOLERANCE}
        return [
            Figure("edge F1", "higher", each(lambda x, c: line_scores(c, x).f1), within),
            Figure("edge precision", "higher", each(lambda x, c: line_scores(c, x).precision), within),
            Figure("edge recall", "higher", each(lambda x, c: line_scores(c, x).recall), within),
            Figure("edge SSIM", "higher", each(lambda x, c: ssim(dark_lines(x), c)), edges | _WINDOW),
        ]
    if kind == "style":
        distance = {"of": "the condition's colours and the picture's", "distance": "sliced Wasserstein-1 in CIELAB"}
        values = each(lambda x, c: palette_distance((x + 1) / 2, c[:, :3]))
        return [Figure("palette distance, ΔE", "lower", values, distance)]
    if kind not in ("segmentation", "layout") or not palette:
        return []
    classes = len(palette)
    wanted = nearest_labels(conditions, palette)
    found = {
        name: by_batch(lambda x: nearest_labels((x + 1) / 2, palette), batch_size, images)
        for name, images in pictures.items()
    }
    labels = {"labels": "nearest colour of the palette", "classes": classes}
    if kind == "segmentation":
        return [Figure("mIoU", "higher", {k: Value(mean_iou(wanted, x, classes)) for k, x in found.items()}, labels)]
    boxes = class_boxes(wanted, classes)
    ious = {name: box_iou(boxes, class_boxes(x, classes)).nanmean(1) for name, x in found.items()}
    return [Figure("box IoU", "higher", {name: Value.mean(iou) for name, iou in ious.items()}, labels)]


def paired(pictures: Pictures, settings: MeasureSettings) -> list[Figure]:
    """Picture by picture, against the real ones."""

    def each(measure: Callable[..., torch.Tensor]) -> dict[str, Value]:
        """Of a measure of pictures in [0, 1]."""
        return {
            name: Value.mean(
                by_batch(lambda x, y: measure((x + 1) / 2, (y + 1) / 2), settings.batch_size, images, pictures[REAL])
            )
            for name, images in pictures.items()
            if name != REAL
        }

    figures = [Figure("PSNR, dB", "higher", each(psnr)), Figure("SSIM", "higher", each(ssim), _WINDOW)]
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
        Figure(kernel, "lower", {kind: Value(distance.mean) for kind, distance in kd.items()}, protocol | subsets),
    ]
    return figures, few_pictures(min(counts.values()))


def by_batch(measure: Callable[..., torch.Tensor], size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """A measure of tensors (N, …), so many at once; bytes become pictures in [-1, 1]."""
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([measure(*(as_floats(part) for part in batch)) for batch in parts])


def as_floats(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes as [-1, 1]; anything else as it is."""
    return tensor.float() / 127.5 - 1 if tensor.dtype == torch.uint8 else tensor


def as_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as bytes."""
    return ((pictures + 1) * 127.5).round().to(torch.uint8)


_WINDOW = {"window": "Gaussian, 11 pixels, sigma 1.5"}
