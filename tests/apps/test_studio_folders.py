"""What a studio keeps on disk, and what is left of it when it is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_studio_guard import zipped

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.apps.studio import folders, pairs
from powersteer.apps.studio.folders import PREFIX, make_room, sweep, training_lock, without_place, work_folder
from powersteer.apps.studio.training import Training
from studio_visitor import Visitor

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def archive(folder: Path, name: str, count: int = 3) -> Path:
    made = draw_pairs(folder / name, count)
    content = {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*.*")}
    (folder / f"{name}.zip").write_bytes(zipped(content))
    return folder / f"{name}.zip"


def test_the_folder_is_gone_after_the_block(temporary):
    with work_folder() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_only_dead_folders_of_studios_are_swept(temporary, tmp_path):
    dead = temporary / f"{PREFIX}dead"
    for name in ("dead", "begun", "training"):
        (temporary / f"{PREFIX}{name}" / "pairs").mkdir(parents=True)
        if name != "begun":
            (temporary / f"{PREFIX}{name}" / "studio.lock").touch()
    kept = tmp_path / "precious"
    kept.mkdir()
    (kept / "studio.lock").touch()
    (kept / "it.txt").write_text("kept")
    (temporary / f"{PREFIX}link").symlink_to(kept)
    (dead / "link").symlink_to(kept)
    (temporary / f"{PREFIX}file").write_text("no folder")
    with training_lock(temporary / f"{PREFIX}training"), work_folder() as alive:
        assert not dead.exists()  # `work_folder` sweeps
        (dead / "pairs").mkdir(parents=True)
        (dead / "studio.lock").touch()
        assert sweep(temporary) == [dead]
        assert alive.exists()
        left = {folder.name.removeprefix(PREFIX) for folder in temporary.iterdir()}
        assert left == {"begun", "training", "link", "file", alive.name.removeprefix(PREFIX)}
    assert (kept / "it.txt").read_text() == "kept"
    assert sweep(temporary) == [temporary / f"{PREFIX}training"]


def test_the_oldest_files_make_room(tmp_path):
    for i in range(6):
        file = tmp_path / f"{i % 2}" / f"{i}.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (1000 + i, 1000 + i))
    make_room(tmp_path, 600)
    assert len(list(tmp_path.rglob("*.bin"))) == 6
    make_room(tmp_path, 250)
    assert sorted(file.name for file in tmp_path.rglob("*.bin")) == ["4.bin", "5.bin"]
    make_room(tmp_path / "no", 0)


def test_words_do_not_tell_where_files_lie():
    folder = Path("/tmp/powersteer-studio-a1")
    told = without_place("'/tmp/powersteer-studio-a1/gradio/0f/my it.png' and /tmp/powersteer-studio-a1/x.yaml", folder)
    assert told == "'my it.png' and x.yaml"
    assert without_place("/tmp/other/x is kept", folder) == "/tmp/other/x is kept"


def test_of_each_visitor_the_last_zip_is_kept(tmp_path):
    training = Training("powersteer-tiny", tmp_path / "runs", tmp_path / "work")
    first = training.look(archive(tmp_path, "a"), who="me")
    other = training.look(archive(tmp_path, "b"), who="you")
    assert first.folder.is_dir()
    second = training.look(tmp_path / "a.zip", who="me")
    assert [one.folder.is_dir() for one in (first, other, second)] == [False, True, True]
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(PowersteerError, match="cannot be unpacked"):
        training.look(tmp_path / "no.zip", who="me")
    assert second.folder.is_dir()
    assert len(list((tmp_path / "work" / "pairs").iterdir())) == 2
    with pytest.raises(PowersteerError, match="made room for later ones: drop the zip again"):
        training.start(first, "mine")


@pytest.mark.parametrize("bound", ["KEPT_ZIPS", "KEPT_BYTES"])
def test_zips_are_bounded_in_all_and_the_one_in_use_stays(tmp_path, monkeypatch, bound):
    size = folders.bytes_in(draw_pairs(tmp_path / "size", 3))
    monkeypatch.setattr(pairs, bound, 3 if bound == "KEPT_ZIPS" else 3 * size + 10)
    used: list[Path] = []
    unpacked = pairs.Unpacked(tmp_path / "work", lambda: used[0] if used else None)
    file = archive(tmp_path, "a")
    found = [unpacked.look(file, f"person {i}", None) for i in range(3)]
    used.append(found[0].folder)
    found += [unpacked.look(file, f"person {i}", None) for i in range(3, 6)]
    assert [one.folder.is_dir() for one in found] == [True, False, False, False, True, True]
    again = unpacked.look(file, "person 0", None)  # its pairs are being trained on: they go later
    assert found[0].folder.is_dir()
    used.clear()
    unpacked.look(file, "person 0", None)
    assert not found[0].folder.exists()
    assert not again.folder.exists()
    assert len(list((tmp_path / "work").iterdir())) <= 3


# Killed


def _trainings(studio: int) -> list[int]:
    """Of all threads' children, those that train."""
    found = [
        int(one) for task in Path(f"/proc/{studio}/task").iterdir() for one in (task / "children").read_text().split()
    ]
    return [one for one in found if b"powersteer.apps.studio.attended" in Path(f"/proc/{one}/cmdline").read_bytes()]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(what, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


class Running:
    """A studio in a process of its own."""

    def __init__(self, tmp_path: Path, *, nohup: bool = False) -> None:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        self.runs, self.tmp = tmp_path / "runs", tmp_path / "tmp"
        command = [sys.executable, "-m", "powersteer.apps.cli", "studio", "--adapters-dir", str(self.runs)]
        command = ["nohup", *command] if nohup else command
        environment = {**ENVIRONMENT, "TMPDIR": str(self.tmp), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        line = self.process.stdout.readline().decode()
        self.address = re.search(r"http://[^ ]+", line)[0]
        self.visitor = Visitor(self.address)

    def train(self, file: Path, name: str) -> int:
        """Start a training; the number of its process."""
        _, report, _ = self.visitor.call("look_at_zip", self.visitor.uploaded(file.name, file.read_bytes()), "", "")
        assert "pairs.**" in report
        assert isinstance(self.visitor.call("start", None, name, 3000, ""), list)
        [process] = _wait_for(lambda: _trainings(self.process.pid))
        return process

    @property
    def folders(self) -> list[Path]:
        return sorted(self.tmp.glob(f"{PREFIX}*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks through /proc")
def test_a_killed_studio_leaves_neither_its_training_nor_its_folder(tmp_path):
    file = archive(tmp_path, "mine", 12)
    began_at = {"at once": lambda run: True, "trained": lambda run: (run / "log.jsonl").exists()}
    for when, begun in began_at.items():
        studio = Running(tmp_path)
        training = studio.train(file, when.replace(" ", "-"))
        run = studio.runs / when.replace(" ", "-")
        _wait_for(lambda begun=begun, run=run: begun(run))
        studio.process.kill()
        studio.process.wait()
        _wait_for(lambda training=training: not _alive(training), 30)
        if when == "trained":  # the best weights so far were written, as after Ctrl-C
            assert json.loads((run / "config.json").read_text())["_class_name"] == "BPSModel"
        assert len(studio.folders) == 1  # of a dead studio, which nobody could remove
        dead = studio.folders[0]
        following = Running(tmp_path)
        assert not dead.exists()
        assert len(following.folders) == 1
        beside = Running(tmp_path)  # another one does not sweep the folder of one that lives
        assert len(beside.folders) == 2
        for one in (following, beside):
            one.process.send_signal(signal.SIGTERM)
            assert one.process.wait(60) == 0
        assert following.folders == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks through /proc")
def test_ctrl_c_in_the_terminal_saves_the_training(tmp_path):
    studio = Running(tmp_path)
    studio.train(archive(tmp_path, "mine", 12), "mine")
    _wait_for((studio.runs / "mine" / "log.jsonl").exists)
    os.killpg(studio.process.pid, signal.SIGINT)  # as a terminal does, to all that belong to it
    assert studio.process.wait(60) == 0
    assert json.loads((studio.runs / "mine" / "config.json").read_text())["_class_name"] == "BPSModel"
    assert studio.folders == []


@pytest.mark.slow
def test_a_terminal_that_closes_ends_the_studio_and_leaves_no_folder(tmp_path):
    studio = Running(tmp_path)
    assert len(studio.folders) == 1
    for _ in range(2):  # the terminal's, and the shell's
        os.killpg(studio.process.pid, signal.SIGHUP)
    assert studio.process.wait(60) == 0
    assert studio.folders == []
    lasting = Running(tmp_path, nohup=True)
    os.killpg(lasting.process.pid, signal.SIGHUP)
    lasting.process.send_signal(signal.SIGTERM)
    assert lasting.process.wait(60) == 0
    assert lasting.folders == []
