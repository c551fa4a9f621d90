"""Pictures → figures: every measure applied to each column of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from powersteer.backbones.load import source_of
from powersteer.conditions.extractors.extractor import EXTRACTORS, Extractor
from powersteer.core.files import is_file
from powersteer.evaluation.distribution import few_pictures, frechet_distance, kernel_distance
from powersteer.evaluation.features import Clip, FeatureExtractor, load_features
from powersteer.evaluation.fidelity import (
    box_iou,
    class_boxes,
    extract,
    extracted_labels,
    mean_iou,
    nearest_labels,
    palette_distance,
)
from powersteer.evaluation.figures import REAL, Figure, Value
from powersteer.evaluation.lines import TOLERANCE, dark_lines, ink_scores, line_scores
from powersteer.evaluation.paired import lpips, psnr, ssim
from powersteer.evaluation.settings import MeasureSettings

Pictures = Mapping[str, torch.Tensor]
"""The pictures of each column, (N, 3, H, W), uint8: a quarter of the memory of floats."""


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
    """The extractor that was asked for, of the condition's kind; of a layout's labels, segmentation's."""
    if settings.extractor is None:
        return None
    import_module("powersteer.conditions.extractors.catalogue")  # registers them all
    task: Any = "segmentation" if kind == "layout" else kind
    registered = EXTRACTORS.find(task, settings.extractor)
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

    def each(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, Value]:
        """The mean, for each column, of a measure of pictures in [-1, 1] and conditions."""
        return {name: Value.mean(by_batch(measure, batch_size, x, conditions)) for name, x in pictures.items()}

    seen = {} if extractor is None else {"extractor": dict(extractor.record())}
    if kind == "sketch":

        def scores(images: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
            if extractor is None:
                lines, agreement = dark_lines(images), line_scores(drawings, images)
            else:
                lines = extract(extractor, images)
                agreement = ink_scores(drawings, lines)
            columns = (agreement.f1, agreement.precision, agreement.recall, ssim(lines, drawings))
            return torch.stack(columns, 1).double()  # (N, 4)

        table = {name: by_batch(scores, batch_size, images, conditions) for name, images in pictures.items()}
        edges = {"edges": "ink of the extractor's drawing" if seen else "dark lines", **seen}
        within = edges | {"tolerance_pixels": TOLERANCE}
        names = {"edge F1": within, "edge precision": within, "edge recall": within, "edge SSIM": edges | _WINDOW}
        return [
            Figure(name, "higher", {kind: Value.mean(of_one[:, i]) for kind, of_one in table.items()}, protocol)
            for i, (name, protocol) in enumerate(names.items())
        ]
    if kind == "style":
        distance = {"of": "the condition's colours and the picture's", "distance": "sliced Wasserstein-1 in CIELAB"}
        values = each(lambda x, c: palette_distance((x + 1) / 2, c[:, :3]))
        return [Figure("palette distance, ΔE", "lower", values, distance)]
    if kind not in ("segmentation", "layout") or not palette:
        return []
    classes = len(palette)
    wanted = nearest_labels(conditions, palette)

    def labels_of(images: torch.Tensor) -> torch.Tensor:
        if extractor is None:
            return nearest_labels((images + 1) / 2, palette)
        return extracted_labels(extractor, images, palette)

    found = {name: by_batch(labels_of, batch_size, images) for name, images in pictures.items()}
    labels = {"labels": "the extractor's" if seen else "nearest colour of the palette", "classes": classes, **seen}
    if kind == "segmentation":
        return [Figure("mIoU", "higher", {k: Value(mean_iou(wanted, x, classes)) for k, x in found.items()}, labels)]
    boxes = class_boxes(wanted, classes)
    ious = {name: box_iou(boxes, class_boxes(x, classes)).nanmean(1) for name, x in found.items()}
    return [Figure("box IoU", "higher", {name: Value.mean(iou) for name, iou in ious.items()}, labels)]


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
        Figure(kernel, "lower", {kind: Value(one.mean, one.spread) for kind, one in kd.items()}, protocol | subsets),
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
