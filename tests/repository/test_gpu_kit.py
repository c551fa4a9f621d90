"""The kit for minutes of a GPU, rehearsed on the CPU: every stage, its limit, its failure, and going on."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from powersteer.apps.pretrain.config import PretrainConfig
from powersteer.apps.pretrain.stages import pretrain
from powersteer.apps.pretrain.teacher import KEPT, keep
from powersteer.backbones.load import load_base
from powersteer.core.config import load_config

HOME = Path(__file__).parents[2]
NAMES = [
    f"{colour} {thing}" for colour in ("red", "blue", "green", "black") for thing in ("fox", "house", "tree", "cup")
]


class SmallTeacher:
    def words(self):
        return ["water", "stone", "river", "cloud"]

    def embed(self, phrases):
        torch.manual_seed(0)
        return torch.nn.functional.normalize(torch.randn(len(phrases), 384), dim=-1)


@pytest.fixture
def carry(tmp_path):
    """What `make gpu-wheels` lays, of one small icon set; the wheels are installed here."""
    folder = tmp_path / "carry"
    package = tmp_path / "npm" / "node_modules" / "@iconify-json" / "noto"
    package.mkdir(parents=True)
    icons = {
        name.replace(" ", "-"): {"body": f'<circle cx="12" cy="12" r="{4 + i % 8}" fill="#a{i:05d}"/>'}
        for i, name in enumerate(NAMES)
    }
    for file, content in {
        "icons.json": {"icons": icons, "width": 24, "height": 24},
        "info.json": {"author": {"name": "Somebody"}, "license": {"spdx": "MIT"}},
        "package.json": {"version": "1.2.9"},
    }.items():
        (package / file).write_text(json.dumps(content))
    folder.mkdir()
    with tarfile.open(folder / "icons.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "npm" / "node_modules", "node_modules")
    keep(SmallTeacher(), NAMES, folder / KEPT)
    return folder


def kit(carry, out, *args):
    command = [sys.executable, "gpu/run.py", "--out", out, "--carry", carry, "--work", carry.parent / "work"]
    command += ["--device", "cpu", "--scale", "tiny", *args]
    return subprocess.run(
        [str(part) for part in command], cwd=HOME, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )


@pytest.mark.slow
def test_every_stage_runs_here_first_and_what_it_learned_becomes_a_base(carry, tmp_path):
    out = tmp_path / "out"
    done = kit(carry, out, "--minutes", "20")
    assert done.returncode == 0, done.stdout[-4000:]
    files = {path.name: path for path in out.iterdir()}
    assert len(files) <= 8 and max(path.stat().st_size for path in files.values()) < 16 * 2**20
    check, bench, base = (json.loads(files[f"{stage}.json"].read_text()) for stage in ("check", "bench", "base"))
    assert {row["result"] for row in check["rows"]} <= {"passed", "skipped"}
    assert sum(row["result"] == "passed" for row in check["rows"]) >= 8
    assert {one["state"] for one in bench["benches"].values()} == {"whole"} and len(bench["benches"]) == 3
    assert all(row["ratio"] > 0 for one in bench["benches"].values() for row in one["figures"]["rows"])
    assert {"clip", "vae", "unet"} == set(base["logs"]) and base["metrics"]["generated_pictures"] > 0
    table = done.stdout.partition("== results")[2]
    assert all(f"{stage}: done" in table for stage in ("check", "bench", "base"))
    assert "tiny: BPS lite, warm plan" in table and done.stdout.strip() == files["log.txt"].read_text().strip()

    # Here the pieces become the base that was trained there.
    sys.path.insert(0, str(HOME / "gpu"))
    try:
        from base import RECIPE, TINY
    finally:
        sys.path.remove(str(HOME / "gpu"))
    config = load_config(RECIPE, PretrainConfig, [f"output_dir={tmp_path / 'home'}", *TINY, "minutes=0"])
    with tarfile.open(carry / "icons.tar.xz") as tar:
        tar.extractall(tmp_path / "home" / "data" / "npm", filter="data")
    (tmp_path / "home" / KEPT).write_bytes((carry / KEPT).read_bytes())
    here = load_base(str(pretrain(config, out)))
    there = load_base(str(carry.parent / "work" / "base-tiny" / "base"))
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(there, part).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in getattr(here, part).state_dict().items())

    # Nothing is done twice.
    again = kit(carry, out, "--minutes", "20")
    assert again.returncode == 0
    kept = [row for row in json.loads(files["check.json"].read_text())["rows"] if row["result"] == "passed"]
    assert kept == [row for row in check["rows"] if row["result"] == "passed"]
    assert json.loads(files["bench.json"].read_text()) == bench
    assert "$ powersteer bench" not in again.stdout


def test_a_stage_that_fails_lets_the_next_one_run_and_one_at_its_limit_is_stopped(carry, tmp_path, monkeypatch):
    # The real runner over small stages: a copy of the kit whose stages are these.
    home = tmp_path / "home"
    (home / "gpu").mkdir(parents=True)
    runner = (HOME / "gpu" / "run.py").read_text()
    (home / "gpu" / "run.py").write_text(
        runner.replace("GRACE = 15.0", "GRACE = 1.0").replace("LAST = 5.0", "LAST = 1.0")
    )
    (home / "gpu" / "check.py").write_text("raise ValueError('a fault')")
    (home / "gpu" / "bench.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    (home / "gpu" / "base.py").write_text(
        "import json, sys, pathlib\nout = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(out / 'base.json').write_text(json.dumps({'rows': [{'name': 'vae', 'result': '31 dB'}]}))"
    )
    out = tmp_path / "out"
    command = [sys.executable, str(home / "gpu" / "run.py"), "--out", str(out), "--carry", str(carry)]
    command += ["--device", "cpu", "--minutes", "0.25", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ValueError: a fault" in done.stdout and "begun" in done.stdout
    assert re.search(
        r"check: failed, exit status 1, \d+ s\nbench: stopped at its limit, [56] s\nbase: done, ", done.stdout
    )
    assert re.search(r"  vae +31 dB\n", done.stdout)


def test_without_wheels_it_says_what_to_do(tmp_path, monkeypatch):
    # An interpreter that has nothing but the standard library.
    command = [sys.executable, "-I", "-S", str(HOME / "gpu" / "run.py"), "--out", str(tmp_path / "out")]
    command += ["--carry", str(tmp_path / "none"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'none' / 'wheels'} is empty: run `make gpu-wheels`" in done.stderr
