"""One folder of pictures beside another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.conditions.sketch import open_picture
from powersteer.core.errors import PowersteerError
from powersteer.core.pictures import as_bytes, as_floats, from_pil
from powersteer.data.layouts import LAYOUTS, PICTURE_SUFFIXES, read_rows
from powersteer.data.pairs import Size, cropped
from powersteer.data.rows import Picture
from powersteer.denoising.sampling.files import pictures_of
from powersteer.evaluation.features import FeatureExtractor
from powersteer.evaluation.figures import GENERATED, REAL, Evaluation, Figure, Value, environment
from powersteer.evaluation.measures import (
    distances,
    load_clip_of,
    load_extractors,
    paired,
)
from powersteer.evaluation.settings import MeasureSettings

Opened = Mapping[str, Callable[[], torch.Tensor]]
"""Pictures by name, each read (3, H, W), uint8, when it is asked for."""


def evaluate_folders(real: Path, generated: Path, settings: MeasureSettings) -> Evaluation:
    """Distances between two folders; where both have the same names and sizes, figures picture by picture too.

    Args:
        real: A folder of pictures, of any sizes; or a folder of pairs, whose pictures are cropped as in training to the
            size of the first generated one.
        generated: A folder of pictures; of one that `generate` wrote, the grid does not count.
        settings: How they are measured; without a CLIP of its own, by that of the embedded base.

    Raises:
        PowersteerError: A folder is missing or has no pictures, a picture cannot be read, or weights or a package that
            a measure needs are not there.
    """
    made = _pictures(generated)
    height, width = next(iter(made.values()))().shape[-2:]
    pictures = {REAL: _real(real, (height, width)), GENERATED: made}
    figures: list[Figure] = []
    warnings: list[str] = []
    for name, extractor in load_extractors(settings, load_clip_of(settings, EMBEDDED_BASE)).items():
        features = {kind: _features(extractor, part, settings.batch_size) for kind, part in pictures.items()}
        of_one, warning = distances(name, extractor.record(), features[REAL], {GENERATED: features[GENERATED]})
        figures += of_one
        if warning is not None and warning not in warnings:
            warnings.append(warning)
    unlike = _first_without_partner(list(pictures[REAL]), list(made))
    if unlike is None:
        in_pairs = _picture_by_picture(list(pictures[REAL].values()), list(made.values()), settings)
        unlike = None if in_pairs else "some have another size than their partner"
        figures += in_pairs
    if unlike is not None:
        warnings.append(f"no figures picture by picture: {unlike}")
    provenance = {
        **{
            kind: {"folder": str(folder), "pictures": len(pictures[kind])}
            for kind, folder in ((REAL, real), (GENERATED, generated))
        },
        **environment("cpu"),
    }
    return Evaluation(figures, settings.model_dump(mode="json"), provenance, warnings)


def _first_without_partner(real: Sequence[str], made: Sequence[str]) -> str | None:
    """Why pictures of two folders do not pair by their names, if they do not."""
    names, others = [Path(name).stem for name in real], [Path(name).stem for name in made]
    if names == others:
        return None
    alone = next((name for name in names if name not in set(others)), None)
    side = "generated" if alone is not None else "real"
    alone = alone or next((name for name in others if name not in set(names)), names[0])
    return f"{len(names)} real and {len(others)} generated pictures, and no one of the {side} ones is named '{alone}'"


def _picture_by_picture(
    real: Sequence[Callable[[], torch.Tensor]],
    generated: Sequence[Callable[[], torch.Tensor]],
    settings: MeasureSettings,
) -> list[Figure]:
    """One pair at a time: sizes may differ from pair to pair. Nothing where they differ within one."""
    rows: list[list[Figure]] = []
    for one, other in zip(real, generated, strict=True):
        pictures = {REAL: one()[None], GENERATED: other()[None]}
        if pictures[REAL].shape != pictures[GENERATED].shape:
            return []
        rows.append(paired(pictures, settings))
    figures: list[Figure] = []
    for of_each in zip(*rows, strict=True):
        values = torch.tensor([figure.values[GENERATED].value for figure in of_each])
        figure = Figure(of_each[0].name, of_each[0].better, {GENERATED: Value.mean(values)}, of_each[0].protocol)
        figures.append(figure.under({"pictures": len(rows)}))
    return figures


def _real(folder: Path, size: Size) -> Opened:
    """The pictures of a folder as they are; those of a folder of pairs cropped to a size (height, width)."""
    if _files(folder) or not any(layout.fits(folder) for layout in LAYOUTS):
        return _pictures(folder)
    rows = read_rows(folder)
    return {str(i): partial(_cropped, row.image, size) for i, row in enumerate(rows)}


def _pictures(folder: Path) -> Opened:
    files = _files(folder)
    if not files:
        raise PowersteerError(f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return {file.name: partial(_open, file) for file in files}


def _files(folder: Path) -> list[Path]:
    """The pictures of a folder; of what `generate` wrote, without the grid."""
    if not folder.is_dir():
        raise PowersteerError(f"{folder} is no folder: give one with pictures")
    pictures = [file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES]
    return pictures_of(folder) or sorted(pictures)


def _open(file: Path) -> torch.Tensor:
    return as_bytes(from_pil(open_picture(file)))


def _cropped(picture: Picture, size: Size) -> torch.Tensor:
    return as_bytes(cropped(picture.picture(), size))


def _features(extractor: FeatureExtractor, pictures: Opened, size: int) -> torch.Tensor:
    """Features (N, D); neighbours of one size are looked at together."""
    features: list[torch.Tensor] = []
    batch: list[torch.Tensor] = []
    for opened in pictures.values():
        picture = opened()
        if batch and (len(batch) == size or batch[0].shape != picture.shape):
            features.append(extractor(as_floats(torch.stack(batch))))
            batch = []
        batch.append(picture)
    return torch.cat([*features, extractor(as_floats(torch.stack(batch)))])
