"""The frozen base: by an embedded name, a folder, a name on the Hub, or one file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from powersteer.backbones.options import EMBEDDED_BASE
from powersteer.backbones.parts import (
    INDEX,
    SCHEDULER_CONFIG,
    check_fit,
    check_schedule,
    check_tokenizer,
    empty_network,
    load_parts,
    load_scheduler,
    load_tokenizer,
    quiet,
    read_index,
    stems,
)
from powersteer.backbones.single_file import SUFFIXES, SingleFile, check_config, load_networks, look_at
from powersteer.core.errors import PowersteerError
from powersteer.core.files import embedded, is_file, is_folder, reason_of
from powersteer.core.hub import CONFIG, fetch, fetch_weights
from powersteer.core.text import read_object
from powersteer.core.weights import check_sizes, filled, read_tensors, shown

_WANTED = f"give '{EMBEDDED_BASE}', a folder with a {INDEX}, a model of the Hub, or a .safetensors file"


@dataclass(frozen=True)
class Found:
    """Where a base lies."""

    folder: Path
    """Holds the configurations, tokenizers and scheduler; the weights, too, where there is no ``file``."""
    kinds: dict[str, type]
    """Classes of its parts; see `powersteer.backbones.parts.read_index`."""
    file: SingleFile | None = None
    """The one file with all weights."""


def source_of(name_or_path: str) -> str:
    """Where a base lies: the embedded folder, a folder, a file, or a name on the Hub."""
    path = embedded(name_or_path) if name_or_path == EMBEDDED_BASE else Path(name_or_path)
    return str(path) if is_folder(path) or is_file(path) else name_or_path


def load_base(
    name_or_path: str = EMBEDDED_BASE,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    revision: str | None = None,
    base_config: str | None = None,
) -> StableDiffusionPipeline:
    """A frozen text-to-image pipeline in evaluation mode.

    Args:
        name_or_path: ``powersteer-tiny``, a folder in diffusers' layout, a model of the Hub, or one ``.safetensors``
            file with all weights in LDM's names: Stable Diffusion 1.x, 2.x or XL, its inpainting, or InstructPix2Pix.
        dtype: Precision of the weights.
        variant: Weights that are taken before the plain ones, where a network has some: ``fp16``.
        revision: Branch, tag or commit of a model of the Hub.
        base_config: For one file: the folder in diffusers' layout, or the model of the Hub, that has its configuration,
            tokenizer and scheduler. By default the Hub's model of the family that the tensors tell. The pipeline has
            no safety checker then.

    Raises:
        PowersteerError: There is no such base, or a part of it is missing, incomplete, damaged or of another base.
    """
    try:
        found = find_base(name_or_path, variant=variant, revision=revision, base_config=base_config)
        if found.file is None:
            parts = load_parts(found.folder, found.kinds, dtype, variant)
        else:
            kept = {name: kind for name, kind in found.kinds.items() if name.startswith(("tokenizer", "scheduler"))}
            parts = load_parts(found.folder, kept, dtype) | load_networks(found.file, found.folder, found.kinds, dtype)
        check_fit(parts, found.folder)
        pipe = _assembled(found, parts)
    except PowersteerError as error:
        raise PowersteerError(f"cannot load the base '{name_or_path}': {error}") from None
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_configs(
    name_or_path: str, *, variant: str | None = None, revision: str | None = None, base_config: str | None = None
) -> dict[str, dict[str, Any]]:
    """What a base's networks and scheduler say of themselves, by part; weights are neither read nor fetched.

    Args:
        name_or_path: See `load_base`.
        variant: See `load_base`.
        revision: See `load_base`.
        base_config: See `load_base`.

    Raises:
        PowersteerError: There is no such base, or a configuration is missing, or no such network's.
    """
    return _described(name_or_path, variant, revision, base_config)[1]


def imagine_base(
    name_or_path: str = EMBEDDED_BASE,
    *,
    variant: str | None = None,
    revision: str | None = None,
    base_config: str | None = None,
) -> Any:
    """A base whose networks have every shape and no weights: those are neither read nor fetched.

    Args:
        name_or_path: See `load_base`.
        variant: See `load_base`.
        revision: See `load_base`.
        base_config: See `load_base`.

    Returns:
        What `powersteer.backbones.protocol.base_of` asks of a pipeline, but for the tokenizers.

    Raises:
        PowersteerError: As `base_configs`, or a configuration describes no network.
    """
    found, configs = _described(name_or_path, variant, revision, base_config)
    networks = configs.keys() - {"scheduler"}
    try:
        parts = {part: empty_network(found.folder / part, found.kinds[part]) for part in networks}
        parts["scheduler"] = load_scheduler(found.folder / "scheduler", found.kinds["scheduler"])
    except PowersteerError as error:
        raise PowersteerError(f"cannot read the base '{name_or_path}': {error}") from None
    return SimpleNamespace(**parts, vae_scale_factor=2 ** (len(configs["vae"]["block_out_channels"]) - 1))


def _described(
    name: str, variant: str | None, revision: str | None, base_config: str | None
) -> tuple[Found, dict[str, dict[str, Any]]]:
    """Where a base lies, and what `base_configs` gives."""
    try:
        found = find_base(name, variant=variant, revision=revision, base_config=base_config, weights=False)
        networks = [part for part, kind in found.kinds.items() if issubclass(kind, torch.nn.Module)]
        if found.file is not None:
            networks = [part for part in networks if part in found.file.prefixes()]
        files = {part: found.folder / part / CONFIG for part in networks}
        files["scheduler"] = found.folder / "scheduler" / SCHEDULER_CONFIG
        configs = {part: read_object(file) for part, file in files.items()}
        for part in networks:
            check_sizes(configs[part], str(files[part]))
        check_schedule(configs["scheduler"], files["scheduler"])
    except PowersteerError as error:
        raise PowersteerError(f"cannot read the base '{name}': {error}") from None
    return found, configs


def find_base(
    name: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    base_config: str | None = None,
    weights: bool = True,
) -> Found:
    """Where a base lies, of the Hub once fetched; a look at what it is comes before its weights.

    Args:
        name: See `load_base`.
        variant: See `load_base`.
        revision: See `load_base`.
        base_config: See `load_base`.
        weights: Fetch them, too.

    Raises:
        PowersteerError: There is no such base, or an argument is not for it.
    """
    path = Path(source_of(name))
    if is_file(path):
        if variant is not None or revision is not None:
            raise PowersteerError("`variant` and `revision` are for folders and models of the Hub: it is one file")
        return _find_config(look_at(path), base_config)
    if base_config is not None:
        raise PowersteerError("`base_config` is for a base in one file: leave it out")
    if variant is not None and not re.fullmatch(r"\w[\w-]*", variant):
        raise PowersteerError(f"`variant` is a part of the files' names, such as fp16, not '{shown(variant)}'")
    if is_folder(path):
        if revision is not None:
            raise PowersteerError("`revision` is for a model of the Hub: it is a folder here")
        if not is_file(path / INDEX):
            raise PowersteerError(_WANTED)
        return Found(path, read_index(path / INDEX))
    if path.suffix in SUFFIXES:
        raise PowersteerError("there is no such file")
    return _fetched(name, variant, revision, weights=weights)


def _fetched(name: str, variant: str | None, revision: str | None, *, weights: bool) -> Found:
    """A base of the Hub: its parts alone, each with one set of weights."""
    folder = fetch(name, INDEX, revision=revision)
    if not is_file(folder / INDEX):
        raise PowersteerError(_WANTED)
    kinds = read_index(folder / INDEX)
    networks = {part: stems(kind) for part, kind in kinds.items() if issubclass(kind, torch.nn.Module)}
    others = [f"{part}/*{suffix}" for part in kinds for suffix in (".json", ".txt", ".model")]
    if weights:
        folder = fetch_weights(name, networks, INDEX, *others, variant=variant, revision=revision)
    else:
        folder = fetch(name, INDEX, *others, revision=revision)
    return Found(folder, kinds)


def _find_config(file: SingleFile, base_config: str | None) -> Found:
    """The configuration of a base in one file; one that is not given is the Hub's of its family."""
    name = base_config or file.family.configs.get(file.channels)
    if name is None:
        raise PowersteerError(
            f"the file is {file.title}, and its tensors do not tell whether it predicts ε or v: give `base_config`, a "
            "folder in diffusers' layout or a model of the Hub, whose scheduler tells"
        )
    try:
        if is_file(Path(name)):
            raise PowersteerError("it is a file, not a folder in diffusers' layout")
        found = find_base(name, weights=False)
        check_config(file, found.folder, found.kinds)
    except PowersteerError as error:
        hint = (
            ""
            if base_config
            else ": give `base_config`, a folder in diffusers' layout or a model of the Hub of this family"
        )
        raise PowersteerError(
            f"the file is {file.title}; its configuration '{name}' does not serve ({error}){hint}"
        ) from None
    return Found(found.folder, found.kinds, file)


def _assembled(found: Found, parts: Mapping[str, Any]) -> Any:
    absent = dict.fromkeys(found.kinds.keys() - parts.keys())
    try:
        with quiet():
            return DiffusionPipeline.from_pretrained(str(found.folder), **parts, **absent)
    except Exception as error:  # the pipeline's own checks of its parts and options
        raise PowersteerError(f"its parts make no pipeline ({reason_of(error)})") from None


def load_clip(base: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The small CLIP that came with the base: its picture tower serves as a text-image metric.

    Its text tower is the base's text encoder, so ``clip/`` holds only the rest.

    Raises:
        PowersteerError: A file is missing, damaged, or of another CLIP.
    """
    folder = base / "clip"
    config = read_object(folder / CONFIG)
    check_sizes(config, str(folder / CONFIG))
    weights = read_tensors(folder / "model.safetensors")
    text = read_tensors(base / "text_encoder" / "model.safetensors")
    prefix = "" if any(name.startswith("text_model.") for name in text) else "text_model."
    weights |= {f"{prefix}{name}": tensor for name, tensor in text.items()}
    clip = filled(lambda: CLIPModel(CLIPConfig.from_dict(config)), weights, str(folder))
    tokenizer = load_tokenizer(base / "tokenizer", CLIPTokenizer)
    check_tokenizer(tokenizer, clip.config.text_config, base / "tokenizer")
    return clip.float().eval(), tokenizer


def save_clip(clip: CLIPModel, base: Path) -> None:
    """Write what `load_clip` reads beside the text encoder, in half precision."""
    weights = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("text_model.")}
    clip.config.save_pretrained(base / "clip")
    save_file(
        {name: tensor.half().contiguous() for name, tensor in weights.items()},
        base / "clip" / "model.safetensors",
    )
