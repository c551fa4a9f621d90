"""The stage that trains powersteer-small: what it learned comes back in pieces that `powersteer pretrain` takes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from powersteer.apps.pretrain.snapshot import newest
from powersteer.apps.pretrain.teacher import KEPT

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "configs" / "powersteer-small.yaml"
TINY = (
    "data={sources: [{package: '@iconify-json/noto@1.2.9', style: noto}], resolution: 32, held_out_per_mille: 200}",
    "tokenizer.vocab_size=700",
    "clip={steps: 4, batch_size: 4, learning_rate: 0.001, report_every: 4, hidden_size: 64, text_layers: 1, "
    "vision_layers: 1, word_batch_size: 4}",
    "vae={steps: 4, batch_size: 2, learning_rate: 0.001, report_every: 4, block_out_channels: [8, 8, 8, 8], "
    "norm_num_groups: 4}",
    "unet={steps: 6, batch_size: 4, learning_rate: 0.001, report_every: 3, block_out_channels: [16, 32], "
    "attention_levels: [false, true], attention_head_dim: [1, 1], layers_per_block: 1, norm_num_groups: 8, "
    "num_inference_steps: 2, sample_prompts: [fox]}",
)
"""The recipe for a rehearsal."""


def main() -> int:
    """Train for the seconds that are given; base.json and the pieces come back however it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("out", "carry", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--scale", choices=("full", "tiny"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    root, pieces = given.work / f"base-{given.scale}", given.work / f"pieces-{given.scale}"
    (root / "data" / "npm").mkdir(parents=True, exist_ok=True)
    pieces.mkdir(exist_ok=True)
    packed = given.carry / "icons.tar.xz"
    if packed.exists():
        with tarfile.open(packed) as tar:
            tar.extractall(root / "data" / "npm", filter="data")
    if (given.carry / KEPT).exists():
        shutil.copy(given.carry / KEPT, root)
    if (given.carry / "tokenizer").exists():
        shutil.copytree(given.carry / "tokenizer", root / "tokenizer", dirs_exist_ok=True)
    for brought in (given.out, given.carry):
        if not newest(pieces):
            for piece in newest(brought):
                shutil.copy(piece, pieces)

    command = [sys.executable, "-m", "powersteer.apps.cli", "pretrain", str(RECIPE), "--snapshot", str(pieces)]
    command += [f"output_dir={root}", f"minutes={given.seconds / 60}", *(TINY if given.scale == "tiny" else ())]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if given.device == "cpu" else {}
    process = subprocess.Popen(command, env={**os.environ, **hidden})
    try:
        return process.wait()
    except KeyboardInterrupt:  # the runner's limit, which the command was told of as well
        process.kill()
        process.wait()
        return 1
    finally:
        _bring_back(pieces, given.out, root)


def _bring_back(pieces: Path, out: Path, root: Path) -> None:
    """Write down what the stages say of themselves, and copy the newest pieces in the place of older ones."""
    (out / "base.json").write_text(json.dumps(_written(root), indent=2) + "\n", encoding="utf-8")
    fresh = newest(pieces)
    for piece in set(out.glob("snapshot-*")) - {out / one.name for one in fresh}:
        piece.unlink()
    for piece in fresh:
        shutil.copy(piece, out)


def _written(root: Path) -> dict[str, Any]:
    """The base's figures, and each stage's log."""
    logs = {
        stage: [json.loads(line) for line in (root / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for stage in ("clip", "vae", "unet")
        if (root / stage / "log.jsonl").exists()
    }
    metrics = root / "base" / "metrics.json"
    figures: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    rows = [{"name": stage, "result": _last(log[-1])} for stage, log in logs.items() if log]
    rows += [{"name": name, "result": f"{value:.4g}"} for name, value in figures.items()]
    return {"rows": rows, "metrics": figures, "logs": logs}


def _last(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


if __name__ == "__main__":
    sys.exit(main())
