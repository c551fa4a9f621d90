"""Every layout gives the same pairs; what is wrong with one is said by row, file and column."""

import io
import json
import shutil
import tarfile

import pytest
import torch
from PIL import Image

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.data.layouts import Columns, read_rows
from powersteer.data.pairs import Pairs, same_aspect
from powersteer.data.rows import Picture

SIZE = (32, 32)
COUNT = 5


@pytest.fixture
def source(tmp_path):
    folder = draw_pairs(tmp_path / "source", COUNT)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"text": f"thing {i}"} for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def as_controlnet(source, folder):
    shutil.copytree(source / "images", folder / "target")
    shutil.copytree(source / "drawings", folder / "source")
    lines = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"thing {i}"} for i in range(COUNT)]
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))


def as_basenames(source, folder):
    shutil.copytree(source / "images", folder / "images")
    shutil.copytree(source / "drawings", folder / "conditioning_images")
    for i in range(COUNT):
        (folder / "images" / f"{i}.txt").write_text(f"thing {i}\n")


def as_webdataset(source, folder):
    """Two shards; captions as text in one, as JSON in the other; the picture's column named in one only."""
    folder.mkdir()
    for shard, indices in (("a", (0, 1, 2)), ("b", (3, 4))):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in indices:
                text = f"thing {i}" if shard == "a" else json.dumps({"text": f"thing {i}"})
                members = {
                    "png" if shard == "a" else "image.png": (source / "images" / f"{i}.png").read_bytes(),
                    "conditioning_image.png": (source / "drawings" / f"{i}.png").read_bytes(),
                    "txt" if shard == "a" else "json": text.encode(),
                }
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"deep/{i:04d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def as_saved_dataset(source, folder):
    datasets = pytest.importorskip("datasets")
    paths = {
        "image": [str(source / "images" / f"{i}.png") for i in range(COUNT)],
        "conditioning_image": [str(source / "drawings" / f"{i}.png") for i in range(COUNT)],
    }
    table = datasets.Dataset.from_dict({**paths, "text": [f"thing {i}" for i in range(COUNT)]})
    for column in paths:
        table = table.cast_column(column, datasets.Image())
    table.save_to_disk(str(folder))
    shutil.rmtree(source / "images")  # the pictures are in the table


@pytest.mark.parametrize("layout", [as_controlnet, as_basenames, as_webdataset, as_saved_dataset])
def test_every_layout_holds_the_same_pairs(source, tmp_path, layout):
    wanted = Pairs(source, SIZE)
    tensors = [wanted[i] for i in range(COUNT)]
    layout(source, tmp_path / "other")
    found = Pairs(tmp_path / "other", SIZE)
    assert found.texts == wanted.texts == [f"thing {i}" for i in range(COUNT)]
    for i, (image, condition) in enumerate(tensors):
        assert torch.equal(found[i][0], image) and torch.equal(found[i][1], condition)


def test_columns_by_another_name(source):
    path = source / "metadata.jsonl"
    path.write_text(
        path.read_text().replace("conditioning_image_file_name", "edges_file_name").replace("text", "words")
    )
    rows = read_rows(source, Columns(conditioning_image="edges", text="words"))
    assert [row.text for row in rows] == [f"thing {i}" for i in range(COUNT)]
    assert rows[2].conditioning_image.column == "edges_file_name"
    with pytest.raises(PowersteerError, match=r"source\[0\]: column 'conditioning_image_file_name' is missing"):
        read_rows(source)


def test_the_plain_name_of_the_column_is_understood(source):
    path = source / "metadata.jsonl"
    path.write_text(path.read_text().replace("conditioning_image_file_name", "conditioning_image"))
    assert read_rows(source)[1].conditioning_image.read() == (source / "drawings" / "1.png").read_bytes()


def test_captions_are_optional(source, tmp_path):
    as_basenames(source, tmp_path / "other")
    (tmp_path / "other" / "images" / "3.txt").unlink()
    with pytest.raises(PowersteerError, match=r"other\[3\] has no caption"):
        Pairs(tmp_path / "other", SIZE)
    assert Pairs(tmp_path / "other", SIZE, default_prompt="a thing").texts[2:4] == ["thing 2", "a thing"]


def test_what_is_missing_in_each_layout_is_named(source, tmp_path):
    as_basenames(source, tmp_path / "base")
    (tmp_path / "base" / "conditioning_images" / "2.png").unlink()
    with pytest.raises(PowersteerError, match=r"base\[2\]: '.*2.png' has no partner"):
        read_rows(tmp_path / "base")
    as_controlnet(source, tmp_path / "control")
    (tmp_path / "control" / "source" / "4.png").unlink()
    with pytest.raises(PowersteerError, match=r"control\[4\]: '.*source/4.png' not found \(column source\)"):
        read_rows(tmp_path / "control")
    as_webdataset(source, tmp_path / "web")
    with tarfile.open(tmp_path / "web" / "c.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0009.conditioning_image.png"))
    with pytest.raises(PowersteerError, match=r"c.tar\[0009\]: no member 0009.image.png"):
        read_rows(tmp_path / "web")
    faults = []
    assert len(read_rows(tmp_path / "web", faults=faults)) == COUNT and len(faults) == 1
    (tmp_path / "web" / "c.tar").write_bytes(b"no tar at all, but long enough" * 40)
    with pytest.raises(PowersteerError, match=r"cannot read the shard .*c.tar: .*damaged"):
        read_rows(tmp_path / "web")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PowersteerError, match=r"holds no pairs that can be read: it needs a metadata.jsonl"):
        read_rows(tmp_path / "nothing")


def test_captions_that_are_not_utf8_and_files_that_cannot_be_read(source, tmp_path):
    as_basenames(source, tmp_path / "base")
    (tmp_path / "base" / "images" / "1.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(PowersteerError, match=r"1.txt is not UTF-8 text"):
        read_rows(tmp_path / "base")
    (source / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PowersteerError, match=r"metadata.jsonl is not UTF-8 text"):
        read_rows(source)
    gone = Picture("gone.png", "image", (tmp_path / "gone.png").read_bytes)
    with pytest.raises(PowersteerError, match=r"'gone.png' \(column image\) cannot be read: No such file"):
        gone.content()


def test_one_transform_for_picture_and_condition(source):
    """A wide pair: both are scaled by a half and lose the same columns left and right."""
    wide = Image.new("L", (128, 64))
    wide.paste(255, (32, 0, 64, 64))
    wide.convert("RGB").save(source / "images" / "0.png")
    wide.resize((64, 32), Image.Resampling.NEAREST).save(source / "drawings" / "0.png")
    image, condition = Pairs(source, SIZE, kind="segmentation")[0]
    left, right = torch.zeros(32, 16, dtype=torch.bool), torch.ones(32, 16, dtype=torch.bool)
    assert torch.equal(condition[0] == 255, torch.cat([right, left], 1)) and set(condition.unique().tolist()) == {
        0,
        255,
    }
    assert torch.equal(image[0] > 0, torch.cat([right, left], 1))


def test_label_maps_are_not_mixed(source):
    Image.linear_gradient("L").resize((96, 96), Image.Resampling.NEAREST).point(lambda v: 200 * (v > 127)).save(
        source / "drawings" / "0.png"
    )
    Image.new("RGB", (96, 96)).save(source / "images" / "0.png")
    assert set(Pairs(source, (40, 40), kind="layout")[0][1].unique().tolist()) == {0, 200}
    assert len(Pairs(source, (40, 40), kind="sketch")[0][1].unique()) > 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [((640, 480), (320, 240), True), ((640, 480), (321, 240), True), ((640, 480), (480, 640), False),
     ((512, 512), (512, 500), False), ((1023, 511), (512, 256), True)],
)  # fmt: skip
def test_same_aspect(one, other, same):
    assert same_aspect(one, other) == same


def test_transparency_and_rotation(tmp_path):
    clear = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    picture = Picture("clear.png", "image", (tmp_path / "clear.png").read_bytes)
    assert picture.picture().getpixel((3, 3)) == (255, 255, 255)
    assert picture.condition(1, "sketch").getpixel((3, 3)) == 0
    assert picture.picture().getpixel((0, 0)) == (10, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert Picture("turned.jpg", "image", (tmp_path / "turned.jpg").read_bytes).picture().size == (4, 8)
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(PowersteerError, match="save it with 8 bits a channel"):
        Picture("deep.png", "image", (tmp_path / "deep.png").read_bytes).picture()
