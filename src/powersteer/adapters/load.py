"""Trained adapters: by an embedded name, a folder, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.bps.transformer import BPSTransformerModel
from powersteer.adapters.protocol import Adapter
from powersteer.adapters.registry import adapter_classes
from powersteer.backbones.parts import load_model
from powersteer.core.errors import PowersteerError
from powersteer.core.files import embedded, is_file, is_folder
from powersteer.core.hub import CONFIG, WEIGHTS, fetch
from powersteer.core.records import check_config
from powersteer.core.text import read_object
from powersteer.core.weights import shown

EMBEDDED_ADAPTERS = {"sketch": "powersteer-tiny-sketch"}


def load_adapter(name_or_path: str) -> BPSModel | BPSTransformerModel:
    """A trained steering network: ``sketch`` (embedded), a folder, or ``user/name`` on the Hub.

    Raises:
        PowersteerError: There is no such adapter, it is not a BPS network or incomplete, damaged or not finite, or a
            newer powersteer wrote it.
    """
    return _load(name_or_path, {kind.__name__: kind for kind in (BPSModel, BPSTransformerModel)})


def load_network(name_or_path: str | Path) -> Adapter:
    """A trained adapter of any kind: BPS, one of its ablations, or a baseline; see `load_adapter` for the names.

    Raises:
        PowersteerError: There is no such adapter, or it is incomplete, damaged or not finite.
    """
    return _load(str(name_or_path), adapter_classes())


def _load(name_or_path: str, known: Mapping[str, type]) -> Any:
    """A trained adapter in evaluation mode; ``known``: the classes it may be of, by name."""
    path = embedded(EMBEDDED_ADAPTERS[name_or_path]) if name_or_path in EMBEDDED_ADAPTERS else Path(name_or_path)
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
    """The class of an adapter; refuse what is none, and one with settings that this version would only ignore."""
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
