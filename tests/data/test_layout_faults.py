"""Pairs as people misname, mislay and damage them: refused in one sentence, or said; never paired wrongly."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image, features

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.core.errors import PowersteerWarning
from powersteer.data.layouts import Columns, look, read_rows
from powersteer.data.pairs import Pairs, captioned

COUNT = 4


@pytest.fixture
def source(tmp_path):
    return draw_pairs(tmp_path / "source", COUNT)


@pytest.fixture
def bases(source, tmp_path):
    """``images/`` and ``conditioning_images/``, captions beside."""
    folder = tmp_path / "bases"
    shutil.copytree(source / "images", folder / "images")
    shutil.copytree(source / "drawings", folder / "conditioning_images")
    for i in range(COUNT):
        (folder / "images" / f"{i}.txt").write_text(f"a thing {i}")
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def write(folder, rows, **options):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row, **options) + "\n" for row in rows), "utf-8")


def refused(folder, words, columns=None):
    with pytest.raises(PowersteerError, match=words) as error:
        read_rows(folder, columns)
    assert "\n" not in str(error.value)


# -- one name, one file


@pytest.mark.parametrize("part", ["images", "conditioning_images"])
@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp"])
def test_two_files_that_claim_one_name_are_refused_naming_both(bases, part, suffix):
    Image.new("RGB", (32, 32)).save(bases / part / f"1{suffix}")
    refused(bases, rf"bases\[1\]: '.*{part}/1.*' and '.*{part}/1.*' are both '1': remove or rename one")
    found = look(bases)
    assert len(found.rows) == COUNT - 1 and len(found.faults) == 1 and found.left_out == []


def test_one_name_in_two_subfolders_is_two(bases):
    for part in ("images", "conditioning_images"):
        (bases / part / "deep" / "er").mkdir(parents=True)
        shutil.copy(bases / part / "1.png", bases / part / "deep" / "er" / "0.png")
    (bases / "images" / "deep" / "er" / "0.txt").write_text("deep")
    rows = read_rows(bases)
    assert len(rows) == COUNT + 1 and [row.text for row in rows if "deep" in row.image.name] == ["deep"]
    for row in rows:
        assert row.image.name.replace("/images/", "/conditioning_images/") == row.conditioning_image.name


def test_the_same_pair_twice_is_refused_and_one_picture_with_two_conditions_is_not(source):
    rows = rows_of(source)
    write(source, [*rows, {**rows[1], "text": "the same", "file_name": "./images/1.png"}])
    refused(
        source, r"source\[4\]: the same picture and condition as source\[1\]: remove one; several captions are a list"
    )
    write(source, [*rows, {**rows[1], "conditioning_image_file_name": "drawings/2.png"}])
    assert len(read_rows(source)) == COUNT + 1


def test_columns_of_one_name_are_refused():
    with pytest.raises(PowersteerError, match="two columns are called 'image'"):
        Columns(conditioning_image="image")


# -- what is in no pair


def test_what_pillow_reads_is_read_and_the_rest_is_said(bases):
    suffixes = [".jfif", ".tga", ".jp2", *([".avif"] if features.check("avif") else [])]
    for i, suffix in enumerate(suffixes):
        picture = Image.open(bases / "images" / f"{i % COUNT}.png")
        picture.save(bases / "images" / f"new{i}{suffix}", **({"format": "JPEG"} if suffix == ".jfif" else {}))
        shutil.copy(bases / "conditioning_images" / "0.png", bases / "conditioning_images" / f"new{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = read_rows(bases)
    assert len(rows) == COUNT + len(suffixes) and all(row.image.picture().size == (32, 32) for row in rows)
    shutil.copy(bases / "conditioning_images" / "0.png", bases / "conditioning_images" / "alone.png")
    (bases / "images" / "psalm.heic").write_bytes(b"x")
    (bases / "images" / "alone.txt").write_text("a caption")
    (bases / "notes.txt").write_text("mine")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "README.md", "dataset.json", "LICENSE.txt"):
        (bases / name).write_text("{}")
    (bases / "images" / "._0.png").write_bytes(b"\0\5\x16\7")
    (bases / "__MACOSX").mkdir()
    (bases / "__MACOSX" / "0.png").write_bytes(b"\0\5\x16\7")
    with pytest.warns(
        PowersteerWarning, match=r"bases: 4 files are in no pair, such as .*conditioning_images/alone.png"
    ):
        assert len(read_rows(bases)) == COUNT + len(suffixes)
    names = [Path(name).name for name in look(bases).left_out]
    assert names == ["alone.png", "alone.txt", "psalm.heic", "notes.txt"]


def test_files_beside_a_table_are_said(source):
    (source / "images" / "deep").mkdir()
    shutil.copy(source / "images" / "0.png", source / "images" / "deep" / "0.png")
    (source / "prompt.json").write_text("{}")
    rows = rows_of(source)
    rows[3]["conditioning_image_file_name"] = "none.png"
    write(source, rows)
    found = look(source)  # what a faulty row names is told with that row
    assert [Path(name).name for name in found.left_out] == ["3.png", "0.png", "prompt.json"]
    assert len(found.rows) == COUNT - 1 and "'drawings" not in found.faults[0]


def test_held_out_folders_are_never_trained_on_in_silence(source, bases):
    for part in ("images", "conditioning_images"):
        (bases / part / "Validation").mkdir()
        shutil.copy(bases / part / "0.png", bases / part / "Validation" / "9.png")
        (bases / "test").mkdir(exist_ok=True)
        shutil.copy(bases / part / "0.png", bases / "test" / f"{part}.png")
    found = look(bases)
    assert len(found.rows) == COUNT and found.left_out == []
    there = ["conditioning_images/Validation", "images/Validation", "test"]
    assert found.held_out == [str(bases / name) for name in there]
    (source / "val2017").mkdir()
    shutil.copy(source / "images" / "2.png", source / "val2017" / "2.png")
    rows = rows_of(source)
    rows[2]["file_name"] = "val2017/2.png"
    write(source, rows)
    with pytest.warns(PowersteerWarning, match="1 pairs lie in folders of held-out pictures, such as .*val2017/2.png"):
        assert len(read_rows(source)) == COUNT
    assert [row.where for row in look(source).from_held_out] == ["source[2]"]


def test_the_folder_that_was_meant_is_named(source):
    refused(source.parent, r"holds no pairs that can be read: .*; did you mean .*source\?")


# -- columns


def test_a_missing_caption_names_its_column_and_those_that_are_there(source):
    rows = [{"caption" if key == "text" else key: row[key] for key in row} for row in rows_of(source)]
    write(source, rows)
    with pytest.raises(
        PowersteerError,
        match=r"source\[0\] has no caption \(no column 'text', but caption, concept, conditioning_image_file_name, ",
    ):
        Pairs(source, (32, 32))
    assert Pairs(source, (32, 32), columns=Columns(text="caption")).texts == ["a fox"] * COUNT
    assert Pairs(source, (32, 32), default_prompt="a thing").texts == ["a thing"] * COUNT
    refused(source, "no row has a text in column 'words'; there are caption, concept", Columns(text="words"))
    refused(source, "no row has a text in column 'blip'; there are", Columns(generated_text="blip"))
    write(source, [{**row, "text": None} for row in rows])
    with pytest.raises(PowersteerError, match=r"has no caption \(column 'text' is empty\)"):
        Pairs(source, (32, 32))


def test_wrong_columns_are_told_with_those_that_exist(source, bases):
    refused(source, "column 'pic_file_name' is missing; there are concept, conditioning_image", Columns(image="pic"))
    refused(source, "column 'edge_file_name' is missing; there are", Columns(conditioning_image="edge"))
    assert len(read_rows(source, Columns(image="file_name"))) == COUNT  # as it is written
    refused(bases, "has pictures by name, no columns: leave the columns' names out", Columns(text="words"))


def test_controlnets_columns_may_be_called_otherwise(source):
    rows = [{"a": row["file_name"], "source": row["conditioning_image_file_name"], "c": "x"} for row in rows_of(source)]
    (source / "metadata.jsonl").unlink()
    (source / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(source, Columns(image="a", text="c"))[3].texts == ("x",)
    refused(source, "column 'target' is missing; there are a, c, source")


# -- text by the letter of its standard


def test_byte_order_marks_are_no_text(source, bases):
    path = source / "metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_rows(source)) == COUNT
    (bases / "images" / "1.txt").write_bytes(b"\xef\xbb\xbfein Fuchs\r\n")
    assert read_rows(bases)[1].text == "ein Fuchs"


def test_only_line_feeds_end_a_line(source):
    rows = rows_of(source)
    for row, mark in zip(rows, ["\u2028", "\x85", "\x0b", "\x1c"], strict=True):
        row["text"] = f"a{mark}b"
    write(source, rows, ensure_ascii=False)
    content = (source / "metadata.jsonl").read_bytes()
    (source / "metadata.jsonl").write_bytes(content.replace(b"\x0b", rb"\u000b").replace(b"\x1c", rb"\u001c"))
    assert [row.text for row in read_rows(source)] == ["a\u2028b", "a\x85b", "a\x0bb", "a\x1cb"]
    (source / "metadata.jsonl").write_bytes(content.splitlines(True)[0].replace(b"\n", b"\r\n\r\n") + b"{\n")
    assert look(source).faults[0].startswith("source[2] is not JSON")  # blank lines count


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (r'{"text": "a fox \ud83d"}', r"source\[0\] is not JSON: it holds half a character"),
        ("[" * 100_000, r"metadata.jsonl is one JSON array: write one object a line"),
        ('{"a": ' * 100_000, r"source\[0\] is not JSON: nested deeper than 100 levels"),
        ('{"a": ' * 150 + "1" + "}" * 150, r"source\[0\] is not JSON: nested deeper than 100 levels"),
        ('{"a": ' + "9" * 6000 + "}", r"source\[0\] is not JSON: 9+… has 6000 digits"),
        ('{"a": 1, "a": 2}', r"source\[0\] is not JSON: 'a' comes twice"),
        ('{"a": NaN}', r"source\[0\] is not JSON: NaN is no number"),
        ('{"a": 1e999}', r"source\[0\] is not JSON: 1e999 is too large a number"),
        ('[{"file_name": "images/0.png"}]', r"metadata.jsonl is one JSON array: write one object a line"),
        ('"images/0.png"', r"source\[0\] is not a JSON object but a string"),
        ("null", r"source\[0\] is not a JSON object but null"),
        ("\0", "metadata.jsonl is not UTF-8 text"),
        ("\ufeff".encode("utf-16"), "metadata.jsonl is not UTF-8 text but UTF-16"),
    ],
)
def test_lines_that_are_no_objects(source, line, words):
    (source / "metadata.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    refused(source, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 5000, r"'.*aaa' not found \(column file_name\)"),
        ("a\0b", r"'.*' not found \(column file_name\)"),
        ("images", r"'.*images' not found"),
        ("", r"column 'file_name' holds nothing, which names no file"),
        (5, r"column 'file_name' holds 5, which names no file"),
        (None, r"column 'file_name' holds None, which names no file"),
        (["images/0.png"], r"column 'file_name' holds \['images/0.png'\], which names no file"),
        ({"a": "b" * 10_000}, r"column 'file_name' holds \{'a': 'b+, which names no file"),
    ],
)
def test_names_that_no_file_can_have(source, name, words):
    rows = rows_of(source)
    write(source, [{**rows[0], "file_name": name}, *rows[1:]])
    refused(source, rf"source\[0\]: {words}")
    assert len(look(source).rows) == COUNT - 1


@pytest.mark.parametrize("text", [5, True, {"en": "a fox"}, ["a fox", 5], [["a fox"]]])
def test_captions_that_are_no_text(source, text):
    rows = rows_of(source)
    write(source, [{**rows[0], "text": text}])
    refused(source, r"source\[0\]: column 'text' holds .*, which is no text")
    write(source, [{**rows[0], "text": ["one", None, "two"]}])
    assert read_rows(source)[0].texts == ("one", "two")


def test_links_to_nothing_and_folders_that_cannot_be_read(bases, monkeypatch):
    (bases / "images" / "2.png").unlink()
    (bases / "images" / "2.png").symlink_to(bases / "none.png")
    refused(bases, r"bases\[2\]: '.*images/2.png' not found: it is a link to nothing")
    (bases / "images" / "2.txt").unlink()
    (bases / "images" / "loop").symlink_to(bases / "images")
    assert len(look(bases).faults) == 1
    for name in ("a" * 5000, "a\0b"):
        refused(Path(name), "there is no folder of pairs")

    def denied(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    refused(bases, "bases cannot be read: Permission denied")


# -- saved data sets


@pytest.fixture
def saved(source, tmp_path):
    """(columns) → what save_to_disk makes of them; pictures are files of the source."""
    datasets = pytest.importorskip("datasets")

    def save(**columns):
        table = datasets.Dataset.from_dict(columns)
        for column in ("image", "conditioning_image"):
            if isinstance(columns[column][0], str):
                table = table.cast_column(column, datasets.Image())
        table.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save


def files(source, kind):
    return [str(source / kind / f"{i}.png") for i in range(COUNT)]


def test_a_saved_data_set_without_captions(saved, source):
    folder = saved(
        image=files(source, "images"), conditioning_image=files(source, "drawings"), label=list(range(COUNT))
    )
    assert Pairs(folder, (32, 32), default_prompt="a thing").texts == ["a thing"] * COUNT
    with pytest.raises(
        PowersteerError,
        match=r"saved\[0\] has no caption \(no column 'text', but conditioning_image, image, label\)",
    ):
        Pairs(folder, (32, 32))
    refused(
        folder, "no row has a text in column 'words'; there are conditioning_image, image, label", Columns(text="words")
    )
    refused(folder, r"saved\[0\]: column 'label' holds 0, which is no text", Columns(text="label"))
    refused(folder, "column 'pic' is missing; there are conditioning_image, image, label", Columns(image="pic"))


def test_a_saved_data_set_of_other_columns(saved, source):
    folder = saved(image=list(range(COUNT)), conditioning_image=files(source, "drawings"), text=["a"] * COUNT)
    refused(folder, "column 'image' holds no pictures, but int64")


def test_a_null_picture(saved, source):
    folder = saved(
        image=files(source, "images"), conditioning_image=[*files(source, "drawings")[1:], None], text=["a"] * COUNT
    )
    rows = read_rows(folder)
    assert rows[0].conditioning_image.condition(1, "sketch").size == (32, 32)
    with pytest.raises(PowersteerError, match=r"saved\[3\]: column 'conditioning_image' is empty: there is no picture"):
        rows[3].conditioning_image.condition(1, "sketch")


def test_damaged_saved_data_sets(saved, source):
    folder = saved(image=files(source, "images"), conditioning_image=files(source, "drawings"), text=["a"] * COUNT)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (arrow,) = (name for name in whole if name.endswith(".arrow"))

    def damaged(name, content, words="saved is not a whole saved data set"):
        for other, kept in whole.items():
            (folder / other).write_bytes(kept)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        refused(folder, words)

    damaged("state.json", None)
    damaged("state.json", b"{")
    damaged("state.json", b"[" * 100_000)
    damaged("dataset_info.json", b"[]")
    damaged(arrow, None)
    for share in (0.1, 0.5, 0.9):
        damaged(arrow, whole[arrow][: int(share * len(whole[arrow]))])
    damaged("dataset_dict.json", b'{"splits": ["train", "test"]}', r"holds several splits \(train, test\)")
    damaged("dataset_dict.json", b"[", "dataset_dict.json is not JSON")


def test_a_row_of_the_layout_carries_why_it_has_no_caption(bases):
    (bases / "images" / "3.txt").unlink()
    with pytest.raises(PowersteerError, match=r"bases\[3\] has no caption \(there is no .*images/3.txt\)"):
        captioned(read_rows(bases)[3], None)
