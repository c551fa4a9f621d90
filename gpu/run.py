"""Everything that a GPU is wanted for, in minutes that are given: see docs/gpu.md. Needs Python alone to start."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
STAGES = {"check": 60.0, "bench": 180.0, "base": float("inf")}
"""The most seconds of each; what one leaves over goes to those after it, of which the last takes all."""
SHARES = {"check": 0.15, "bench": 0.4, "base": 1.0}
"""The most that each takes of the time that is left."""
GRACE = 15.0
"""Seconds before its limit at which a stage is to end of itself."""
LAST = 5.0
"""Seconds before its limit at which one that has not is asked to; at the limit it is killed."""
PATIENCE = 5
"""A rehearsal on a CPU has so many times a stage's limit."""
NEEDED = {
    "diffusers": "diffusers",
    "pydantic": "pydantic",
    "resvg_py": "resvg_py",
    "emoji": "emoji",
    "importlib_metadata": "importlib_metadata",
    "typing_inspection": "typing_inspection",
}
"""Modules that a machine with PyTorch may lack."""


def main() -> int:
    """Run the stages; 0 when all of them came to their end."""
    given = _arguments()
    deadline = time.monotonic() + 60 * given.minutes
    out, work = given.out.resolve(), given.work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    environment = _environment(given.carry.resolve(), work)
    done: dict[str, tuple[str, float]] = {}
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for stage in given.stages:
            left = deadline - time.monotonic()
            limit = STAGES[stage] * (PATIENCE if given.scale == "tiny" else 1)
            seconds = min(limit, (1.0 if stage == given.stages[-1] else SHARES[stage]) * left)
            if seconds <= GRACE:
                done[stage] = ("no time left", 0.0)
                continue
            _say(log, f"== {stage}: {seconds:.0f} s")
            command = [sys.executable, str(HERE / f"{stage}.py"), "--out", str(out), "--device", given.device]
            command += ["--scale", given.scale, "--seconds", f"{seconds - GRACE:.0f}"]
            if stage == "base":
                command += ["--carry", str(given.carry.resolve()), "--work", str(work)]
            begun = time.monotonic()
            how = _run(command, environment, seconds, log)
            done[stage] = (how, time.monotonic() - begun)
        _say(log, "\n".join(_table(out, done)))
    return 0 if all(how == "done" for how, _ in done.values()) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where results go; what is there is gone on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse")
    parser.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="tiny: all stages in minutes on a CPU"
    )
    parser.add_argument("--carry", type=Path, default=HERE / "carry", help="what `make gpu-wheels` laid there")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "powersteer-gpu", help="for what does not come back"
    )
    return parser.parse_args()


def _environment(carry: Path, work: Path) -> dict[str, str]:
    """In which the stages find their modules: those that the interpreter lacks are installed into a folder."""
    site = work / "site"
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    missing = [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        wheels = sorted(map(str, (carry / "wheels").glob("*.whl")))
        if not wheels:
            sys.exit(f"error: {missing[0]} is not installed, and {carry / 'wheels'} is empty: run `make gpu-wheels`")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--upgrade", "--target", str(site), *wheels], check=False)
        if done.returncode:
            sys.exit("error: the wheels cannot be installed (see above): they are for CPython 3.12 on x86-64")
    paths = [str(site), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "150",
        "HF_HUB_OFFLINE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # a training goes on bit for bit
    }


def _run(command: list[str], environment: dict[str, str], seconds: float, log: IO[str]) -> str:
    """Run a stage to its end or its limit; how it ended."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = process.stdout

    def copy() -> None:
        for line in lines:
            _say(log, line.rstrip("\n"))

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    how = ""
    for limit, sent in ((seconds - LAST, signal.SIGINT), (LAST, signal.SIGKILL)):
        try:
            process.wait(limit)
            break
        except subprocess.TimeoutExpired:
            how = "stopped at its limit"
            os.killpg(process.pid, sent)
    process.wait()
    copying.join(5)
    return how or ("done" if process.returncode == 0 else f"failed, exit status {process.returncode}")


def _say(log: IO[str], text: str) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def _table(out: Path, done: dict[str, tuple[str, float]]) -> list[str]:
    """How each stage ended, and its rows."""
    lines = ["", "== results"]
    for stage, (how, seconds) in done.items():
        lines.append(f"{stage}: {how}, {seconds:.0f} s")
        file = out / f"{stage}.json"
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
        lines += [f"  {row['name']:<52.52} {row['result']}" for row in rows]
    files = sorted(path for path in out.iterdir() if path.is_file())
    lines.append(f"{out}: " + ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in files))
    return lines


if __name__ == "__main__":
    sys.exit(main())
