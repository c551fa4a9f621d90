"""`powersteer prepare`: what it leaves, what it refuses, and that nothing is lost or done twice."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_sources import noise, write_ade20k, write_coco, write_faults

from powersteer.apps.bench import prepare as bench
from powersteer.conditions.extractor import EXTRACTORS
from powersteer.core.errors import PowersteerError
from powersteer.data.layouts import read_rows
from powersteer.data.pairs import Pairs
from powersteer.data.prepare import ledger
from powersteer.data.prepare.make import Maker, scaled
from powersteer.data.prepare.prepare import PrepareConfig, keys_of, prepare
from powersteer.data.prepare.sources.base import Item
from powersteer.data.prepare.workers import in_processes
from spawned import Edges, build_double

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def edges_extractor(monkeypatch):
    """An extractor for these tests alone: others read the catalogue as it ships."""
    import_module("powersteer.conditions.extractors.catalogue")  # before the copy: it registers but once
    monkeypatch.setattr(EXTRACTORS, "known", dict(EXTRACTORS.known))
    EXTRACTORS.add("sketch", "test-edges", "nothing")(Edges)


def run(source, out_dir, **settings):
    given = {"task": "sketch", "extractor": "test-edges", "workers": 1} | settings
    return prepare(PrepareConfig(source=str(source), out_dir=out_dir, **given), QUIET)


def pictures(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(seed + i, (32, 24)).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def rejected(out_dir):
    with (out_dir / "rejected.csv").open(encoding="utf-8", newline="") as file:
        return {(row["split"], row["name"]): row["reason"] for row in csv.DictReader(file)}


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


# -- what is left


def test_training_reads_what_was_prepared(tmp_path):
    source = pictures(tmp_path / "source", 3)
    before = contents(source)
    result = run(source, tmp_path / "out")
    assert result.pairs == {"train": 3} and result.rejected == 0 and result.complete
    pairs = Pairs(tmp_path / "out" / "train", (24, 32))
    assert len(pairs) == 3 and pairs.texts == ["picture 0", "picture 1", "picture 2"]
    row = pairs.rows[0]
    assert row.image.content() == before["0.jpg"]  # copied byte for byte
    assert row.conditioning_image.condition(1, "sketch").size == (32, 24)
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["conditioning"] == {"kind": "sketch", "channels": 1, "extractor": "test-edges"}
    assert described["source"] == "folder source" and described["resolution"] is None
    assert contents(source) == before


def test_resolution_reencodes_in_the_same_format(tmp_path):
    source = pictures(tmp_path / "source", 1)
    noise(5, (20, 40)).save(source / "tall.png")
    run(source, tmp_path / "out", resolution=16)
    small = {file.name: Image.open(file) for file in (tmp_path / "out" / "train" / "images").iterdir()}
    assert {name: (image.format, image.size) for name, image in small.items()} == {
        "0.jpg": ("JPEG", (21, 16)),
        "tall.png": ("PNG", (16, 32)),
    }


def test_a_subject_is_scaled_as_a_whole():
    from powersteer.conditions.extractor import Box, Subject

    labels = np.full((40, 60), -1)
    labels[:20] = 140
    subject = scaled(Subject(noise(0, (60, 40)), labels=labels, boxes=(Box("a", 0, 20, 30, 40),)), 20)
    assert subject.picture.size == (30, 20) and subject.boxes == (Box("a", 0, 10, 15, 20),)
    assert (subject.labels[:10] == 140).all() and (subject.labels[10:] == -1).all()


@pytest.mark.parametrize("captions", ["all", "first", "random"])
def test_captions(tmp_path, captions):
    write_coco(tmp_path / "coco")
    run(tmp_path / "coco", tmp_path / "out", captions=captions)
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    texts = [json.loads(line).get("text") for line in lines]
    both = ["A dog.", "A café for dogs"]
    if captions == "all":
        assert texts == [both, [], ["Two"], []]
    else:
        assert texts[0] in ([both[0]] if captions == "first" else both) and texts[1:] == [None, "Two", None]


def test_segmentation_and_layout_of_coco_and_ade20k(tmp_path):
    common = {"extractor": None, "task": "segmentation"}
    assert run(write_ade20k(tmp_path / "ade"), tmp_path / "a", **common).pairs == {"train": 2, "validation": 2}
    made = Image.open(tmp_path / "a" / "train" / "conditions" / "ADE_train_00000000.png")
    assert made.mode == "RGB" and made.getpixel((0, 0)) == (0, 0, 0) and made.getpixel((1, 0)) == (120, 120, 120)
    write_coco(tmp_path / "coco")
    result = run(tmp_path / "coco", tmp_path / "b", **common)
    assert result.pairs == {"train": 3, "validation": 1} and result.rejected == 1
    result = run(tmp_path / "coco", tmp_path / "c", extractor=None, task="layout")
    assert result.pairs == {"train": 3, "validation": 1}
    assert "no boxes" in rejected(tmp_path / "c")["train", "000000000007"]
    record = json.loads((tmp_path / "c" / "dataset.json").read_text())["conditioning"]
    drawn = Image.open(tmp_path / "c" / "train" / "conditions" / "000000000001.png")
    assert list(drawn.getpixel((10, 6))) == record["palette"]["dog"]
    assert list(drawn.getpixel((20, 2))) == record["palette"]["person"]


@pytest.mark.parametrize("task", ["sketch", "segmentation", "layout", "style"])
def test_openmoji_in_every_task(tmp_path, monkeypatch, task):
    from powersteer.data.prepare.sources import openmoji

    listed = openmoji.list_drawings()
    splits = openmoji.split_by_concept([one.concept for one in listed])
    names = ("train", "validation", "test")
    some = [one for name in names for one in [one for one in listed if splits[one.concept] == name][:3]]
    monkeypatch.setattr(openmoji, "list_drawings", lambda: some)
    monkeypatch.setattr(openmoji, "split_by_concept", lambda concepts: splits)
    result = run("openmoji", tmp_path / "out", task=task, extractor=None)
    assert sum(result.pairs.values()) + result.rejected == 9 and set(result.pairs) == {"train", "validation", "test"}
    modes = {Image.open(file).mode for file in (tmp_path / "out" / "train" / "conditions").iterdir()}
    assert modes == {{"sketch": "L", "style": "RGBA"}.get(task, "RGB")}
    assert "CC BY-SA 4.0" in json.loads((tmp_path / "out" / "dataset.json").read_text())["licence"]


def test_features_are_arrays(tmp_path):
    source = pictures(tmp_path / "source", 2)
    np.save(source / "0.npy", np.full((5, 3, 4), 2.5, dtype=np.float16))
    result = run(source, tmp_path / "out", task="feature", extractor=None, resolution=48)
    assert result.pairs == {"train": 1} and "no feature map" in rejected(tmp_path / "out")["train", "1.jpg"]
    made = np.load(tmp_path / "out" / "train" / "conditions" / "0.npy")
    assert made.shape == (5, 3, 4) and made.dtype == np.float32 and (made == 2.5).all()


# -- what is held out is never trained on


def test_nothing_held_out_is_among_the_training_pictures(tmp_path):
    source = tmp_path / "source"
    train, held_out = pictures(source / "train", 6), pictures(source / "val", 3, seed=50)
    (train / "0.jpg").write_bytes((held_out / "0.jpg").read_bytes())
    smooth = noise(9, (6, 4)).resize((96, 64), Image.Resampling.BICUBIC)
    smooth.save(held_out / "1.jpg", quality=95)
    smooth.resize((72, 48), Image.Resampling.BICUBIC).save(train / "1.jpg", quality=80)
    result = run(source, tmp_path / "out")
    assert result.pairs == {"train": 4, "validation": 3}  # "2.jpg" is a name in both, and another picture
    assert rejected(tmp_path / "out") == {
        ("train", "0.jpg"): "held out too, as '0.jpg': the same file",
        ("train", "1.jpg"): "looks like '1.jpg', which is held out",
    }


def test_a_picture_of_cocos_validation_set_in_the_training_folder(tmp_path):
    root = write_coco(tmp_path / "coco")
    noise(77).save(root / "train2017" / "000000000011.jpg")  # the name alone tells
    run(root, tmp_path / "out")
    assert rejected(tmp_path / "out") == {
        ("train", "000000000011"): "held out too, as '000000000011': the same subject",
    }


# -- bad input


def test_bad_files_are_refused_and_the_run_goes_on(tmp_path):
    source = pictures(tmp_path / "source", 2)
    faults = write_faults(source)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(source / "clear.png")
    noise(8).convert("P").save(source / "palette.png")
    result = run(source, tmp_path / "out", background="#102030")
    del faults["none.jpg"]
    reasons = rejected(tmp_path / "out")
    assert {name for _, name in reasons} == set(faults) and result.pairs == {"train": 5}
    assert all(faults[name] in reason for (_, name), reason in reasons.items())
    clear = Image.open(tmp_path / "out" / "train" / "images" / "clear.png")
    assert clear.mode == "RGB" and clear.getpixel((3, 3)) == (0x10, 0x20, 0x30)


def test_faults_of_an_extractor_refuse_its_picture_only(tmp_path, monkeypatch):
    def fail(self, subject):
        if subject.picture.size == (64, 64):
            raise ZeroDivisionError("by zero")
        return Image.new("L", (9, 99) if subject.picture.size == (50, 50) else subject.picture.size)

    monkeypatch.setattr(Edges, "__call__", fail)
    source = pictures(tmp_path / "source", 1)
    for side in (50, 64):
        noise(size=(side, side)).save(source / f"{side}.png")
    run(source, tmp_path / "out")
    assert rejected(tmp_path / "out") == {
        ("train", "50.png"): "test-edges made a condition of 9×99 pixels of a picture of 50×50",
        ("train", "64.png"): "ZeroDivisionError: by zero",
    }


def test_boxes_and_labels_outside_are_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rows = []
    for i, (label, box) in enumerate([("dog", [0, 0, 9, 9]), ("dog", [0, 0, 99, 9]), ("unicorn", [0, 0, 9, 9])]):
        noise(i).save(source / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "boxes": [{"label": label, "box": box}]}))
    rows.append(json.dumps({"file_name": "none.png"}))
    (source / "metadata.jsonl").write_text("\n".join(rows))
    assert run(source, tmp_path / "out", task="layout", extractor=None).pairs == {"train": 1}
    reasons = rejected(tmp_path / "out")
    assert "outside the picture" in reasons["train", "1.png"]
    assert "'unicorn' is not among the palette's" in reasons["train", "2.png"]
    assert "none.png cannot be read" in reasons["train", "none.png"]


def test_strange_names_make_plain_files(tmp_path):
    names = ["füchse/狐.png", "a" * 240 + ".png", "A.png", "a.png", "a.jpg", "with space.v2.png"]
    items = [Item(name, "train", lambda: None) for name in names]
    keys = list(keys_of(items))
    assert len({key.lower() for key in keys}) == len(names)
    assert keys[2] == "A" and all(key.isascii() and "." not in key and len(key) <= 100 for key in keys)
    assert keys == list(keys_of(items))
    source = tmp_path / "source"
    (source / "füchse").mkdir(parents=True)
    for i, name in enumerate(names):
        noise(i).save(source / name)
    result = run(source, tmp_path / "out", shards=True)
    assert result.pairs == {"train": 6}
    assert len(read_rows(tmp_path / "out" / "train")) == 6


@pytest.mark.parametrize("where", ["source/out", ".", "source"])
def test_source_and_output_lie_apart(tmp_path, where):
    pictures(tmp_path / "source", 1)
    with pytest.raises(PowersteerError, match="one inside the other"):
        run(tmp_path / "source", tmp_path / where)
    assert {file.name for file in tmp_path.rglob("*")} == {"source", "0.jpg", "0.txt"}


def test_an_output_folder_of_something_else_is_left_alone(tmp_path):
    source = pictures(tmp_path / "source", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(PowersteerError, match="is not empty"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "new")
    with pytest.raises(PowersteerError, match=r"begun otherwise \(resolution differ\)"):
        run(source, tmp_path / "new", resolution=16)
    with pytest.raises(PowersteerError, match=r"begun otherwise \(parts differ\)"):
        run(source, tmp_path / "new", num_shards=2)
    noise(9).save(source / "9.png")
    with pytest.raises(PowersteerError, match=r"begun otherwise \(pictures, digest differ\)"):
        run(source, tmp_path / "new")


def test_nothing_at_all_is_an_error(tmp_path):
    source = pictures(tmp_path / "source", 2)
    with pytest.raises(PowersteerError, match=r"no pair could be made; 0.jpg: there is no label map"):
        run(source, tmp_path / "out", task="segmentation", extractor=None)


# -- nothing lost, nothing done twice


def test_a_second_run_changes_nothing(tmp_path):
    source = pictures(tmp_path / "source", 4)
    write_faults(source)
    first = run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert run(source, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before


def test_a_log_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    source = pictures(tmp_path / "source", 5)
    write_faults(source)
    run(source, tmp_path / "out")
    whole = contents(tmp_path / "out")
    log = tmp_path / "out" / "rows" / "00000-of-00001.jsonl"
    log.write_bytes(log.read_bytes()[:-700])
    made = []
    make = Maker.__call__
    monkeypatch.setattr(Maker, "__call__", lambda self, job: made.append(job.key) or make(self, job))
    run(source, tmp_path / "out")
    assert 0 < len(made) < 9
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("shards", [False, True])
def test_parts_on_several_machines_make_one_data_set(tmp_path, shards):
    source = pictures(tmp_path / "source", 7)
    write_faults(source)
    for index in (2, 0, 1):
        result = run(source, tmp_path / "parts", shards=shards, num_shards=3, shard_index=index)
        assert result.complete == (index == 1)
    run(source, tmp_path / "one", shards=shards)
    assert rejected(tmp_path / "parts") == rejected(tmp_path / "one") and len(rejected(tmp_path / "one")) == 4
    if not shards:
        parts, one = (contents(tmp_path / name / "train") for name in ("parts", "one"))
        assert parts == one and len(one) == 2 * 8 + 1
    before = contents(tmp_path / "parts")
    run(source, tmp_path / "parts", shards=shards, num_shards=3, shard_index=0)
    assert contents(tmp_path / "parts") == before


def test_shards_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "PAIRS_A_SHARD", 3)
    source = pictures(tmp_path / "source", 8)
    make = Maker.__call__

    def stop(self, job):
        if job.key == "5":
            raise KeyboardInterrupt
        return make(self, job)

    monkeypatch.setattr(Maker, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", shards=True)
    assert [file.name for file in (tmp_path / "out" / "train").glob("*.tar")] == ["00000-000000.tar"]
    monkeypatch.setattr(Maker, "__call__", make)
    run(source, tmp_path / "out", shards=True)
    assert {file.name for file in (tmp_path / "out" / "train").rglob("*") if file.is_file()} == {
        f"00000-00000{i}.tar" for i in range(3)
    }
    rows = read_rows(tmp_path / "out" / "train")
    assert [row.text for row in rows] == [f"picture {i}" for i in range(8)]
    assert rows[6].image.content() == (source / "6.jpg").read_bytes()
    assert rows[6].conditioning_image.condition(1, "sketch").size == (32, 24)


KILLED = """
import time
from pathlib import Path
from powersteer.data.prepare.prepare import PrepareConfig, prepare
from powersteer.conditions.extractor import EXTRACTORS
from spawned import Edges
EXTRACTORS.add("sketch", "test-edges")(Edges)
call = Edges.__call__
Edges.__call__ = lambda self, subject: time.sleep(0.05) or call(self, subject)
if __name__ == "__main__":
    prepare(PrepareConfig(task="sketch", source="source", out_dir="out", extractor="test-edges", workers=2))
"""


@pytest.mark.slow
def test_killed_with_its_processes_it_goes_on(tmp_path):
    """SIGKILL amid the work: no row without whole files, none of them made again, and no process left behind."""
    source = pictures(tmp_path / "source", 60)
    (tmp_path / "killed.py").write_text(KILLED)
    path = os.pathsep.join([str(p) for p in sys.path if p])
    with subprocess.Popen(
        [sys.executable, "killed.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        log = tmp_path / "out" / "rows" / "00000-of-00001.jsonl"
        until = time.monotonic() + 240
        while time.monotonic() < until and not (log.exists() and log.read_bytes().count(b"\n") >= 8):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    rows = [json.loads(line)["row"] for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 8 <= len(rows) < 60 and not (tmp_path / "out" / "train" / "metadata.jsonl").exists()
    files = [tmp_path / "out" / "train" / row[name] for row in rows for name in row if name.endswith("file_name")]
    times = {file: file.stat().st_mtime_ns for file in files}
    while time.monotonic() < until and (left := _processes_in(tmp_path)):
        time.sleep(0.05)
    assert not left
    assert run(source, tmp_path / "out").pairs == {"train": 60}
    assert {file: file.stat().st_mtime_ns for file in files} == times
    run(source, tmp_path / "straight")
    assert contents(tmp_path / "out" / "train") == contents(tmp_path / "straight" / "train")


def _processes_in(folder):
    """Processes whose working folder it is."""
    found = []
    for process in os.listdir("/proc") if sys.platform == "linux" else []:  # noqa: PTH208
        try:
            found += [process] if process.isdigit() and os.readlink(f"/proc/{process}/cwd") == str(folder) else []  # noqa: PTH115
        except OSError:
            continue
    return found


def test_two_processes_at_one_part(tmp_path):
    from filelock import FileLock

    source = pictures(tmp_path / "source", 1)
    run(source, tmp_path / "out")
    with FileLock(tmp_path / "out" / "rows" / "00000-of-00001.lock"), pytest.raises(PowersteerError, match="another"):
        run(source, tmp_path / "out")


def test_processes_share_the_work_and_a_death_is_told():
    made = list(in_processes(build_double, range(40), 2))
    assert sorted(value for value, _ in made) == [2 * i for i in range(40)]
    assert os.getpid() not in {process for _, process in made}
    assert {process for _, process in in_processes(build_double, range(3), 1)} == {os.getpid()}
    with pytest.raises(PowersteerError, match="fewer --workers"):
        list(in_processes(build_double, [1, -1], 2))


# -- the command line


def test_prepare_from_the_command_line(run, tmp_path):
    source = pictures(tmp_path / "source", 2)
    (source / "bad.png").write_bytes(b"")
    given = ("prepare", "sketch", source, tmp_path / "out", "--extractor", "test-edges", "--workers", 1)
    code, out, _ = run(*given)
    assert code == 0 and "2 pairs" in out and "1 refused: see rejected.csv" in out
    code, out, _ = run(*given, "--json")
    assert code == 0 and json.loads(out)["pairs"] == {"train": 2}
    code, out, _ = run("prepare", "--list")
    assert code == 0 and "line art in the source" in out and "segmentation" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give TASK, SOURCE and OUT_DIR"),
        (("sketch", "SOURCE", "OUT", "low=1", "--extractor", "drawn"), "unknown key 'low'"),
        (("sketch", "SOURCE", "OUT", "--extractor", "pen"), "there is no extractor 'pen' for sketch"),
        (("painting", "SOURCE", "OUT"), "there is no task 'painting': give one of sketch, "),
        (("sketch", "NONE", "OUT"), "there is no folder"),
        (("sketch", "SOURCE", "OUT", "--background", "nothing"), "'background': unknown color"),
        (("sketch", "SOURCE", "OUT", "--shard-index", "2", "--num-shards", 2), "shard_index must be below num_shards"),
        (("sketch", "SOURCE", "OUT", "--shard-index", "0"), "shard_index is the part of how many? Give num_shards"),
        (("sketch", "--list"), "--list prints all extractors, and does nothing else"),
        (("--list", "--captions", "first"), "--list prints all extractors, and does nothing else"),
        (("sketch", "SOURCE", "OUT", "--workers", "99999999999999999999"), "'workers': Input should be less than"),
        (("sketch", "SOURCE", "OUT", "--resolution", "100000"), "'resolution': Input should be less than"),
        (("sketch", "SOURCE", "OUT", "--num-shards", "100000"), "'num_shards': Input should be less than"),
        (("sketch", "n" * 300, "OUT"), "there is no folder nnn"),
        (
            ("sketch", "openmoji", "OUT", "--extractor", "test-edges", "--background", "red"),
            "openmoji is drawn on white",
        ),
        (("sketch", "SOURCE", "OUT", "--captions", "none"), "'captions': Input should be"),
    ],
)
def test_wrong_commands_change_nothing(run, tmp_path, args, words):
    pictures(tmp_path / "SOURCE", 1)
    paths = {name: tmp_path / name for name in ("SOURCE", "OUT", "NONE")}
    code, _, err = run("prepare", *(paths.get(one, one) for one in args))
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "OUT").exists()


def test_bench_of_an_extractor(run, tmp_path):
    file = tmp_path / "bench.json"
    code, out, _ = run("bench", "prepare", "--task", "layout", "--pictures", 8, "--side", 32, "--json", file)
    (row,) = json.loads(file.read_text())["rows"]
    assert code == 0 and "boxes" in out and row["one"] > 0 and row["scaling"] == pytest.approx(row["two"] / row["one"])
    with pytest.raises(PowersteerError, match="there is no task 'painting'"):
        bench.bench_prepare("painting")


def test_a_fresh_process_knows_all_extractors(tmp_path):
    source = pictures(tmp_path / "source", 1)
    given = ["layout", str(source), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "powersteer.apps.cli", "prepare", *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "there are no boxes here" in done.stderr
