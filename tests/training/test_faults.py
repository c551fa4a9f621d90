"""Real processes that are killed, stopped, out of room, or several."""

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from accelerate.utils import DistributedType

from powersteer import BPSModel
from powersteer.core.config import save_config
from powersteer.core.errors import PowersteerError
from powersteer.training.checkpoint import list_checkpoints
from powersteer.training.setup import make_accelerator
from powersteer.training.sharding import Whole, share_out

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Forks, so that the libraries are imported once; each child is the command itself, killed at a random moment after it
# has come to a random step: as many kills on a slow machine as on a fast one.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import powersteer.training.run
from powersteer.apps import cli
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_wherever_it_is_met(config, small_disk, tmp_path):
    change = {"max_train_steps": 2, "validation_steps": 2, "checkpointing_steps": 2, "cache_dir": None}
    change |= {"num_validation_images": 2, "validation_image_steps": 2, "report_to": "tensorboard"}
    whole = config.model_copy(update={**change, "max_train_steps": 4, "output_dir": tmp_path / "whole"})
    assert powersteer(whole, "max_train_steps=2").returncode == powersteer(whole).returncode == 0
    run = config.model_copy(update={**change, "output_dir": small_disk / "run"})
    args = [sys.executable, "-m", "powersteer.train", *command(run)]
    args[3] = shutil.move(args[3], tmp_path / "run.yaml")
    filler, met = small_disk / "filler", []

    def trained(*overrides):
        return subprocess.run([*args, *overrides], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)

    def filled(leave, *overrides):
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - leave)))
        done = trained(*overrides)
        filler.unlink()
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        assert "No space left on device" in lines[0] and "cannot write" in lines[0], lines[0]
        met.append(lines[0])

    filled(0)
    assert trained().returncode == 0
    before = final(run)
    for leave in (0, 4096, 8192, 32768, 1_000_000, 2_000_000, 2_500_000, 3_000_000):
        filled(leave, "max_train_steps=4")
        assert bit_equal(before[:3], final(run)[:3])
    print("\n".join(met))
    assert trained("max_train_steps=4").returncode == 0
    assert all(bit_equal(one, other) for one, other in zip(final(whole), final(run), strict=True))


def started(config, *overrides):
    """A run that trains on and on, and has a checkpoint."""
    command_ = [sys.executable, "-m", "powersteer.train", *command(config, "max_train_steps=100000", *overrides)]
    process = subprocess.Popen(command_, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list_checkpoints(config.output_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


def test_a_killed_run_leaves_no_lock_and_a_running_one_is_not_disturbed(config):
    first = started(config, "dataloader_num_workers=2", "checkpointing_steps=1")
    second = powersteer(config, "max_train_steps=100000", "dataloader_num_workers=2", "checkpointing_steps=1")
    assert second.returncode == 2 and "another training is at work in" in second.stderr, second.stderr
    assert first.poll() is None
    first.kill()  # its data workers go on for a moment
    third = powersteer(config, "max_train_minutes=0.01", "max_train_steps=100000", "checkpointing_steps=1")
    first.communicate(timeout=60)
    assert third.returncode == 0 and "Traceback" not in third.stderr, third.stderr


def test_a_killed_data_worker_is_one_line(config):
    process = started(config, "dataloader_num_workers=2", "checkpointing_steps=1")
    workers = psutil.Process(process.pid).children(recursive=True)
    data = [one for one in workers if "resource_tracker" not in " ".join(one.cmdline())]
    data[0].kill()
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert "a data worker was ended from outside" in lines[0] and "fewer dataloader_num_workers" in lines[0]
    step = int(list_checkpoints(config.output_dir)[-1].name.rpartition("-")[2])
    assert powersteer(config, f"max_train_steps={step + 2}", "dataloader_num_workers=0").returncode == 0


def test_a_terminal_that_closes_saves(config):
    args = [sys.executable, "-m", "powersteer.train", *command(config, "max_train_steps=100000")]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have it ignored
        os.execve(sys.executable, args, ENVIRONMENT)
    drain = threading.Thread(target=_drained, args=(terminal,), daemon=True)
    drain.start()
    deadline = time.monotonic() + 120
    while not list_checkpoints(config.output_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    before = list_checkpoints(config.output_dir)[-1].name
    os.kill(child, signal.SIGSTOP)  # so that it cannot come to a checkpoint by itself
    time.sleep(0.2)
    os.kill(child, signal.SIGHUP)
    os.close(terminal)
    os.kill(child, signal.SIGCONT)
    status = ended(child)
    last = list_checkpoints(config.output_dir)[-1].name
    assert os.WIFEXITED(status) and last != before, status
    done = powersteer(config, f"max_train_steps={int(last.rpartition('-')[2]) + 1}")
    assert done.returncode == 0 and "Traceback" not in done.stderr


def ended(child, seconds=120):
    """The wait status of a process that is to end by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return pytest.fail(f"it goes on after {seconds} seconds")


def _drained(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def two_processes(config, *overrides, launched=("-m", "powersteer.train"), environment=None):
    # What `accelerate launch` does for GPUs; for CPUs it would want mpirun.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *launched]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **(environment or {})}
    args = [*launch, *command(config, *overrides)]
    done = subprocess.run(args, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_alike(one, other):
    """Two runs came to the same losses and weights to 1e-5."""
    (wanted, _, _, log), (found, _, _, other_log) = final(one), final(other)
    difference = max((tensor - found[name]).abs().max().item() for name, tensor in wanted.items())
    losses = max(
        abs(row[key] - other[key])
        for row, other in zip(log, other_log, strict=True)
        for key in ("steered", "prior", "shuffled")
    )
    print(f"weights differ by {difference:.2g}, held-out losses by {losses:.2g}")
    assert difference < 1e-5 and losses < 1e-5
    assert [row.get("loss") for row in other_log][1:] == pytest.approx([row.get("loss") for row in log][1:], abs=1e-5)


@pytest.fixture
def halves(config, tmp_path):
    """One process's run, and for two a run with the same global batch."""
    one = config.model_copy(update={"learning_rate": 2e-4, "gradient_accumulation_steps": 2, "random_flip": True})
    done = powersteer(one)
    assert done.returncode == 0, done.stderr
    return one, one.model_copy(update={"train_batch_size": 2, "output_dir": tmp_path / "halves", "cache_dir": None})


def test_two_processes_train_what_one_does(halves):
    one, two = halves
    done = two_processes(two)
    assert_alike(one, two)
    assert done.stdout.count("best weights are of step") == 1


# Accelerate offers FSDP and DeepSpeed to accelerators only; and DeepSpeed would compile a transport for CPUs.
SHARDED = """
import atexit, runpy, sys
from accelerate.state import AcceleratorState, DistributedType, PartialState
from powersteer.training import learner, sharding
kind = sys.argv.pop(1)
kinds = {"deepspeed": DistributedType.DEEPSPEED, "fsdp": DistributedType.MULTI_GPU}
PartialState(cpu=True).distributed_type = kinds[kind]
if kind == "deepspeed":
    import deepspeed.comm.torch
    deepspeed.comm.torch.build_shm_op = lambda: None
load, parts = learner.load_optimizer_state, []

def load_and_look(optimizer, state):
    load(optimizer, state)
    local = getattr(optimizer.optimizer, "optimizer", optimizer.optimizer).state.values()
    parts.extend(getattr(one["exp_avg"], "_local_tensor", one["exp_avg"]).numel() for one in local)

learner.load_optimizer_state = load_and_look
atexit.register(lambda: print(f"{AcceleratorState().distributed_type}: {sum(parts)} numbers here"))
runpy.run_module("powersteer.train", run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_shared_out_over_two_processes_it_trains_the_same_and_goes_on_in_one(halves, tmp_path, kind):
    one, two = halves
    file = Path(__file__).parents[2] / "configs" / "accelerate" / f"{kind}.yaml"
    # As `accelerate launch` passes the file on.
    settings = yaml.safe_load(file.read_text())[f"{kind}_config"]
    prefix = {"fsdp": "", "deepspeed": "ACCELERATE_DEEPSPEED_"}[kind]
    environment = {prefix + name.upper(): str(value) for name, value in settings.items()}
    environment |= {f"ACCELERATE_USE_{kind.upper()}": "true", "ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    (tmp_path / "sharded.py").write_text(SHARDED)
    launched = [str(tmp_path / "sharded.py"), kind]
    two_processes(two, "max_train_steps=4", launched=launched, environment=environment)
    done = two_processes(two, launched=launched, environment=environment)  # goes on from its checkpoint
    assert_alike(one, two)
    trained = sum(p.numel() for n, p in BPSModel.from_pretrained(two.output_dir).named_parameters() if n != "weights")
    here = [int(count) for count in re.findall(rf"DistributedType.{kind.upper()}: (\d+) numbers here", done.stdout)]
    assert len(here) == 2 and trained <= sum(here) < 1.01 * trained and max(here) < 0.6 * trained
    # A checkpoint is whole: one process goes on from it.
    refused = powersteer(two, "max_train_steps=9")
    assert refused.returncode == 2 and "processes) was 8, now 4" in refused.stderr
    done = powersteer(two, "max_train_steps=9", "train_batch_size=4")  # the same whole batch
    assert done.returncode == 0 and list_checkpoints(two.output_dir)[-1].name == "checkpoint-9", done.stderr
    assert max(done.stderr.count(word) for word in ("damaged", "Traceback")) == 0


def test_sharing_out_that_would_not_work_is_refused(config, monkeypatch):
    for kind, settings, words in (
        ("deepspeed", {"zero_optimization": {"stage": 3}}, "give zero_stage 1 or 2"),
        (
            "deepspeed",
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "without offloading",
        ),
        ("fsdp", {"fsdp_version": 1, "ignored_modules": "unet"}, "give fsdp_version: 2"),
        ("fsdp", {"fsdp_version": 2, "ignored_modules": None}, "fsdp_ignored_modules: unet"),
    ):
        plugins = {
            "deepspeed_plugin": SimpleNamespace(deepspeed_config=settings),
            "fsdp_plugin": SimpleNamespace(**settings),
        }
        accelerator = SimpleNamespace(state=SimpleNamespace(**plugins), distributed_type=DistributedType.FSDP)
        with pytest.raises(PowersteerError, match=words):
            share_out(accelerator, config, torch.bfloat16) if kind == "deepspeed" else Whole(None, accelerator)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(PowersteerError, match="fp16 is not possible with DeepSpeed"):
        make_accelerator(config.model_copy(update={"mixed_precision": "fp16"}))
