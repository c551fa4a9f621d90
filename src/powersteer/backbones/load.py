"""The frozen base, and trained networks: by an embedded name, a folder, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from powersteer.backbones.embedded import EMBEDDED_BASE
from powersteer.backbones.parts import (
    INDEX,
    SCHEDULER_CONFIG,
    check_tokenizer,
    load_model,
    load_parts,
    load_tokenizer,
    quiet,
    read_index,
    stems,
)
from powersteer.core.errors import PowersteerError
from powersteer.core.files import embedded, is_file, is_folder, reason_of
from powersteer.core.hub import CONFIG, WEIGHTS, fetch, fetch_weights
from powersteer.core.records import check_config
from powersteer.core.text import read_object
from powersteer.core.weights import check_sizes, filled, read_tensors, shown


def source_of(name_or_path: str) -> str:
    """Where a base lies: the embedded folder, a folder, or a name on the Hub."""
    path = embedded(name_or_path) if name_or_path == EMBEDDED_BASE else Path(name_or_path)
    return str(path) if is_folder(path) or is_file(path) else name_or_path


def load_base(name_or_path: str = EMBEDDED_BASE, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A frozen text-to-image pipeline in evaluation mode.

    Args:
        name_or_path: ``powersteer-tiny``, a folder in diffusers' layout, or a model of the Hub: Stable Diffusion 1.x,
            2.x or XL, its inpainting, or InstructPix2Pix.
        dtype: Precision of the weights.

    Raises:
        PowersteerError: There is no such base, or a part of it is missing, incomplete, damaged or of another base.
    """
    try:
        folder, kinds = _folder_of_base(name_or_path, weights=True)
        parts = load_parts(folder, kinds, dtype)
        pipe = _assembled(folder, parts)
    except PowersteerError as error:
        raise PowersteerError(f"cannot load the base '{name_or_path}': {error}") from None
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_configs(name_or_path: str) -> dict[str, dict[str, Any]]:
    """What a base's networks and scheduler say of themselves, by part; weights are neither read nor fetched.

    Args:
        name_or_path: See `load_base`.

    Raises:
        PowersteerError: There is no such base, or a configuration is missing, or no such network's.
    """
    try:
        folder, kinds = _folder_of_base(name_or_path, weights=False)
        networks = [part for part, kind in kinds.items() if issubclass(kind, torch.nn.Module)]
        files = {part: folder / part / CONFIG for part in networks}
        files["scheduler"] = folder / "scheduler" / SCHEDULER_CONFIG
        configs = {part: read_object(file) for part, file in files.items()}
        for part in networks:
            check_sizes(configs[part], str(files[part]))
    except PowersteerError as error:
        raise PowersteerError(f"cannot read the base '{name_or_path}': {error}") from None
    return configs


def _folder_of_base(name: str, *, weights: bool) -> tuple[Path, dict[str, type]]:
    """Where a base lies, of the Hub once fetched, and its parts: a look at what it is comes before its weights."""
    folder = Path(source_of(name))
    if is_file(folder):
        raise PowersteerError(
            "it is one file, not a folder: make one of it, once, with diffusers' "
            f"StableDiffusionPipeline.from_single_file('{folder}').save_pretrained('FOLDER') "
            "(StableDiffusionXLPipeline for XL)"
        )
    remote = not is_folder(folder)
    if remote:
        folder = fetch(name, INDEX)
    if not is_file(folder / INDEX):
        raise PowersteerError(f"give '{EMBEDDED_BASE}', a folder with a {INDEX}, or a model of the Hub")
    kinds = read_index(folder / INDEX)
    if remote:  # its parts alone, each with one set of weights
        networks = {part: stems(kind) for part, kind in kinds.items() if issubclass(kind, torch.nn.Module)}
        others = [f"{part}/*{suffix}" for part in kinds for suffix in (".json", ".txt", ".model")]
        folder = fetch_weights(name, networks, INDEX, *others) if weights else fetch(name, INDEX, *others)
    return folder, kinds


def _assembled(folder: Path, parts: Mapping[str, Any]) -> Any:
    try:
        with quiet():
            return DiffusionPipeline.from_pretrained(str(folder), **parts)
    except Exception as error:  # the pipeline's own checks of its parts and options
        raise PowersteerError(f"its parts make no pipeline ({reason_of(error)})") from None


def load_saved(name_or_path: str, known: Mapping[str, type]) -> Any:
    """A trained network of one of these classes, in evaluation mode.

    Args:
        name_or_path: See `load_adapter`.
        known: Classes by their names in config.json.

    Raises:
        PowersteerError: See `load_adapter`.
    """
    path = Path(name_or_path)
    remote = not is_folder(path)
    if remote:
        if is_file(path):
            raise PowersteerError(f"{name_or_path} is a file: give the folder of a trained adapter")
        path = fetch(name_or_path, CONFIG)  # before the weights: those of something else may be many gigabytes
    kind = _kind_of(path / CONFIG, name_or_path, known)
    if remote:
        path = fetch(name_or_path, CONFIG, WEIGHTS)
    try:
        return load_model(path, kind).eval()
    except PowersteerError as error:
        raise PowersteerError(f"cannot load the network in {name_or_path}: {error}") from None


def _kind_of(file: Path, name: str, known: Mapping[str, type]) -> type:
    """The class of a network; refuse what is no adapter, and one with settings that this version would only ignore."""
    if not is_file(file):
        raise PowersteerError(f"{name} holds no {CONFIG}: give the folder of a trained adapter, or its name on the Hub")
    try:
        config = read_object(file)
    except PowersteerError as error:
        raise PowersteerError(
            f"cannot load the network in {name}: its {CONFIG} is not an adapter's ({error})"
        ) from None
    named = config.get("_class_name")
    if not isinstance(named, str):
        raise PowersteerError(f"cannot load the network in {name}: its {CONFIG} is not an adapter's (no class)")
    if named not in known:
        raise PowersteerError(
            f"{name} is of the class {shown(named)}, not a BPS network: give a folder that `powersteer train` wrote"
        )
    check_config(config, known[named], name, str(file))
    return known[named]


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
