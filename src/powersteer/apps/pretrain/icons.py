"""Stage 1, data: coloured icon sets from npm, or folders, drawn on white, captioned, split by name."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from rich.progress import track
from safetensors.torch import save_file

from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.core.files import write_whole
from powersteer.core.text import json_lines, parse_object, read_object, read_text
from powersteer.core.weights import read_tensors
from powersteer.data.pairs import Pairs
from powersteer.data.prepare.openmoji import plain_name
from powersteer.data.prepare.svg import Rasteriser
from powersteer.data.prepare.workers import available, in_processes

Drawn = np.ndarray[Any, Any]
"""(3, H, W) uint8."""

FEW = 200
"""Pictures that one process draws as fast as several."""

_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_SKIN_TONE_SLUG = re.compile(r"skin-tone|-tone\d|-(medium-)?(light|medium|dark)(-(medium-)?(light|medium|dark))*$")
_NOT_MIRRORED = re.compile(
    r"\d|clock|thirty|watch|timer|letter|button|keycap|left|right|arrow|flag|input|sign|squared|circled|number|"
    r"calendar|news|book|scroll|abc|text|mark|symbol|note|music|name|logo|playing|mahjong|map|keyboard|currency|"
    r"banknote|yen|dollar|euro|pound|degree|percent|hundred|soon|back$|end$|on!|top$|cool|free|new$|sos|vs|ok "
)


class IconSource(StrictConfig):
    """One npm package of icons in Iconify's format, or a folder of captioned pictures."""

    package: str | None = None
    """npm package, with its version: ``@iconify-json/noto@1.2.9``."""
    folder: Path | None = None
    """Folder of pictures with captions, in any layout that training reads; conditions are ignored."""
    style: str = Field(min_length=1)
    """Word for this set in captions."""
    use: Literal["all", "codec"] = "all"
    """``codec``: only the VAE sees its pictures, and the text encoder its names (outlined user-interface icons)."""
    squashed_names: bool = False
    """Split names that have no word breaks; icons whose name no other source can split are left out."""
    stroke_width: float | None = None
    """Redraw strokes at this width, in the icon's units."""
    recolour: str | None = None
    """Replace this fill colour by a random one for each icon."""

    @model_validator(mode="after")
    def _one_place(self) -> IconSource:
        if (self.package is None) == (self.folder is None):
            raise ValueError("give either package or folder")
        return self


class DataConfig(StrictConfig):
    """Where the pictures come from, and which are held out."""

    sources: list[IconSource] = Field(min_length=1)
    resolution: int = Field(default=64, ge=16, le=1024)
    """Side of every picture, in pixels."""
    held_out_per_mille: int = Field(default=50, ge=1, le=500)
    """Number of names in a thousand to hold out, the same in every source."""
    exclude_categories: tuple[str, ...] = ("Flags", "Modifiers")
    """Categories of icons to leave out."""


@dataclass(frozen=True)
class Icon:
    """One picture: what it shows, in whose style, and how it may be used."""

    name: str
    style: str
    use: str
    mirrored: bool
    """Whether the mirror image means the same."""
    held_out: bool


@dataclass(frozen=True)
class IconSet:
    """All pictures, (N, 3, H, W) uint8, with a row of `Icon` each."""

    pixels: torch.Tensor
    icons: list[Icon]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.pixels.shape[-1]

    def to(self, device: torch.device) -> IconSet:
        """The same, its pictures on a device."""
        return IconSet(self.pixels.to(device), self.icons)

    def select(self, *, use: str | None = None, held_out: bool) -> torch.Tensor:
        """Indices (n,) of one split, of one use."""
        rows = [i for i, icon in enumerate(self.icons) if icon.held_out == held_out and use in (None, icon.use)]
        return torch.tensor(rows, device=self.pixels.device)

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, H, W) in [-1, 1]."""
        return self.pixels[indices].float() / 127.5 - 1


def build_icons(config: DataConfig, stage_dir: Path) -> None:
    """Fetch, draw and split the icon sets into ``stage_dir``; nothing is done when they are there already.

    Raises:
        PowersteerError: npm is missing, a package or folder cannot be fetched or read, or what is there was drawn by
            another recipe.
    """
    made_from = config.model_dump_json(indent=2)
    mark = stage_dir / "made-from.json"
    if mark.exists():
        if read_text(mark) != made_from:
            raise PowersteerError(f"the pictures in {stage_dir} were drawn by another recipe: give another output_dir")
        return
    stage_dir.mkdir(parents=True, exist_ok=True)
    icons: list[Icon] = []
    pictures: list[str | Drawn] = []
    notices: dict[str, Any] = {}
    for source in config.sources:
        notice: dict[str, Any] = {"use": source.use}
        if source.folder is not None:
            found = _captioned(source.folder, config.resolution)
        else:
            package = _fetch_package(str(source.package), stage_dir / "npm")
            notice |= _whose(package)
            slugs = _names(source, package, config.exclude_categories)
            found = [(name, _svg(source, package, slug)) for slug, name in slugs.items()]
        pictures += [picture for _, picture in found]
        icons += [_icon(config, source, name) for name, _ in found]
        notices[str(source.folder or source.package)] = {"pictures": len(found), **notice}
    pixels = _drawn(pictures, config.resolution)
    save_file({"pixels": torch.from_numpy(np.stack(pixels))}, stage_dir / "icons.safetensors")
    with (stage_dir / "icons.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(icon)) + "\n" for icon in icons)
    (stage_dir / "notices.json").write_text(json.dumps(notices, indent=2), encoding="utf-8")
    write_whole(mark, made_from.encode())


def fetch_icons(config: DataConfig, stage_dir: Path) -> list[Icon]:
    """Fetch the packages into ``stage_dir``; what they show, undrawn, in the order of `build_icons`.

    Raises:
        PowersteerError: npm is missing, or a package cannot be fetched.
    """
    icons: list[Icon] = []
    for source in config.sources:
        if source.package is not None:
            folder = _fetch_package(source.package, stage_dir / "npm")
            names = _names(source, folder, config.exclude_categories)
            icons += [_icon(config, source, name) for name in names.values()]
    return icons


def load_icons(stage_dir: Path) -> IconSet:
    """Read what `build_icons` wrote.

    Raises:
        PowersteerError: It is damaged.
    """
    listed, file = stage_dir / "icons.jsonl", stage_dir / "icons.safetensors"
    rows = json_lines(read_text(listed), str(listed))
    try:
        icons = [Icon(**parse_object(line, f"{listed}, line {number}")) for number, line in rows]
        pixels = read_tensors(file)["pixels"]
    except (KeyError, TypeError) as error:
        raise PowersteerError(f"{stage_dir} is damaged ({error}): remove it, and it is built anew") from None
    if len(pixels) != len(icons):
        raise PowersteerError(f"{file} holds {len(pixels)} pictures, {listed} {len(icons)}: remove both")
    return IconSet(pixels, icons)


def captions(name: str, style: str) -> list[str]:
    """Every caption a picture may go by: without the style, and with it."""
    return [name, f"a {name}", f"icon of {name}", f"{style} icon of {name}", f"{style} {name}"]


def is_held_out(name: str, per_mille: int) -> bool:
    """Whether a name is held out: decided by its hash, so the same for every source."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < per_mille


def _icon(config: DataConfig, source: IconSource, name: str) -> Icon:
    return Icon(
        name=name,
        style=source.style,
        use=source.use,
        mirrored=not _NOT_MIRRORED.search(name),
        held_out=is_held_out(name, config.held_out_per_mille),
    )


def _captioned(folder: Path, size: int) -> list[tuple[str, str | Drawn]]:
    """Names and pictures of a folder."""
    pairs = Pairs(folder, (size, size))
    pictures = ((pairs[i][0] + 1) * 127.5 for i in range(len(pairs)))
    shown = track(zip(pairs.texts, pictures, strict=True), str(folder), total=len(pairs))
    return [(name, picture.round().byte().numpy()) for name, picture in shown]


def _drawn(pictures: Sequence[str | Drawn], size: int) -> list[Drawn]:
    """Every SVG among the pictures drawn, on all cores."""
    svgs = [(place, picture) for place, picture in enumerate(pictures) if isinstance(picture, str)]
    made = in_processes(partial(Rasteriser, size), svgs, available() if len(svgs) > FEW else 1)
    by_place = dict(track(made, "drawing", total=len(svgs)))
    return [by_place[place] if isinstance(picture, str) else picture for place, picture in enumerate(pictures)]


def _whose(folder: Path) -> dict[str, Any]:
    """A package's author and licence."""
    info = read_object(folder / "info.json")
    return {"author": info["author"]["name"], "url": info["author"].get("url"), "licence": info["license"]["spdx"]}


def _fetch_package(package: str, npm_dir: Path) -> Path:
    name, _, version = package.rpartition("@")
    folder = npm_dir / "node_modules" / name
    if not (folder / "icons.json").exists() or _version_of(folder) != version:
        if shutil.which("npm") is None:
            raise PowersteerError(f"npm is needed to fetch {package}: install Node.js, or unpack it to {folder}")
        npm_dir.mkdir(parents=True, exist_ok=True)
        command = [
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
            str(npm_dir),
            package,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PowersteerError(f"npm could not install {package}: {done.stderr.strip()[-400:]}")
    return folder


def _version_of(folder: Path) -> str | None:
    return read_object(folder / "package.json").get("version") if (folder / "package.json").exists() else None


@functools.cache
def _icons_json(folder: Path) -> dict[str, Any]:
    return read_object(folder / "icons.json")


def _names(source: IconSource, folder: Path, exclude_categories: Sequence[str]) -> dict[str, str]:
    """Icon slug → the name people use for it, skin-tone variants and excluded categories left out."""
    characters: dict[str, str] = {}
    if (folder / "chars.json").exists():
        by_character = read_object(folder / "chars.json")
        characters = {slug: code for code, slug in by_character.items()}
    metadata = folder / "metadata.json"
    categories = read_object(metadata).get("categories", {}) if metadata.exists() else {}
    excluded = {slug for category in exclude_categories for slug in categories.get(category, [])}
    names: dict[str, str] = {}
    for slug in _icons_json(folder)["icons"]:
        code = characters.get(slug, "")
        skin_tone = _SKIN_TONES & set(code.split("-")) if code else _SKIN_TONE_SLUG.search(slug)
        if slug in excluded or skin_tone or slug.startswith(("flag-", "regional-indicator")):
            continue
        name = _emoji_names().get(_squash(re.sub(r"-\d+$", "", slug)))
        if name is None and source.squashed_names:
            continue
        names[slug] = name or re.sub(r"-\d+$", "", slug).replace("-", " ")
    return names


@functools.cache
def _emoji_names() -> dict[str, str]:
    """Squashed emoji name or alias → CLDR name, of every emoji but the skin-tone variants."""
    import emoji

    names: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if _SKIN_TONES & {f"{ord(part):x}" for part in character}:
            continue
        name = plain_name(entry["en"])
        for alias in entry.get("alias", []):
            names.setdefault(_squash(alias), name)
        names[_squash(entry["en"])] = name
    return names


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _svg(source: IconSource, folder: Path, slug: str) -> str:
    """One icon, fitted into a square."""
    sheet = _icons_json(folder)
    icon = sheet["icons"][slug]
    left, top = icon.get("left", sheet.get("left", 0)), icon.get("top", sheet.get("top", 0))
    width, height = icon.get("width", sheet.get("width", 16)), icon.get("height", sheet.get("height", 16))
    body: str = icon["body"]
    if source.stroke_width is not None:
        body = re.sub(r'stroke-width="[\d.]+"', f'stroke-width="{source.stroke_width}"', body)
    if source.recolour is not None:
        shade = int(hashlib.sha256(slug.encode()).hexdigest()[:6], 16)
        body = body.replace(source.recolour, f"#{shade:06x}")
    side = max(width, height)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}" '
        f'width="{side}" height="{side}">{body}</svg>'
    )
