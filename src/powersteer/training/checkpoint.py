"""Checkpoints: written under a temporary name, synced, renamed; never seen half-written, and checked when read."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from powersteer.adapters.load import load_network
from powersteer.adapters.protocol import Adapter
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.text import read_object
from powersteer.training.folder import full_reason, remove

_DIGESTS = "digests.json"
_TENSORS = "training.pt"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from."""

    folder: Path
    tensors: Mapping[str, Any]
    """State dicts: optimizer, running average, …"""
    state: Mapping[str, Any]
    """Plain values; one that was not finite is None."""


def save_checkpoint(
    output_dir: Path,
    network: Adapter,
    tensors: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    others: Mapping[str, Any] | None = None,
) -> None:
    """Write ``checkpoint-<step>`` and remove all but the newest ``keep``.

    Args:
        output_dir: The run's folder.
        network: Its weights are kept as an adapter, which can be loaded as it is.
        tensors: State dicts, of tensors and plain values only: optimizer, running average, …
        state: Plain values, ``step`` among them.
        keep: How many checkpoints stay.
        others: What further JSON files hold, by their names.

    Raises:
        PowersteerError: The folder cannot be written; the previous checkpoints are still there.
    """
    final = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f".{final.name}.partial"
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in state.items()}
    try:
        _save_network(network, partial)
        _save_tensors(tensors, partial / _TENSORS)
        for name, content in {_STATE: finite, **(others or {})}.items():
            (partial / name).write_text(json.dumps(content), encoding="utf-8")
        digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        (partial / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        _sync(partial)
        _discard(final)
        partial.replace(final)
        _sync_folder(output_dir)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        remove(partial)
        raise PowersteerError(
            f"cannot write {final}: {full_reason(error)}; earlier checkpoints are untouched"
        ) from None
    for old in list_checkpoints(output_dir)[:-keep]:
        _discard(old)


def load_checkpoint(folder: Path, network: Adapter) -> Checkpoint:
    """Put a checkpoint's weights in place; `check_intact` comes before.

    Raises:
        PowersteerError: It holds something else than was written.
    """
    saved = load_network(folder)
    try:
        network.load_state_dict(saved.state_dict())
    except RuntimeError:
        raise PowersteerError(f"{folder} holds a network of another shape: give another output_dir") from None
    try:
        tensors: Any = torch.load(folder / _TENSORS, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever it meets in what it did not write
        raise PowersteerError(f"{folder} is damaged ({_TENSORS}: {reason_of(error)}): it was not loaded") from None
    if not isinstance(tensors, dict) or not {"optimizer", "average", "scaler"} <= tensors.keys():
        raise PowersteerError(f"{folder} is damaged ({_TENSORS} lacks the optimizer's state): it was not loaded")
    state: Any = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise PowersteerError(f"{folder} is damaged ({_STATE} is no state): it was not loaded")
    return Checkpoint(folder, tensors, state)


def check_intact(folder: Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    Raises:
        PowersteerError: It is damaged; names what to do.
    """
    fault = damage(folder)
    if fault is not None:
        others = [other.name for other in list_checkpoints(folder.parent) if other != folder and damage(other) is None]
        hint = f"; resume_from_checkpoint={others[-1]} goes on from the one before" if others else ""
        raise PowersteerError(f"{folder} is damaged ({fault}){hint}")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they are as they were written."""
    if not (folder / _DIGESTS).exists():
        return f"{_DIGESTS} is missing"
    try:
        digests = read_object(folder / _DIGESTS)
        unknown = {"config.json", _TENSORS, _STATE} - digests.keys()
        if unknown:
            return f"{_DIGESTS} says nothing of {min(unknown)}"
        for name, digest in digests.items():
            if _digest(folder / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {reason_of(error)}"
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
    """Rename the checkpoints after one that is gone on from: the next ``latest`` must not be one of them.

    Raises:
        PowersteerError: They cannot be renamed.
    """
    found = list_checkpoints(output_dir)
    try:
        for later in found[found.index(checkpoint) + 1 :]:
            aside = later.with_name(f"superseded-{later.name}")
            remove(aside)
            later.replace(aside)
    except OSError as error:
        raise PowersteerError(f"cannot set aside checkpoints in {output_dir}: {reason_of(error)}") from None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The updates done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def save_adapter(output_dir: Path, network: Adapter) -> None:
    """Put the network's weights into the run's folder, in place of those before; never seen half-written.

    Raises:
        PowersteerError: The folder cannot be written; the weights before are still there.
    """
    partial = output_dir / ".adapter.partial"
    try:
        _save_network(network, partial)
        _sync(partial)
        for file in partial.iterdir():
            file.replace(output_dir / file.name)
        partial.rmdir()
    except (OSError, SafetensorError) as error:
        remove(partial)
        raise PowersteerError(f"cannot write the weights to {output_dir}: {full_reason(error)}") from None


class _Writer(io.BufferedWriter):
    """Remembers why it could not write, which `torch.save` hides."""

    fault: OSError | None = None

    def write(self, content: Any, /) -> int:
        """See `io.BufferedWriter.write`."""
        try:
            return super().write(content)
        except OSError as error:
            self.fault = error
            raise


def _save_tensors(tensors: dict[str, Any], path: Path) -> None:
    with _Writer(io.FileIO(path, "w")) as file:
        try:
            torch.save(tensors, file)
        except RuntimeError:
            if file.fault is not None:
                raise file.fault from None
            raise


def _save_network(network: Adapter, folder: Path) -> None:
    """Into a new folder; its parent must be there, since one that was removed must not come back with these alone."""
    remove(folder)
    folder.mkdir()
    saved: Any = network  # a model of diffusers, of any class
    saved.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors makes files that nobody else may read, whatever the user's umask


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
