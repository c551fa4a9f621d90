"""A file of a person → the condition that an adapter reads."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from powersteer.conditions.arrays import FEATURE_SUFFIX, pixel_values, read_features, resized
from powersteer.conditions.kind import KINDS, Fit
from powersteer.conditions.sketch import open_layers, padded
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes


def check_condition(file: Path) -> tuple[int, int] | None:
    """The size (width, height) of a picture; None of a feature map.

    Raises:
        PowersteerError: It is neither, or cannot be read.
    """
    if file.suffix.lower() == FEATURE_SUFFIX:
        read_features(read_bytes(file), str(file))
        return None
    return open_layers(file).size


def fit_of(channels: int, kind: str | None, *, prepared: bool) -> Fit:
    """How conditions of a kind are fitted where nothing else lies on them; those of training pairs as in training."""
    return "crop" if prepared else KINDS.find(kind).fit(channels)


def read_condition(
    file: Path,
    channels: int,
    kind: str | None,
    size: tuple[int, int],
    *,
    prepared: bool = False,
    fit: Fit | None = None,
) -> tuple[torch.Tensor, bool]:
    """A file as a condition (C, H, W); and whether it was a sketch that had to be inverted.

    Label maps are scaled without interpolation, colour and structure of a style each for itself. Features must have the
    size. What is transparent is 0; see `powersteer.conditions.layers`.

    Args:
        file: A picture, or a ``.npy`` (C, H, W).
        channels: The channels that the network reads.
        kind: Of the network's condition; None for a network that does not say, where one channel is a sketch.
        size: (height, width): pixels, or of features.
        prepared: It is the condition of a training pair: a sketch's ink is 1 on 0, and it is cropped as in training.
        fit: See `Fit`; `fit_of` by default.

    Raises:
        PowersteerError: It cannot be read, or is not what the network reads.
    """
    height, width = size
    if file.suffix.lower() == FEATURE_SUFFIX:
        features = torch.from_numpy(read_features(read_bytes(file), str(file))).float()
        if tuple(features.shape) != (channels, height, width):
            raise PowersteerError(f"{file} has shape {tuple(features.shape)}, not {(channels, height, width)}")
        return features, False
    found = KINDS.find(kind)
    if found.mode(channels) is None:
        raise PowersteerError(f"the adapter reads feature maps of {channels} channels: give a {FEATURE_SUFFIX}")
    layers = open_layers(file)
    if prepared:
        picture, inverted = found.as_condition(layers, channels, str(file)), False
    else:  # inverted first: the padding is paper, whatever its colour was
        picture, inverted = found.from_user(layers, channels, str(file))
    fit = fit or fit_of(channels, kind, prepared=prepared)
    return pixel_values(fitted(picture, size, fit, found.resampling, str(file), found.paper)), inverted


def fitted(
    picture: Image.Image,
    size: tuple[int, int],
    fit: Fit,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    where: str = "the picture",
    paper: str = "black",
) -> Image.Image:
    """A picture at a size (height, width).

    Args:
        picture: Any mode; colour and structure of RGBA are scaled each for itself.
        size: Pixels.
        fit: See `Fit`.
        resampling: Of the pixels.
        where: Its name, for messages.
        paper: Around what is padded.

    Raises:
        PowersteerError: It is too narrow to be padded.
    """
    height, width = size
    if fit == "pad":
        return padded(picture, size, paper, where)
    share = min(picture.width / width, picture.height / height)
    left, top = (picture.width - share * width) / 2, (picture.height - share * height) / 2
    return resized(picture, (width, height), resampling, (left, top, left + share * width, top + share * height))
