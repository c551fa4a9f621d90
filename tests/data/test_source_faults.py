"""Sources as people leave them: splits by any name, names claimed twice, files of no use, JSON of another standard."""

import json
import os
import random
from contextlib import suppress

import pytest
from PIL import Image
from rich.console import Console
from test_sources import noise, write_ade20k, write_coco

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.conditions.palettes import Palette
from powersteer.data.conditioning import conditioning_of
from powersteer.data.layouts import read_rows
from powersteer.data.prepare.prepare import PrepareConfig, prepare
from powersteer.data.prepare.sources import find_source, json_scan
from powersteer.data.prepare.sources.base import Wanted
from powersteer.data.prepare.sources.coco import Coco
from powersteer.data.splits import SPLITS, is_held_out, split_of


def put(folder, *names, seed=0):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed + i).save(folder / name, **({"format": "JPEG"} if name.endswith(".jfif") else {}))
    return folder


def items_of(folder, task="sketch"):
    source = find_source(str(folder))
    return [(item.split, item.name) for item in source.items(Wanted(task))], source


def refused(folder, words, task="sketch"):
    with pytest.raises(PowersteerError, match=words) as error:
        find_source(str(folder)).items(Wanted(task))
    assert "\n" not in str(error.value)


# -- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("validation", "validation"),
        ("val", "validation"),
        ("Val", "validation"),
        ("VALID", "validation"),
        ("dev", "validation"),
        ("eval", "validation"),
        ("held_out", "validation"),
        ("val2017", "validation"),
        ("val-2", "validation"),
        ("test", "test"),
        ("Test", "test"),
        ("testing", "test"),
        ("test_1", "test"),
        ("train", "train"),
        ("Training", "train"),
        ("train2017", "train"),
        ("contest", None),
        ("validations", None),
        ("tests", None),
        ("2017", None),
        ("", None),
    ],
)
def test_what_a_folder_holds_by_its_name(name, split):
    assert split_of(name) == split and is_held_out(name) == (split in ("validation", "test"))


@pytest.mark.parametrize("held_out", ["validation", "val", "valid", "dev", "Val", "Test", "test", "holdout"])
@pytest.mark.parametrize("train", ["train", "Train", "training", None])
def test_what_is_held_out_is_never_trained_on(tmp_path, held_out, train):
    root = put(tmp_path / "s", f"{train}/a.jpg" if train else "a.jpg", f"{held_out}/b.jpg", f"{held_out}/deep/c.jpg")
    split = "test" if "est" in held_out else "validation"
    items, source = items_of(root)
    assert items == [("train", "a.jpg"), (split, "b.jpg"), (split, "deep/c.jpg")] and source.unused == {}


def test_prepare_keeps_the_split_of_the_fault(tmp_path):
    """``train`` and ``validation``: all went to ``train``."""
    root = put(tmp_path / "s", "train/0.jpg", "train/1.jpg", "validation/2.jpg", "validation/3.jpg")
    config = PrepareConfig(task="sketch", source=str(root), out_dir=tmp_path / "o", workers=1, extractor="canny")
    result = prepare(config, Console(quiet=True))
    assert result.pairs == {"train": 2, "validation": 2}
    for split, names in (("train", ["0.jpg", "1.jpg"]), ("validation", ["2.jpg", "3.jpg"])):
        assert sorted(file.name for file in (tmp_path / "o" / split / "images").iterdir()) == names


def test_two_folders_for_one_split(tmp_path):
    root = put(tmp_path, "train/a.jpg", "val/b.jpg", "validation/c.jpg")
    refused(root, "'val' and 'validation' are both 'validation': remove or rename one")
    (root / "val").rename(root / "VALIDATION")
    refused(root, "'VALIDATION' and 'validation' are both 'validation'")
    (root / "VALIDATION").rename(root / "training")
    refused(root, "'train' and 'training' are both 'train'")


def test_held_out_folders_within_what_is_trained_on(tmp_path):
    root = put(
        tmp_path, "train/a.jpg", "train/x/val/b.jpg", "train/test/c.jpg", "validation/d.jpg", "more/e.jpg", "f.jpg"
    )
    items, source = items_of(root)
    assert items == [("train", "a.jpg"), ("validation", "d.jpg")]
    assert source.unused == {
        "lie outside of train, validation": ["f.jpg", "more/e.jpg"],
        "lie in folders of held-out pictures": ["train/test/c.jpg", "train/x/val/b.jpg"],
    }
    root = put(tmp_path / "plain", "a.jpg", "x/val/b.jpg")
    items, source = items_of(root)
    assert items == [("train", "a.jpg")] and source.unused == {"lie in folders of held-out pictures": ["x/val/b.jpg"]}


def test_metadata_that_would_not_be_read(tmp_path):
    row = json.dumps({"file_name": "a.jpg", "text": "a"})
    root = put(tmp_path / "s", "train/a.jpg", "val/b.jpg")
    (root / "metadata.jsonl").write_text(row)
    refused(root, r"metadata.jsonl is not read, as .*train is there: write one in each split's folder")
    root = put(tmp_path / "t", "train/a.jpg")
    (root / "train" / "metadata.jsonl").write_text(row)
    refused(root, r"train/metadata.jsonl is not read: give .*train as the source, or move it up")
    root = put(tmp_path / "u", "a.jpg", "val/b.jpg")
    (root / "metadata.jsonl").write_text(row.replace("a.jpg", "val/b.jpg"))
    refused(root, r"line 1: 'val/b.jpg' lies in a folder of held-out pictures: move the row")
    (root / "metadata.jsonl").write_text(row)
    (root / "val" / "metadata.jsonl").write_text(row.replace("a.jpg", "b.jpg"))
    assert items_of(root)[0] == [("train", "a.jpg"), ("validation", "b.jpg")]


# -- names and files


@pytest.mark.parametrize("beside", ["txt", "npy"])
def test_two_pictures_that_share_what_lies_beside(tmp_path, beside):
    root = put(tmp_path, "a.png", "a.jpg", "b.png")
    assert len(items_of(root)[0]) == 3  # nothing to share
    (root / f"a.{beside}").write_text("a fox")
    refused(root, rf"'.*a.jpg' and '.*a.png' both claim .*a.{beside}: rename one of the pictures")
    rows = [{"file_name": name, "text": name, "features_file_name": "b.npy"} for name in ("a.png", "a.jpg")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items, source = items_of(root)  # each row says it all
    assert len(items) == 2 and source.unused == {"are in no row of metadata.jsonl": [f"a.{beside}", "b.png"]}


def test_a_roundabout_path_to_the_source(tmp_path):
    put(tmp_path, "s/train/a.jpg", "s/val/b.jpg", "s/more.jpg")
    (tmp_path / "x").mkdir()
    items, source = items_of(tmp_path / "x" / ".." / "s")
    assert items == [("train", "a.jpg"), ("validation", "b.jpg")]
    assert source.unused == {"lie outside of train, val": ["more.jpg"]}


def test_what_is_read_and_what_is_left(tmp_path):
    names = ["a.jfif", "b.tga", "deep/er/c.JPG", *(["d.avif"] if ".avif" in Image.registered_extensions() else [])]
    root = put(tmp_path, *names)
    (root / "a.txt").write_bytes(b"\xef\xbb\xbfein Fuchs")
    for name in ("._a.jfif", ".DS_Store", "Thumbs.db", "__MACOSX/a.png", ".hidden/a.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    for name in ("e.heic", "notes.md", "z.txt", "deep/x.npy"):
        (root / name).write_bytes(b"x")
    items, source = items_of(root)
    assert {name for _, name in items} == set(names) and len(items) == len(names)
    assert source.items(Wanted("sketch"))[0].captions == ("ein Fuchs",)
    assert source.unused == {"are no pictures, and belong to none": ["deep/x.npy", "e.heic", "notes.md", "z.txt"]}


def test_the_end_says_what_was_not_used_or_asked_in_vain(run, tmp_path):
    root = put(tmp_path / "s", "a.jpg", "b.jpg")
    (root / "b.txt").write_text("b")
    (root / "c\x1b[31m[bold].heic").write_text("x")
    status, printed, err = run(
        "prepare", "sketch", root, tmp_path / "o", "--extractor", "canny", "--captions", "random"
    )
    assert status == 0 and "\x1b" not in printed + err
    assert (
        "warning: 1 files of the source are no pictures, and belong to none, and were not used, such as "
        "c\\x1b[31m[bold].heic\n"
    ) in err
    assert "warning: 1 pictures have no caption, such as a.jpg: train with default_prompt" in err
    assert "note: no picture has several captions: captions=random changes nothing" in err and "2 pairs" in printed
    status, printed, _ = run("prepare", "sketch", root, tmp_path / "o2", "--extractor", "canny", "--json")
    found = [(one["name"], one["count"]) for one in json.loads(printed)["findings"]]
    assert found == [("unused", 1), ("no_caption", 1)]
    (root / "a.txt").write_text("a")
    (root / "c\x1b[31m[bold].heic").unlink()
    root = root.rename(tmp_path / "test")
    _, _, err = run("prepare", "sketch", root, tmp_path / "o3", "--extractor", "canny")
    assert "warning: the source is called test, and is prepared for training all the same" in err


def test_names_that_are_no_text(tmp_path):
    root = put(tmp_path / "s", "a.jpg")
    os.rename(root / "a.jpg", os.fsencode(root) + b"/f\xff.jpg")  # noqa: PTH104
    (root / "a.jpg").write_bytes(b"no picture")
    os.rename(root / "a.jpg", os.fsencode(root) + b"/g\xff.jpg")  # noqa: PTH104
    config = PrepareConfig(task="sketch", source=str(root), out_dir=tmp_path / "o", workers=1, extractor="canny")
    for _ in range(2):  # made, then gone on with
        result = prepare(config, Console(quiet=True))
        assert result.pairs == {"train": 1} and result.rejected == 1
    assert json.loads((tmp_path / "o" / "train" / "metadata.jsonl").read_text())["source"] == r"f\xff.jpg"
    assert r"g\xff.jpg,train," in (tmp_path / "o" / "rejected.csv").read_text()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": 5}, "line 1: 'file_name' must name a file, not 5"),
        ({"file_name": ""}, "line 1: 'file_name' must name a file, not nothing"),
        ({"file_name": "a.jpg", "labels_file_name": 7}, "line 1: 'labels_file_name' must name a file, not 7"),
        ({"file_name": "a.jpg", "text": 7}, "line 1: column 'text' holds 7, which is no text"),
        ({"file_name": "a.jpg", "concept": [1]}, "line 1: 'concept' must be a word or a number"),
        ('{"file_name": "a.jpg", "file_name": "b.jpg"}', "line 1 is not JSON: 'file_name' comes twice"),
        ('{"file_name": "a.jpg", "boxes": NaN}', "line 1 is not JSON: NaN is no number"),
        (r'{"file_name": "a \ud83d.jpg"}', "line 1 is not JSON: it holds half a character"),
        ('{"a": ' * 100_000, "line 1 is not JSON: nested deeper than 100 levels"),
        ("[]", "is one JSON array"),
        (b"\xff\xfe{\0}\0", "metadata.jsonl is not UTF-8 text but UTF-16"),
    ],
)
def test_metadata_that_is_no_such_thing(tmp_path, row, words):
    put(tmp_path, "a.jpg")
    content = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    (tmp_path / "metadata.jsonl").write_bytes(content)
    refused(tmp_path, words)


@pytest.mark.parametrize("name", ["x" * 5000 + ".jpg", "a\0b.jpg", "gone.jpg"])
def test_files_that_are_not_there_are_refused_one_by_one(tmp_path, name):
    root = put(tmp_path / "s", "a.jpg")
    rows = [{"file_name": "a.jpg"}, {"file_name": name}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PrepareConfig(task="sketch", source=str(root), out_dir=tmp_path / "o", workers=1, extractor="canny")
    assert (result := prepare(config, Console(quiet=True))).pairs == {"train": 1} and result.rejected == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "dataset.json is not JSON: nested deeper than 100 levels"),
        ("[1]", "was begun otherwise"),
        ('{"mine": 1}', "was begun otherwise"),
        ('{"mine": 1, "mine": 2}', "'mine' comes twice"),
        ("\xff", "is not UTF-8 text"),
    ],
)
def test_a_description_that_is_not_this_runs_is_left_alone(tmp_path, content, words):
    root = put(tmp_path / "s", "a.jpg")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "dataset.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(PowersteerError, match=words):
        prepare(PrepareConfig(task="sketch", source=str(root), out_dir=tmp_path / "o", extractor="canny"))
    assert (tmp_path / "o" / "dataset.json").read_bytes() == content.encode("latin-1")


def test_a_log_that_is_not_this_programs_is_made_anew(tmp_path):
    root = put(tmp_path / "s", "a.jpg", "b.jpg")
    config = PrepareConfig(task="sketch", source=str(root), out_dir=tmp_path / "o", workers=1, extractor="canny")
    whole = prepare(config, Console(quiet=True))
    log = tmp_path / "o" / "rows" / "00000-of-00001.jsonl"
    lines = log.read_bytes()
    for damage in (
        b"[" * 100_000 + b"\n",
        b'{"key": 5, "name": "a", "split": "train", "row": null, "reason": null}\n',
        b'{"key": "a", "name": "a", "split": "train", "row": [], "reason": null}\n',
        b'{"key": "a"}\n',
        b"\xff\n",
    ):
        log.write_bytes(damage + lines)
        assert prepare(config, Console(quiet=True)).pairs == whole.pairs
        assert log.read_bytes() == lines


def test_a_long_picture_is_not_blown_up(tmp_path):
    root = put(tmp_path / "s", "a.jpg")
    Image.new("RGB", (16, 60_000)).save(root / "long.png")
    config = PrepareConfig(
        task="sketch", source=str(root), out_dir=tmp_path / "o", workers=1, extractor="canny", resolution=2048
    )
    assert prepare(config, Console(quiet=True)).pairs == {"train": 1}
    assert (
        "at this resolution it has 2048×7680000 pixels, more than 178 million"
        in (tmp_path / "o" / "rejected.csv").read_text()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"resolution": 7},
        {"resolution": 8193},
        {"num_shards": 0},
        {"num_shards": 10**6},
        {"shard_index": -1, "num_shards": 2},
        {"shard_index": 0},
        {"workers": 0},
        {"workers": 10**20},
        {"workers": float("nan")},
        {"background": "#"},
        {"captions": "some"},
    ],
)
def test_numbers_out_of_range(tmp_path, settings):
    with pytest.raises(ValueError, match="1 validation error"):
        PrepareConfig(task="sketch", source=str(tmp_path), out_dir=tmp_path / "o", **settings)


# -- COCO and ADE20K


def test_nested_and_doubled_pictures_of_coco(tmp_path):
    root = write_coco(tmp_path)
    put(root / "train2017", "more/x.jpg", seed=50)
    put(root, "test2017/y.jpg", seed=51)
    (root / "train2017" / "notes.txt").write_text("x")
    items, source = items_of(root)
    assert ("train", "more/x") in items and source.unused == {
        "are none of COCO 2017's": ["test2017", "train2017/notes.txt"]
    }
    assert (
        next(i for i in Coco(root).items(Wanted("sketch")) if i.name == "more/x").load().subject.picture.mode == "RGB"
    )
    put(root / "train2017", f"{1:012d}.png", seed=52)
    refused(root, r"train2017: '000000000001.jpg' and '000000000001.png' are both '000000000001'")


def test_doubled_pictures_of_ade20k(tmp_path):
    root = write_ade20k(tmp_path)
    put(root, "images/training/deep/x.jpg", "images/testing/y.jpg", "objects/z.png")
    items, source = items_of(root)
    assert ("train", "deep/x") in items
    assert source.unused == {"are none of the scene parsing benchmark's": ["images/testing/y.jpg", "objects"]}
    put(root / "images" / "training", "ADE_train_00000000.png")
    refused(root, r"ADE_train_00000000.jpg' and '.*ADE_train_00000000.png' are both 'ADE_train_00000000'")


IMAGE = '{"id": 1, "file_name": "000000000001.jpg", "width": 24, "height": 16}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": [1]}', "a record of 'images' has no 'id'"),
        (
            '{"images": [{"id": [1], "file_name": "a", "width": 1, "height": 1}]}',
            r"'id' of 'images' is \[1\], not a whole",
        ),
        ('{"images": [{"id": 1, "file_name": 5, "width": 1, "height": 1}]}', "'file_name' of 'images' is 5, not text"),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 1.5, "height": 1}]}',
            "'width' of 'images' is 1.5, not a whole",
        ),
        (f'{{"images": [{IMAGE}, {IMAGE}]}}', "the image 1, '000000000001.jpg', comes twice"),
        (f'{{"images": [{IMAGE}, {IMAGE.replace("1,", "2,", 1)}]}}', "the image 2, '000000000001.jpg', comes twice"),
        (f'{{"images": [{IMAGE}], "annotations": [{{"image_id": null}}]}}', "'image_id' of 'annotations' is None"),
        (f'{{"images": [{IMAGE}], "images": []}}', "is not JSON: 'images' comes twice"),
        ('{"images": [{"id": 1, "id": 2}]}', "is not JSON: 'id' comes twice"),
        ('{"images": [{"id": NaN}]}', "is not JSON: NaN is no number"),
        ('{"images": [{"id": 1e999}]}', "is not JSON: 1e999 is too large"),
        ('{"images": [{"id": ' + "9" * 6000 + "}]}", r"is not JSON: 9+… has \d+ digits, more than 300"),
        ('{"images": [' + "[" * 100_000, "is not JSON: nested deeper than 100 levels"),
        ('{"images": ' + '{"a":' * 100_000, "is not JSON: nested deeper than 100 levels"),
        ('{"images": ["' + "x" * 3000, "is not COCO's JSON"),
    ],
)
def test_annotations_are_read_by_the_letter(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(json_scan, "WINDOW", 64)
    root = write_coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").write_text(content)
    refused(root, rf"instances_train2017.json.*{words}", "layout")


def test_a_record_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_scan, "LONGEST", 1 << 16)
    (tmp_path / "a.json").write_text('{"images": ["' + "x" * (1 << 20) + '"]}')
    with pytest.raises(PowersteerError, match="is not COCO's JSON"):
        list(json_scan.scan(tmp_path / "a.json"))


def test_annotations_with_a_byte_order_mark_and_half_characters(tmp_path):
    root = write_coco(tmp_path)
    file = root / "annotations" / "captions_train2017.json"
    content = file.read_text("utf-8")
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert find_source(str(root)).items(Wanted("sketch"))[0].captions == ("A dog.", "A café for dogs")
    file.write_text(content.replace("A dog.", r"A \ud83d dog."))
    refused(root, r"captions_train2017.json, byte \d+ is not JSON: it holds half a character")


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": {"size": [16, 24], "counts": [10**18, -(10**18) + 384]}},
        {"segmentation": [[1e308, -1e308, 1e308, 1e308, -1e308, 0]]},
        {"segmentation": None},
        {"category_id": "dog"},
        {"category_id": None},
        {"area": "large"},
    ],
)
def test_hostile_masks_refuse_their_picture_alone(tmp_path, change):
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= change
    file.write_text(json.dumps(content))
    item = find_source(str(root)).items(Wanted("segmentation"))[0]
    try:
        labels = item.load().subject.labels
        assert labels is None or (labels.min() >= -1 and labels.max() < 182)
    except PowersteerError as error:
        assert "\n" not in str(error)


def test_pictures_of_an_absurd_size_are_not_painted(tmp_path):
    root = write_coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"][0] |= {"width": 10**9, "height": 10**9}
    file.write_text(json.dumps(content))
    with pytest.raises(PowersteerError, match="the annotation is for 1000000000×1000000000 pixels"):
        find_source(str(root)).items(Wanted("segmentation"))[0].load()


def test_held_out_folders_are_those_of_the_table():
    names = [name for names in SPLITS.values() for name in names]
    assert len(set(names)) == len(names)
    assert {name for name in names if is_held_out(name)} == set(names) - set(SPLITS["train"])


# -- damaged at random


def fuzzed(whole, chance):
    content = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(len(content))
        what = chance.random()
        if what < 0.4:
            content[at] = chance.randrange(256)
        elif what < 0.6:
            del content[at : at + chance.choice([1, 3, 30])]
        elif what < 0.8:
            content[at:at] = chance.choice(
                [b"null", b"[]", b"{", b'"', b"-1", b"1e999", b"NaN", b"\xc3", rb"\ud83d", b"\n"]
            )
        else:
            other = chance.randrange(len(content))
            content[at : at + 20] = content[other : other + 20]
        content = content or bytearray(b" ")
    return bytes(content)


@pytest.mark.slow
def test_five_thousand_damaged_files_of_text_are_read_or_refused(tmp_path):
    """A thousand each: rows to train on, rows of a source, COCO's annotations, dataset.json, a palette."""
    pairs = draw_pairs(tmp_path / "pairs", 3)
    folder = put(tmp_path / "folder", "0.jpg", "1.jpg")
    rows = [
        {"file_name": f"{i}.jpg", "text": ["a", "é"], "boxes": [{"label": "cat", "box": [1, 2, 9, 9]}]} for i in (0, 1)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    coco = write_coco(tmp_path / "coco")
    instances = coco / "annotations" / "instances_train2017.json"
    (tmp_path / "palette.json").write_text(json.dumps({"sea": [0, 0, 200], "land": [0, 160, 0]}))
    said = {"kind": "feature", "channels": 3, "range": [0, 1]}
    (pairs / "dataset.json").write_text(json.dumps({"conditioning": said}))

    def load(root, task):
        for item in find_source(str(root)).items(Wanted(task)):
            with suppress(PowersteerError):  # of one picture
                item.load()

    doors = {
        pairs / "metadata.jsonl": lambda: read_rows(pairs),
        folder / "metadata.jsonl": lambda: load(folder, "layout"),
        instances: lambda: load(coco, "segmentation"),
        pairs / "dataset.json": lambda: conditioning_of(str(pairs)),
        tmp_path / "palette.json": lambda: Palette.find(str(tmp_path / "palette.json")),
    }
    for file, door in doors.items():
        whole, chance, outcomes = file.read_bytes(), random.Random(0), {"read": 0, "refused": 0}
        for _ in range(1000):
            file.write_bytes(fuzzed(whole, chance))
            try:
                door()
                outcomes["read"] += 1
            except PowersteerError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
        file.write_bytes(whole)
        assert min(outcomes.values()) > 5, (file.name, outcomes)
