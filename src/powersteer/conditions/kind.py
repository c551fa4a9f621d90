"""What a kind of condition is. Whoever must know asks the `Kind`; no other module looks at its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image

from powersteer.conditions.agreement import Agreement, Pictures
from powersteer.conditions.arrays import FEATURE_SUFFIX, map_values, picture_or_values, pixel_values
from powersteer.conditions.discovery import import_modules
from powersteer.conditions.extractor import Extractor
from powersteer.conditions.layers import on_paper
from powersteer.core.errors import PowersteerError

Fit = Literal["pad", "crop"]
"""How a picture of another shape comes to a size: whole, on paper; or scaled to cover it and cropped."""
INK = "ink 1 on 0"
PAPER = "ink 0 on 1"
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""PIL mode of a condition of so many channels; RGBA holds colour, and structure in alpha."""
_SAID = {1: "1 (grey)", 3: "3 (RGB)", 4: "4 (RGBA: colour and structure)"}
UNRECORDED = ""
"""Name of the kind of adapters that do not say theirs."""
BLIND = "blind"
"""Key of a network's conditioning record: the network is shown empty conditions, in training and ever after. What it
gains all the same, it owes to the pictures it was trained on, not to the condition."""
_MODULES = "powersteer.conditions.kinds"


@dataclass(frozen=True)
class Kind:
    """A kind of condition. As it stands it is a plain picture; other kinds set fields, or override methods.

    A new kind is one module in `powersteer.conditions.kinds`, which adds it to `KINDS`.
    """

    name: str
    channels: tuple[int, ...] | None = tuple(PIL_MODES)
    """Channel counts that its conditions may have, the default first; None for any count."""
    polarity: str | None = None
    """What its values mean, such as ``ink 1 on 0``."""
    paper: str = "black"
    """Colour of what is blank: behind transparent pixels, and around a padded picture."""
    resampling: Image.Resampling = Image.Resampling.LANCZOS
    """How its pictures are scaled. Label maps take the nearest pixel: a mixture of two labels means nothing."""
    line_art: bool = False
    """Whether it is ink on paper, most of it paper: people draw it dark on light, pictures show it as dark lines."""
    at_latents: bool = False
    """Whether it is no picture, but a map (C, h, w) of any finite numbers, at the latents' size."""
    seen_as: str | None = None
    """The kind whose extractors find it in pictures; itself by default."""

    def record(self) -> dict[str, Any]:
        """Kind, value range, polarity and palette, as `BPSModel` keeps them in ``conditioning``."""
        bounds = None if self.at_latents else [0, 1]
        return {"kind": self.name, "range": bounds, "polarity": self.polarity, "palette": None}

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of its files beside those of pictures."""
        return (FEATURE_SUFFIX,) if self.at_latents else ()

    def check_channels(self, channels: int | None) -> int:
        """The channels of its conditions: those given, else the default.

        Raises:
            PowersteerError: It has no such conditions, or no default.
        """
        if self.channels is None:
            if channels is None:
                raise PowersteerError(f"{self.name} maps need conditioning_channels: give their channel count")
            return channels
        channels = channels or self.channels[0]
        if channels not in self.channels:
            *most, last = (_SAID.get(count, str(count)) for count in self.channels)
            allowed = f"{', '.join(most)} or {last}" if most else last
            raise PowersteerError(
                f"conditioning_channels must be {allowed} for {self.name}, not {channels}; only feature maps "
                "(conditioning_kind=feature) have others"
            )
        return channels

    def mode(self, channels: int) -> str | None:
        """PIL mode of a condition; None where it is a map of numbers, which no picture holds."""
        return None if self.at_latents else PIL_MODES.get(channels)

    def as_condition(self, picture: Image.Image, channels: int, where: str) -> Image.Image:
        """A picture as a condition, ink and labels as they are; what is transparent is paper.

        Args:
            picture: Any 8-bit picture.
            channels: 1, 3 or 4.
            where: Its name, for messages.

        Returns:
            Mode L, RGB or RGBA.

        Raises:
            PowersteerError: Four channels are wanted, and it has no alpha channel.
        """
        if channels == 4:
            if not picture.has_transparency_data:
                raise PowersteerError(
                    f"{where} has no alpha channel: a condition of 4 channels is colour in RGB and structure in alpha"
                )
            return picture.convert("RGBA")
        if channels == 3:
            return on_paper(picture, self.paper)
        return (on_paper(picture, self.paper) if picture.has_transparency_data else picture).convert("L")

    def from_user(self, picture: Image.Image, channels: int, where: str) -> tuple[Image.Image, bool]:
        """A picture that a user gives to generate from; and whether it had to be inverted. See `as_condition`."""
        return self.as_condition(picture, channels, where), False

    def fit(self, channels: int) -> Fit:
        """How a user's picture of another shape comes to the size, where nothing else must lie on it."""
        return "crop"

    def to_tensor(self, one: Any, channels: int) -> torch.Tensor:
        """A PIL picture or an array as a condition (C, H, W), float32; see `powersteer.conditions.to_condition`.

        Raises:
            PowersteerError: It is neither, or no condition of so many channels.
        """
        if self.mode(channels) is None:
            return map_values(one, channels)
        found = picture_or_values(one, channels)
        if isinstance(found, Image.Image):
            return pixel_values(self.as_condition(found, channels, "the condition"))
        return found

    def to_picture(self, condition: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A condition (C, H, W) to look at: (3, height, width) in [-1, 1].

        Structure is drawn as ink over its colours; of a map of numbers, the mean over the channels, dark to light.
        """
        if self.mode(len(condition)) is None:
            mean = condition.mean(0, keepdim=True)
            shown = ((mean - mean.min()) / (mean.max() - mean.min()).clamp_min(1e-12)).expand(3, -1, -1)
        elif len(condition) == 4:
            shown = condition[:3] * (1 - condition[3:])
        else:
            shown = condition.expand(3, -1, -1)
        return F.interpolate(shown[None].float(), size, mode="nearest")[0].clamp(0, 1) * 2 - 1

    def warnings(self, conditions: torch.Tensor, *, may_be_blank: bool = False) -> list[str]:
        """What is probably not meant.

        Args:
            conditions: (N, C, H, W), as the adapter reads them.
            may_be_blank: Say nothing of blank ones.
        """
        flat = conditions.flatten(1)
        blank = int((flat.amin(1) == flat.amax(1)).sum())
        if blank and not may_be_blank:
            which = f"{blank} of {len(conditions)} conditions are" if len(conditions) > 1 else "the condition is"
            return [f"{which} blank, one value all over: is the drawing lost, dark on black or transparent?"]
        ink = conditions.mean().item()
        if self.line_art and ink > 0.5:
            return [f"{ink:.0%} of the {self.name} is ink, which is 1 on 0: is it inverted?"]
        return []

    def fidelity(
        self,
        pictures: Pictures,
        conditions: torch.Tensor,
        *,
        palette: Mapping[str, Sequence[int]],
        extractor: Extractor | None = None,
        batch_size: int = 20,
    ) -> list[Agreement]:
        """How well pictures keep to their conditions; nothing for a kind that has no measure.

        Args:
            pictures: By column, (N, 3, H, W), uint8.
            conditions: (N, C, H, W), one for each picture of a column.
            palette: RGB of each class, of label maps.
            extractor: Finds the condition in pictures, in place of the kind's own way.
            batch_size: Pictures measured at once.
        """
        return []


@dataclass
class Kinds:
    """The kinds by name."""

    known: dict[str, Kind] = field(default_factory=dict[str, Kind])

    def add(self, kind: Kind) -> None:
        """Make a kind known under its name.

        Raises:
            PowersteerError: Another one has that name.
        """
        if kind.name in self.known:
            raise PowersteerError(f"there are two kinds of condition named '{kind.name}': rename one")
        self.known[kind.name] = kind

    def find(self, name: str | None) -> Kind:
        """The kind of a name; a plain picture of that name where none is known.

        Args:
            name: None where an adapter or a data set does not say its kind.
        """
        import_modules(_MODULES)
        name = name or UNRECORDED
        return self.known.get(name) or Kind(name)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of conditions' files beside those of pictures."""
        import_modules(_MODULES)
        return tuple(dict.fromkeys(suffix for kind in self.known.values() for suffix in kind.suffixes))


KINDS = Kinds()
"""Filled by the modules of `powersteer.conditions.kinds`."""


def extractor_record(
    kind: str,
    extractor: str,
    *,
    version: str,
    settings: Mapping[str, Any],
    channels: int | None,
    extracted_polarity: str | None = None,
    palette: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`Kind.record` of what an extractor makes, and how it was made.

    Args:
        kind: The task.
        extractor: Its name.
        version: Of the package or weights that the result depends on.
        settings: Plain values.
        channels: Of its conditions; None where that depends on the data.
        extracted_polarity: What it gave before it was turned into the kind's own polarity.
        palette: Name → colour of label maps.
    """
    return KINDS.find(kind).record() | {
        "channels": channels,
        "extractor": extractor,
        "version": version,
        "settings": dict(settings),
        "extracted_polarity": extracted_polarity,
        "palette": None if palette is None else dict(palette),
    }
