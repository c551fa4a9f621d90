"""Checkpoints: written under a temporary name, then renamed; never seen half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from powersteer.errors import PowersteerError
from powersteer.model import BPSModel


def save_checkpoint(
    output_dir: Path,
    model: BPSModel,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write ``checkpoint-<step>`` and remove all but the newest ``keep``.

    Raises:
        PowersteerError: The folder cannot be written; the previous checkpoints are still there.
    """
    final = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        torch.save({"optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PowersteerError(f"cannot write {final}: {error.strerror}; earlier checkpoints are untouched") from None
    for old in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: BPSModel, ema: EMAModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights in place; returns its state.

    Raises:
        PowersteerError: The checkpoint is damaged.
    """
    try:
        saved = BPSModel.from_pretrained(folder)
        model.load_state_dict(saved.state_dict())
        tensors = torch.load(folder / "optimizer.pt", map_location=model.device, weights_only=True)
        optimizer.load_state_dict(tensors["optimizer"])
        ema.load_state_dict(tensors["ema"])
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = " ".join(str(error).split())[:160]
        raise PowersteerError(f"{folder} is damaged ({reason}): remove it to go on from the one before") from None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if (path / "state.json").exists()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))
