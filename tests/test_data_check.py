"""`data check` on folders with known faults."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import draw_pairs
from powersteer.data.check import check_pairs
from powersteer.data.looks import perceptual_hash


def rewrite(folder, change):
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path):
    """Twelve pairs that differ: noise of its own over each box."""
    folder = draw_pairs(tmp_path / "pairs", 12)
    make_distinct(folder, seed=0)
    rewrite(folder, lambda rows: [row.update(text=f"a thing of kind {i}") for i, row in enumerate(rows)])
    return folder


def make_distinct(folder, seed):
    rng = np.random.default_rng(seed)
    for file in sorted((folder / "images").iterdir()):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)


def test_sound_pairs_have_no_faults(folder):
    report = check_pairs(folder)
    assert report.errors == report.warnings == []
    assert report.facts["pairs"] == 12 and report.facts["look_alikes"] == 0
    assert report.facts["width"] == {"min": 32, "median": 32, "max": 32}
    assert report.facts["aspect_ratio"]["max"] == 1
    assert report.facts["captions"]["distinct"] == 12 and report.facts["captions"]["words"]["median"] == 5
    inks = [np.asarray(Image.open(folder / "drawings" / f"{i}.png")).mean() / 255 for i in range(12)]
    assert report.facts["condition"]["mean"]["median"] == pytest.approx(np.median(inks), rel=1e-5)
    assert (report.facts["condition"]["low"], report.facts["condition"]["high"]) == (0, 1)


def test_every_fault_is_listed_not_the_first_alone(folder):
    (folder / "images" / "2.png").write_bytes(b"no picture")
    Image.new("L", (16, 32)).save(folder / "drawings" / "3.png")

    def change(rows):
        rows[5]["file_name"] = "images/none.png"
        del rows[7]["text"]

    rewrite(folder, change)
    report = check_pairs(folder)
    assert len(report.errors) == 4 and report.facts["pairs"] == 9
    for words in ("[5]: ", "[2]: ", "[3]: the condition is 16×32 pixels, its picture 32×32", "[7] has no caption"):
        assert any(words in error for error in report.errors), words
    assert len(check_pairs(folder, default_prompt="a thing").errors) == 3


def test_warnings(folder, tmp_path):
    for i in range(12):
        file = folder / "drawings" / f"{i}.png"
        ImageOps.invert(Image.open(file)).save(file)
    Image.new("L", (32, 32)).save(folder / "drawings" / "4.png")
    rewrite(folder, lambda rows: [row.update(text="an icon") for row in rows[:8]])
    picture = Image.open(folder / "images" / "0.png")
    picture.point(lambda value: min(255, value + 3)).save(folder / "images" / "9.png")  # the same, a little brighter
    held_out = draw_pairs(tmp_path / "held out", 3)
    make_distinct(held_out, seed=1)
    picture.save(held_out / "images" / "1.png")
    report = check_pairs(folder, validation=held_out)
    assert report.errors == []
    assert len(report.warnings) == 5
    for words in (
        "1 conditions are blank, such as that of pairs[4]",
        "are they inverted?",
        "8 of 12 captions are 'an icon'",
        "1 pictures look like an earlier one",
        "1 validation pictures look like training pictures",
    ):
        assert any(words in warning for warning in report.warnings), words
    assert report.facts["leaks"] == 1 and report.facts["validation_pairs"] == 3
    assert not any("inverted" in warning for warning in check_pairs(folder, kind="depth").warnings)


def test_flat_pictures_of_other_colours_are_no_look_alikes(folder):
    for i, colour in enumerate(["#ff0000", "#00ff00", "#0000ff", "#ff0200"]):
        Image.new("RGB", (32, 32), colour).save(folder / "images" / f"{i}.png")
    assert check_pairs(folder).facts["look_alikes"] == 1  # the two reds


def test_the_hash_sees_through_scale_and_brightness_only():
    rng = np.random.default_rng(0)
    one = Image.fromarray(rng.integers(0, 200, (16, 17, 3), dtype=np.uint8)).resize(
        (170, 160), Image.Resampling.NEAREST
    )
    mine = perceptual_hash(one)
    assert (mine != perceptual_hash(one.resize((85, 80)).point(lambda value: value + 40))).sum() <= 8
    assert (mine != perceptual_hash(ImageOps.mirror(one))).sum() > 60
