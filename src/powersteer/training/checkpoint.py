"""Checkpoints: written under a temporary name, synced, renamed; never seen half-written, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from powersteer.adapters import Adapter, load_network
from powersteer.errors import PowersteerError

_DIGESTS = "digests.json"


def save_checkpoint(
    output_dir: Path, network: Adapter, tensors: dict[str, Any], state: dict[str, Any], keep: int
) -> None:
    """Write ``checkpoint-<step>`` and remove all but the newest ``keep``.

    Args:
        output_dir: The run's folder.
        network: Its weights are kept as an adapter, which can be loaded as it is.
        tensors: State dicts, of tensors and plain values only: optimizer, running average, …
        state: Plain values, ``step`` among them.
        keep: How many checkpoints stay.

    Raises:
        PowersteerError: The folder cannot be written; the previous checkpoints are still there.
    """
    final = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        network.save_pretrained(partial)
        torch.save(tensors, partial / "training.pt")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        (partial / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        _sync(partial)
        _discard(final)
        partial.replace(final)
        _sync_folder(output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save has its own error for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise PowersteerError(f"cannot write {final}: {_reason(error)}; earlier checkpoints are untouched") from None
    for old in list_checkpoints(output_dir)[:-keep]:
        _discard(old)


def load_checkpoint(folder: Path, network: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a checkpoint's weights in place; returns its tensors and its state.

    Raises:
        PowersteerError: The checkpoint is damaged.
    """
    fault = damage(folder)
    if fault is not None:
        others = [other.name for other in list_checkpoints(folder.parent) if other != folder and damage(other) is None]
        hint = f"; resume_from_checkpoint={others[-1]} goes on from the one before" if others else ""
        raise PowersteerError(f"{folder} is damaged ({fault}){hint}")
    saved = load_network(folder)
    try:
        network.load_state_dict(saved.state_dict())
    except RuntimeError:
        raise PowersteerError(f"{folder} holds a network of another shape: give another output_dir") from None
    try:
        tensors = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise PowersteerError(f"{folder} is damaged (training.pt holds more than tensors): it was not loaded") from None
    return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they are as they were written."""
    try:
        digests: dict[str, str] = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def chosen_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to go on from, if any.

    Args:
        output_dir: The run's folder.
        wanted: ``latest``, ``latest-intact``, ``checkpoint-<step>`` or None; see `TrainConfig`.

    Raises:
        PowersteerError: ``checkpoint-<step>`` is not there, or there are checkpoints and none is wanted.
    """
    found = list_checkpoints(output_dir)
    if wanted is None:
        if found:
            raise PowersteerError(
                f"{output_dir} holds {found[-1].name} of an earlier run: give another output_dir, or "
                "resume_from_checkpoint=latest"
            )
        return None
    if wanted == "latest":
        return found[-1] if found else None
    if wanted == "latest-intact":
        return next((folder for folder in reversed(found) if damage(folder) is None), None)
    if output_dir / wanted not in found:
        names = ", ".join(folder.name for folder in found) or "none"
        raise PowersteerError(f"there is no {wanted} in {output_dir}; there are: {names}")
    return output_dir / wanted


def set_aside_later(output_dir: Path, checkpoint: Path) -> None:
    """Rename the checkpoints after one that is gone on from: the next ``latest`` must not be one of them."""
    found = list_checkpoints(output_dir)
    for later in found[found.index(checkpoint) + 1 :]:
        aside = later.with_name(f"superseded-{later.name}")
        shutil.rmtree(aside, ignore_errors=True)
        later.replace(aside)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def save_adapter(output_dir: Path, network: Adapter) -> None:
    """Put the network's weights into the run's folder, in place of those before; never seen half-written.

    Raises:
        PowersteerError: The folder cannot be written; the weights before are still there.
    """
    partial = output_dir / ".adapter.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        network.save_pretrained(partial)
        _sync(partial)
        for file in partial.iterdir():
            file.replace(output_dir / file.name)
        partial.rmdir()
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PowersteerError(f"cannot write the weights to {output_dir}: {_reason(error)}") from None


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(folder: Path) -> None:
    """Remove a folder; it is gone under its name before its files are."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.replace(hidden)
        shutil.rmtree(hidden)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:160]
