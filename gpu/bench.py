"""The stage that measures speed and memory: the project's own bench commands, each as far as the time goes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FULL = {
    "sd15": "steering --shape sd15 --rounds 5",
    "sd15-train": "train --shape sd15 --batch-size 16 --rounds 2",
    "sdxl": "steering --shape sdxl --rounds 3",
    "sd15-train-checkpointing": "train --shape sd15 --batch-size 16 --rounds 2 --gradient-checkpointing",
    "sd15-generate": "generate --shape sd15 --rounds 1 --only bps-paper --only controlnet",
    "sd15-compiled": "steering --shape sd15 --rounds 5 --compile --only bps-paper-warm-plan",
    "sdxl-generate": "generate --shape sdxl --batch-size 1 --rounds 1 --only bps-paper",
    "sdxl-compiled": "steering --shape sdxl --rounds 3 --compile --only bps-paper-warm-plan",
}
"""Bench commands by name, the ones wanted most first."""
TINY = {
    "tiny": "steering --shape tiny --rounds 1",
    "tiny-train": "train --shape tiny --batch-size 2 --rounds 1 --only bps-lite",
    "tiny-generate": "generate --shape tiny --batch-size 1 --num-inference-steps 2 --rounds 1",
}
"""Without ``torch.compile``, which takes minutes on a CPU."""
GRACE = 5.0
"""Seconds from asking a command to end until it is killed."""


def main() -> int:
    """Run the commands that bench.json does not hold whole; 0 when none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--scale", choices=("full", "tiny"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    file = given.out / "bench.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["benches"] if file.exists() else {}
    dtype = "bfloat16" if given.device == "cuda" else "float32"
    failed = False
    for name, command in (FULL if given.scale == "full" else TINY).items():
        whole = f"powersteer bench {command} --device {given.device} --dtype {dtype}"
        if found.get(name, {}).get("state") == "whole" and found[name]["command"] == whole:
            continue
        left = deadline - time.monotonic() - GRACE
        if left <= 0:
            break
        print(f"$ {whole}", flush=True)
        state, figures = _measured(whole.split()[1:], left)
        failed |= state == "failed"
        found[name] = {"command": whole, "state": state, "figures": figures}
        report = {"rows": [row for key, bench in found.items() for row in _rows(key, bench)], "benches": found}
        partial = file.with_name(".bench.json")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    return int(failed)


def _measured(command: list[str], seconds: float) -> tuple[str, dict[str, Any] | None]:
    """How a command ended, and the rows that it had written by then."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        process = subprocess.Popen([sys.executable, "-m", "powersteer.apps.cli", *command, "--json", str(file)])
        try:
            state = "whole" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut short"
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return state, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _rows(key: str, bench: dict[str, Any]) -> list[dict[str, str]]:
    rows = (bench["figures"] or {}).get("rows", [])
    shown = [{"name": f"{key}: {_label(row)}", "result": _result(row)} for row in rows]
    return shown if bench["state"] == "whole" else [*shown, {"name": key, "result": bench["state"]}]


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']}, batch {row['batch_size']}" if "batch_size" in row else row["name"]


def _result(row: dict[str, Any]) -> str:
    if row.get("error"):
        return row["error"]
    parts = [f"{row['ratio']:.3f}", f"{1000 * row['seconds']:.1f} ms"]
    for name, unit, scale in (
        ("pictures_per_second", "pictures/s", 1.0),
        ("extra_peak_memory", "MB more", 1e-6),
        ("peak_memory", "GB at the peak", 1e-9),
        ("estimated_memory", "GB foretold", 1e-9),
        ("device_waits", "waits", 1.0),
    ):
        if row.get(name) is not None:
            parts.append(f"{row[name] * scale:.4g} {unit}")
    return ", ".join(parts)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    sys.exit(main())
