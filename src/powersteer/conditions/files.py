"""A file of a person → the condition that an adapter reads."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from powersteer.conditions.kinds import FEATURE, FEATURE_SUFFIX, LABEL_MAPS
from powersteer.conditions.sketch import open_picture, sketch_condition
from powersteer.conditions.tensors import PIL_MODES, read_features, resized, to_condition
from powersteer.errors import PowersteerError


def check_condition(file: Path) -> None:
    """Refuse what is neither a picture nor a feature map.

    Raises:
        PowersteerError: It cannot be read.
    """
    if file.suffix.lower() == FEATURE_SUFFIX:
        read_features(_content(file), str(file))
    else:
        open_picture(file)


def read_condition(
    file: Path, channels: int, kind: str | None, size: tuple[int, int], *, prepared: bool = False
) -> tuple[torch.Tensor, bool]:
    """A file as a condition (C, H, W); and whether it was a sketch that had to be inverted.

    A sketch is fitted into the size and padded with its paper, unless it is ``prepared``. Any other picture is scaled
    to cover it and cropped, as in training: label maps without interpolation, colour and structure of a style each for
    itself. Features must have the size.

    Args:
        file: A picture, or a ``.npy`` (C, H, W).
        channels: The channels that the network reads.
        kind: Of the network's condition; None for a network that does not say, where one channel is a sketch.
        size: (height, width): pixels, or of features.
        prepared: It is the condition of a training pair: a sketch's ink is 1 on 0, and it is cropped as in training.

    Raises:
        PowersteerError: It cannot be read, or is not what the network reads.
    """
    height, width = size
    if file.suffix.lower() == FEATURE_SUFFIX:
        features = torch.from_numpy(read_features(_content(file), str(file))).float()
        if tuple(features.shape) != (channels, height, width):
            raise PowersteerError(f"{file} has shape {tuple(features.shape)}, not {(channels, height, width)}")
        return features, False
    if kind == FEATURE or channels not in PIL_MODES:
        raise PowersteerError(f"the adapter reads feature maps of {channels} channels: give a {FEATURE_SUFFIX}")
    if channels == 1 and kind in ("sketch", None) and not prepared:
        sketch, inverted = sketch_condition(open_picture(file), size)
        return to_condition(sketch, channels)[0], inverted
    # What is transparent has no label; the alpha of a style is its structure.
    paper = None if channels == 4 else "black" if kind in LABEL_MAPS or (prepared and channels == 1) else "white"
    picture = open_picture(file, paper).convert(PIL_MODES[channels])
    resampling = Image.Resampling.NEAREST if kind in LABEL_MAPS else Image.Resampling.LANCZOS
    share = min(picture.width / width, picture.height / height)
    left, top = (picture.width - share * width) / 2, (picture.height - share * height) / 2
    box = (left, top, left + share * width, top + share * height)
    return to_condition(resized(picture, (width, height), resampling, box), channels)[0], False


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise PowersteerError(f"{file} does not exist") from None
    except OSError as error:
        raise PowersteerError(f"{file} cannot be read: {error.strerror}") from None
