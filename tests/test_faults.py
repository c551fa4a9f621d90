"""Real processes that are killed, stopped, out of room, or several."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from powersteer import BPSModel
from powersteer.config import save_config
from powersteer.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Forks, so that the libraries are imported once; each child is the command itself, killed at a random moment after it
# has come to a random step: as many kills on a slow machine as on a fast one.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import powersteer.training.run
from powersteer import cli
chance, output_dir, last_step = random.Random(0), Path(sys.argv.pop(1)), int(sys.argv.pop(1))

def step():
    return max((int(folder.name.split("-")[1]) for folder in output_dir.glob("checkpoint-*")), default=0)

kills = 0
for wanted in [*sorted(chance.randrange(last_step) for _ in range(20)), None]:
    child = os.fork()
    if child == 0:
        sys.argv = ["powersteer", "train", *sys.argv[1:]]
        try:
            cli.main()
        finally:
            os._exit(1)
    alive = lambda: os.waitpid(child, os.WNOHANG) == (0, 0)
    if wanted is None:
        os.waitpid(child, 0)
        break
    while step() < wanted and alive():
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3))
    if not alive():
        sys.exit(f"ended by itself at step {step()}")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills)
"""


def command(config, *overrides):
    config.output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, config.output_dir.parent / f"{config.output_dir.name}.yaml")
    return [str(config.output_dir.parent / f"{config.output_dir.name}.yaml"), *overrides]


def powersteer(config, *overrides, **kwargs):
    args = [sys.executable, "-m", "powersteer.train", *command(config, *overrides)]
    return subprocess.run(args, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **kwargs)


def final(config):
    """Everything of the last checkpoint and the log but the times."""
    folder = list_checkpoints(config.output_dir)[-1]
    training = torch.load(folder / "training.pt", weights_only=True)
    state = json.loads((folder / "state.json").read_text()) | {"seconds": 0}
    log = [json.loads(line) | {"seconds": 0} for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    return BPSModel.from_pretrained(folder).state_dict(), training, state, log


def bit_equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(bit_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(bit_equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def test_twenty_kills_at_random_moments_change_no_bit(config, tmp_path):
    config = config.model_copy(
        update={
            "max_train_steps": 240,
            "checkpointing_steps": 3,
            "validation_steps": 50,
            "dropout": 0.1,
            "random_flip": True,
        }
    )
    whole = powersteer(config)
    assert whole.returncode == 0, whole.stderr
    killed = config.model_copy(update={"output_dir": tmp_path / "killed"})
    args = [sys.executable, "-c", KILLER, str(killed.output_dir), "200", *command(killed)]
    result = subprocess.run(args, capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert result.stdout.split()[-1] == "20", result.stderr[-2000:]
    wanted, found = final(config), final(killed)
    assert wanted[2]["step"] == 240
    for one, other in zip(wanted, found, strict=True):
        assert bit_equal(one, other)
    best, kept = (BPSModel.from_pretrained(run.output_dir).state_dict() for run in (config, killed))
    assert bit_equal(best, kept)


def test_sigterm_saves_and_leaves(config):
    args = [sys.executable, "-m", "powersteer.train", *command(config, "max_train_steps=100000")]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list_checkpoints(config.output_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+); the same command goes on", out)[1])
    assert list_checkpoints(config.output_dir)[-1].name == f"checkpoint-{step}"


def test_a_disk_without_room_is_one_line_and_the_checkpoint_before_stays(config):
    assert powersteer(config, "max_train_steps=4").returncode == 0
    before = final(config)
    largest = max(file.stat().st_size for file in (config.output_dir / "checkpoint-4").iterdir())
    limited = powersteer(
        config, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    )
    lines = [line for line in limited.stderr.splitlines() if line.startswith("error:")]
    assert limited.returncode == 2 and len(lines) == 1 and "Traceback" not in limited.stderr, limited.stderr
    assert "cannot write" in lines[0]
    assert bit_equal(before[:3], final(config)[:3]) and not list(config.output_dir.glob(".checkpoint*"))
    assert powersteer(config).returncode == 0 and list_checkpoints(config.output_dir)[-1].name == "checkpoint-8"


def test_two_processes_train_what_one_does(config, tmp_path):
    """The same global batch: the same losses and weights to 1e-5."""
    config = config.model_copy(update={"learning_rate": 2e-4, "gradient_accumulation_steps": 2, "random_flip": True})
    one = powersteer(config)
    assert one.returncode == 0, one.stderr
    halves = config.model_copy(update={"train_batch_size": 2, "output_dir": tmp_path / "halves", "cache_dir": None})
    # What `accelerate launch` does for GPUs; for CPUs it would want mpirun.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    args = [*launch, "-m", "powersteer.train", *command(halves)]
    two = subprocess.run(args, capture_output=True, text=True, env=environment, timeout=300)
    assert two.returncode == 0, two.stderr[-3000:]
    (wanted, _, _, log), (found, _, _, other_log) = final(config), final(halves)
    difference = max((tensor - found[name]).abs().max().item() for name, tensor in wanted.items())
    losses = max(
        abs(row[key] - other[key])
        for row, other in zip(log, other_log, strict=True)
        for key in ("steered", "prior", "shuffled")
    )
    print(f"two processes: weights differ by {difference:.2g}, held-out losses by {losses:.2g}")
    assert difference < 1e-5 and losses < 1e-5
    assert [row.get("loss") for row in other_log][1:] == pytest.approx([row.get("loss") for row in log][1:], abs=1e-5)
    assert two.stdout.count("best weights are of step") == 1
