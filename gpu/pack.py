"""Lay what travels to a machine without a network: wheels, the icon sets, what the teacher says of their names."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from powersteer.apps.pretrain.config import PretrainConfig
from powersteer.apps.pretrain.icons import fetch_icons
from powersteer.apps.pretrain.snapshot import newest
from powersteer.apps.pretrain.teacher import KEPT, MiniLM, keep, load_teacher
from powersteer.apps.pretrain.text import train_tokenizer
from powersteer.core.config import load_config

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "configs" / "powersteer-small.yaml"
WHEELS = (
    "annotated-types",
    "diffusers",
    "emoji",
    "importlib_metadata",
    "pydantic",
    "pydantic_core",
    "resvg_py",
    "typing-inspection",
)
"""Of constraints.txt's versions: what a machine with PyTorch, transformers and accelerate may lack."""
PLATFORMS = ("manylinux2014", *(f"manylinux_2_{minor}" for minor in (39, 35, 34, 31, 28, 27, 24, 17)))
READ = ("icons.json", "info.json", "chars.json", "metadata.json", "package.json")
"""Of each icon package."""


def main() -> None:
    """Fill the folder; print what it weighs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--carry", type=Path, default=HERE / "carry", help="the folder")
    parser.add_argument("--snapshot", type=Path, help="what an earlier run brought back, to be gone on from")
    given = parser.parse_args()
    carry, work = given.carry, HERE.parent / "runs" / "powersteer-small"
    shutil.rmtree(carry, ignore_errors=True)
    (carry / "wheels").mkdir(parents=True)
    _wheels(carry / "wheels")
    config = load_config(RECIPE, PretrainConfig)
    icons = fetch_icons(config.data, work / "data")
    with tarfile.open(carry / "icons.tar.xz", "w:xz") as tar:
        for source in config.data.sources:
            package = str(source.package).rpartition("@")[0]
            for file in (work / "data" / "npm" / "node_modules" / package / name for name in READ):
                if file.exists():
                    tar.add(file, file.relative_to(work / "data" / "npm").as_posix())
    pieces = [] if given.snapshot is None else newest(given.snapshot)
    for piece in pieces:
        shutil.copy(piece, carry)
    if not pieces:  # what was learned from the teacher is in the pieces
        if not (work / KEPT).exists():
            keep(MiniLM(), [icon.name for icon in icons if not icon.held_out], work / KEPT)
        shutil.copy(work / KEPT, carry)
        train_tokenizer(config.tokenizer, icons, load_teacher(work), work / "tokenizer")
        shutil.copytree(work / "tokenizer", carry / "tokenizer")
    files = sorted(path for path in carry.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(carry)}")
    print(f"{sum(path.stat().st_size for path in files) / 1e6:6.1f} MB in {carry}")


def _wheels(folder: Path) -> None:
    pinned = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (HERE.parent / "constraints.txt").read_text(encoding="utf-8"), re.M)
    )
    wanted = [f"{name}=={pinned[name]}" for name in WHEELS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    done = subprocess.run([*command, *wanted], check=False)
    if done.returncode:
        sys.exit("error: pip could not fetch the wheels (see above)")


if __name__ == "__main__":
    main()
