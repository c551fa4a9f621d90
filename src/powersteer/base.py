"""The frozen base: the embedded powersteer-tiny, a folder, or a model of the Hub, as a stock diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from powersteer.errors import PowersteerError
from powersteer.hub import CONFIG, WEIGHTS, fetch
from powersteer.model import BPSModel

EMBEDDED_BASE = "powersteer-tiny"
EMBEDDED_ADAPTERS = {"sketch": "powersteer-tiny-sketch"}


def embedded(name: str) -> Path:
    """The folder of something that ships in the package."""
    return Path(str(files("powersteer"))) / "assets" / name


def source_of(name_or_path: str) -> str:
    """Where a base lies: the embedded folder, a folder, or a name on the Hub."""
    path = embedded(name_or_path) if name_or_path == EMBEDDED_BASE else Path(name_or_path)
    return str(path) if path.exists() else name_or_path


def load_base(name_or_path: str = EMBEDDED_BASE, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A frozen text-to-image pipeline in evaluation mode.

    Args:
        name_or_path: ``powersteer-tiny``, a folder in diffusers' layout, or a model of the Hub.
        dtype: Precision of the weights.

    Raises:
        PowersteerError: There is no such base, or it is incomplete.
    """
    source = source_of(name_or_path)
    try:
        with _no_progress_bars():
            pipe: Any = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PowersteerError(
            f"cannot load the base '{name_or_path}': give '{EMBEDDED_BASE}', a folder with a model_index.json, or a "
            f"model of the Hub ({reason})"
        ) from None
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_adapter(name_or_path: str) -> BPSModel:
    """A trained steering network: ``sketch`` (embedded), a folder, or ``user/name`` on the Hub.

    Raises:
        PowersteerError: There is no such adapter, it is not a BPS network, or a newer powersteer wrote it.
    """
    path = embedded(EMBEDDED_ADAPTERS[name_or_path]) if name_or_path in EMBEDDED_ADAPTERS else Path(name_or_path)
    remote = not path.exists()
    if remote:
        path = fetch(name_or_path, CONFIG)  # before the weights: those of something else may be many gigabytes
    _check_config(path / CONFIG, name_or_path)
    if remote:
        path = fetch(name_or_path, CONFIG, WEIGHTS)
    try:
        model = BPSModel.from_pretrained(str(path), torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PowersteerError(
            f"cannot load the adapter '{name_or_path}': give 'sketch', a folder that `powersteer train` wrote, or a "
            f"model of the Hub ({reason})"
        ) from None
    return model.eval()


def _check_config(file: Path, name: str) -> None:
    """Refuse what is no adapter, and one with settings that this version would only ignore."""
    if not file.exists():
        raise PowersteerError(f"{name} holds no {CONFIG}: give the folder of a trained adapter, or its name on the Hub")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, keys = config["_class_name"], {key for key in config if not key.startswith("_")}
    except (ValueError, TypeError, KeyError):
        raise PowersteerError(f"cannot load the adapter '{name}': its {CONFIG} is not an adapter's") from None
    if kind != BPSModel.__name__:
        raise PowersteerError(
            f"{name} is of the class {kind}, not a BPS network: give a folder that `powersteer train` wrote"
        )
    unknown = sorted(keys - set(signature(BPSModel.__init__).parameters))
    if unknown:
        raise PowersteerError(
            f"{name} was written by a newer powersteer, with the setting '{unknown[0]}' that this one does not know: "
            "pip install --upgrade powersteer"
        )


def load_clip(base: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The small CLIP that came with the base: its picture tower serves as a text-image metric.

    Its text tower is the base's text encoder, so ``clip/`` holds only the rest.
    """
    clip = CLIPModel(CLIPConfig.from_pretrained(base / "clip"))
    weights = load_file(base / "clip" / "model.safetensors")
    text = load_file(base / "text_encoder" / "model.safetensors")
    prefix = "" if any(name.startswith("text_model.") for name in text) else "text_model."
    weights |= {f"{prefix}{name}": tensor for name, tensor in text.items()}
    clip.load_state_dict(weights)
    return clip.float().eval(), CLIPTokenizer.from_pretrained(base / "tokenizer")


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Loading takes a moment; its bars would bury what a person wants to read."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def save_clip(clip: CLIPModel, base: Path) -> None:
    """Write what `load_clip` reads beside the text encoder, in half precision."""
    weights = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("text_model.")}
    clip.config.save_pretrained(base / "clip")
    save_file(
        {name: tensor.half().contiguous() for name, tensor in weights.items()},
        base / "clip" / "model.safetensors",
    )
