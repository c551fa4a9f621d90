"""`data check` on folders with known faults."""

import json

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from conftest import draw_pairs
from powersteer.core.errors import PowersteerError
from powersteer.data.check import check_pairs
from powersteer.data.looks import first_alike, perceptual_hash


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


# -- findings: a count, one example, what to do


def found(report, name):
    """The one finding of this name."""
    (one,) = [one for one in report.findings if one.name == name]
    return one


def test_sound_pairs_of_the_bases_size_have_no_findings_at_all(folder):
    assert check_pairs(folder, resolution=32).findings == []
    small = found(check_pairs(folder), "small_pictures")
    assert (small.severity, small.count, small.text) == ("note", 12, "12 pictures are enlarged to 64 pixels")
    assert small.example.endswith("images/0.png' (column file_name), 32×32")


def test_faults_of_one_kind_are_one_finding(folder):
    for i in (2, 4, 5):
        (folder / "images" / f"{i}.png").write_bytes(b"no picture")
    for i in (6, 7):
        Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)).save(folder / "images" / f"{i}.png")
    Image.new("L", (16, 32)).save(folder / "drawings" / "8.png")
    rewrite(folder, lambda rows: rows[9].pop("text"))
    report = check_pairs(folder)
    errors = [one for one in report.findings if one.severity == "error"]
    assert [(one.name, one.count) for one in errors] == [
        ("unreadable_pictures", 3),
        ("unreadable_pictures", 2),
        ("unreadable_pictures", 1),
        ("missing_captions", 1),
    ]
    assert "pairs[2]" in errors[0].example and "of no known format" in errors[0].example
    assert "pairs[6]" in errors[1].example and "16 bits a channel" in errors[1].example
    assert "pairs[8]" in errors[2].example and "16×32" in errors[2].example
    assert len(report.errors) == 7 and report.findings[:4] == errors
    note = found(check_pairs(folder, default_prompt="{a} thing"), "missing_captions")
    assert note.line == "1 pairs have no caption but '{a} thing', such as pairs[9]"


def test_captions_that_are_cut_empty_or_alike(folder):
    def change(rows):
        rows[1]["text"] = ["a fox", "fox " * 30]
        rows[2]["generated_text"] = "a " * 50
        rows[3]["text"] = " "

    rewrite(folder, change)
    report = check_pairs(folder)
    cut = found(report, "long_captions")
    assert cut.line == (
        "2 captions are longer than the 24 tokens that the base reads, such as that of pairs[1], 32 tokens: the rest "
        "is cut off; shorten them"
    )
    assert cut.line in report.warnings and found(report, "empty_captions").example == "pairs[3]"
    assert report.facts["captions"]["empty"] == 1


def test_the_base_says_how_long_captions_may_be(folder, base_dir):
    cut = found(check_pairs(folder, base=str(base_dir)), "long_captions")
    assert cut.text == "12 captions are longer than the 12 tokens that the base reads"
    assert check_pairs(folder).warnings == []  # 24 tokens
    with pytest.raises(PowersteerError, match=r"cannot read the captions' limits of the base '.*nothing'"):
        check_pairs(folder, base=str(folder / "nothing"))


def test_what_is_put_right_when_a_picture_is_read(folder):
    picture = Image.open(folder / "images" / "1.png")
    picture.save(folder / "images" / "1.png", icc_profile=adobe_like())
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open(folder / "images" / "2.png").save(folder / "images" / "2.png", icc_profile=rgb)
    layers = Image.open(folder / "images" / "3.png").convert("RGBA")
    layers.putalpha(255)
    layers.save(folder / "images" / "3.png")  # opaque: nothing to say
    layers = Image.open(folder / "images" / "4.png").convert("RGBA")
    layers.putpixel((0, 0), (0, 0, 0, 0))
    layers.save(folder / "images" / "4.png")
    ink = Image.open(folder / "drawings" / "5.png").convert("RGBA")
    ink.putpixel((0, 0), (0, 0, 0, 0))
    ink.save(folder / "drawings" / "5.png")
    frames = [Image.open(folder / "images" / f"{i}.png").convert("P") for i in (6, 7)]
    frames[0].save(folder / "images" / "6.gif", save_all=True, append_images=frames[1:])
    rewrite(folder, lambda rows: rows[6].update(file_name="images/6.gif"))
    report = check_pairs(folder, resolution=32)
    for name, example in (
        ("colour_profiles", "images/1.png' (column file_name), "),
        ("transparent_pictures", "images/4.png' (column file_name)"),
        ("transparent_conditions", "drawings/5.png' (column conditioning_image_file_name)"),
        ("animations", "images/6.gif' (column file_name), 2 frames"),
        ("left_out", "images/6.png"),
    ):
        one = found(report, name)
        assert one.count == 1 and example in one.example, one
    assert report.errors == [] and len(report.findings) == 5


def adobe_like():
    """The profile of a space that is not sRGB: as `createProfile` gives it, under another name."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return content.replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))


def test_shapes_doubles_and_some_inverted(folder):
    wide = Image.fromarray(np.random.default_rng(9).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    wide.save(folder / "images" / "0.png")
    Image.open(folder / "drawings" / "0.png").resize((64, 32)).save(folder / "drawings" / "0.png")
    (folder / "images" / "9.png").write_bytes((folder / "images" / "3.png").read_bytes())
    (folder / "images" / "10.png").write_bytes((folder / "images" / "3.png").read_bytes())
    ImageOps.invert(Image.open(folder / "drawings" / "5.png")).save(folder / "drawings" / "5.png")
    report = check_pairs(folder, resolution=32)
    assert found(report, "cropped_pictures").example.endswith("images/0.png' (column file_name), 64×32")
    doubles = found(report, "doubles")
    assert doubles.count == 2 and doubles.example.endswith("images/9.png") and "images/3.png and" in doubles.example
    assert not any(one.name == "look_alikes" for one in report.findings) and report.facts["look_alikes"] == 2
    inverted = found(report, "inverted_conditions")
    assert inverted.count == 1 and inverted.example == "that of pairs[5]" and "are they inverted?" in inverted.text


def test_many_equal_pictures_are_compared_in_little_memory():
    hashes, thumbnails = np.ones((3000, 256), np.float32), np.zeros((3000, 16, 16, 3), np.float32)
    thumbnails[::3] = 200
    found = first_alike(hashes, thumbnails, hashes, thumbnails, earlier=True)
    assert len(found) == 2998 and set(found.values()) == {0, 1}


def test_held_out_pictures_are_leaks_by_their_bytes_and_looks(folder, tmp_path):
    held_out = draw_pairs(tmp_path / "held out", 4)
    make_distinct(held_out, seed=5)
    (held_out / "images" / "2.png").write_bytes((folder / "images" / "7.png").read_bytes())
    (held_out / "images" / "3.png").write_bytes(b"no picture")
    (folder / "validation").mkdir()
    report = check_pairs(folder, validation=held_out)
    leak = found(report, "leaks")
    assert leak.count == 1 and "images/2.png and" in leak.example and leak.example.endswith("images/7.png")
    assert report.facts["validation_pairs"] == 3 and len(report.errors) == 1
    assert found(report, "held_out").example.endswith("validation")


def test_the_table_and_the_json(run, folder):
    name = "x\x1b[31mred[bold].png"
    (folder / "images" / name).write_bytes(b"no picture")
    (folder / "images" / "[b]2.png").write_bytes(b"")
    rewrite(folder, lambda rows: rows[1].update(file_name=f"images/{name}"))
    status, printed, _ = run("data", "check", folder)
    assert (
        status == 1
        and "\x1b" not in printed
        and "x\\x1b[31mred[bold].png" in printed.replace("│", "").replace("\n", "").replace(" ", "")
    )
    assert "1 pairs cannot be read" in printed.replace("\n", " ") and "2 files are in no pair" in printed
    status, printed, _ = run("data", "check", folder, "--json", "--resolution", 32)
    report = json.loads(printed)
    assert status == 1 and [(one["name"], one["count"], one["severity"]) for one in report["findings"]] == [
        ("unreadable_pictures", 1, "error"),
        ("left_out", 2, "warning"),
    ]
    assert report["findings"][0]["example"] == report["errors"][0] and name in report["errors"][0]
    status, _, err = run("data", "check", folder, "--base", folder)
    assert status == 2 and err.startswith("error: cannot read the captions' limits of the base")
