"""One folder of pictures beside another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from powersteer.base import EMBEDDED_BASE
from powersteer.conditions.sketch import open_picture
from powersteer.data.layouts import PICTURE_SUFFIXES
from powersteer.errors import PowersteerError
from powersteer.evaluation.features import FeatureExtractor
from powersteer.evaluation.figures import GENERATED, REAL, Evaluation, Figure, Value, environment
from powersteer.evaluation.measures import (
    MeasureSettings,
    as_bytes,
    as_floats,
    distances,
    load_clip_of,
    load_extractors,
    paired,
)
from powersteer.pictures import from_pil


def evaluate_folders(real: Path, generated: Path, settings: MeasureSettings) -> Evaluation:
    """Distances between two folders; where both have the same names and sizes, figures picture by picture too.

    Args:
        real: A folder of pictures, of any sizes.
        generated: Another.
        settings: How they are measured; without a CLIP of its own, by that of the embedded base.

    Raises:
        PowersteerError: A folder is missing or has no pictures, a picture cannot be read, or weights or a package that
            a measure needs are not there.
    """
    files = {REAL: _picture_files(real), GENERATED: _picture_files(generated)}
    figures: list[Figure] = []
    warnings: list[str] = []
    for name, extractor in load_extractors(settings, load_clip_of(settings, EMBEDDED_BASE)).items():
        features = {kind: _features(extractor, part, settings.batch_size) for kind, part in files.items()}
        of_one, warning = distances(name, extractor.record(), features[REAL], {GENERATED: features[GENERATED]})
        figures += of_one
        if warning is not None and warning not in warnings:
            warnings.append(warning)
    if [file.stem for file in files[REAL]] == [file.stem for file in files[GENERATED]]:
        figures += _picture_by_picture(files[REAL], files[GENERATED], settings)
    provenance = {
        **{
            kind: {"folder": str(folder), "pictures": len(files[kind])}
            for kind, folder in ((REAL, real), (GENERATED, generated))
        },
        **environment("cpu"),
    }
    return Evaluation(figures, settings.model_dump(mode="json"), provenance, warnings)


def _picture_by_picture(real: Sequence[Path], generated: Sequence[Path], settings: MeasureSettings) -> list[Figure]:
    """One pair at a time: sizes may differ from pair to pair. Nothing where they differ within one."""
    rows: list[list[Figure]] = []
    for one, other in zip(real, generated, strict=True):
        pictures = {REAL: _open(one)[None], GENERATED: _open(other)[None]}
        if pictures[REAL].shape != pictures[GENERATED].shape:
            return []
        rows.append(paired(pictures, settings))
    figures: list[Figure] = []
    for of_each in zip(*rows, strict=True):
        values = torch.tensor([figure.values[GENERATED].value for figure in of_each])
        figure = Figure(of_each[0].name, of_each[0].better, {GENERATED: Value.mean(values)}, of_each[0].protocol)
        figures.append(figure.under({"pictures": len(rows)}))
    return figures


def _picture_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PowersteerError(f"{folder} is no folder: give one with pictures")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise PowersteerError(f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return files


def _open(file: Path) -> torch.Tensor:
    return as_bytes(from_pil(open_picture(file)))


def _features(extractor: FeatureExtractor, files: Sequence[Path], size: int) -> torch.Tensor:
    """Features (N, D); neighbours of one size are looked at together."""
    features: list[torch.Tensor] = []
    batch: list[torch.Tensor] = []
    for file in files:
        picture = _open(file)
        if batch and (len(batch) == size or batch[0].shape != picture.shape):
            features.append(extractor(as_floats(torch.stack(batch))))
            batch = []
        batch.append(picture)
    return torch.cat([*features, extractor(as_floats(torch.stack(batch)))])
