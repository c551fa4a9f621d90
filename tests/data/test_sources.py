"""Miniature roots as people unpack them, with known masks, boxes, captions and faults."""

import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from powersteer.conditions.extractor import Box
from powersteer.core.errors import PowersteerError
from powersteer.data.layouts.base import pictures_in
from powersteer.data.prepare import svg as svg_module
from powersteer.data.prepare.sources import find_source, json_scan
from powersteer.data.prepare.sources.ade20k import Ade20k
from powersteer.data.prepare.sources.base import Wanted
from powersteer.data.prepare.sources.coco import Coco
from powersteer.data.prepare.sources.folder import Folder
from powersteer.data.prepare.sources.frame import open_frame
from powersteer.data.prepare.sources.masks import to_mask
from powersteer.data.prepare.sources.openmoji import OpenMoji, element_boxes, regions

WIDTH, HEIGHT = 24, 16
rng = np.random.default_rng(0)


def noise(seed=0, size=(WIDTH, HEIGHT)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# -- frames: a picture, upright, and what was annotated on its stored pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_and_boxes_turn_with_the_picture(tmp_path, orientation):
    """One pixel, a label and a box on the same place: they stay together whatever the turn."""
    stored = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    stored[3:6, 10:12] = 255
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif(orientation))
    labels = np.where(stored[..., 0] > 0, 7, -1)
    frame = open_frame(tmp_path / "a.png", "white")
    assert frame.picture.size == ((HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))
    white = np.asarray(frame.picture)[..., 0] > 0
    assert np.array_equal(frame.labels(labels) == 7, white)
    (box,) = frame.boxes((Box("a", 10, 3, 12, 6),), (WIDTH, HEIGHT))
    rows, columns = np.nonzero(white)
    assert (box.left, box.top, box.right, box.bottom) == (
        columns.min(),
        rows.min(),
        columns.max() + 1,
        rows.max() + 1,
    )
    if orientation >= 5:  # annotated upright
        upright = np.where(white, 7, -1)
        assert np.array_equal(frame.labels(upright), upright)
    with pytest.raises(PowersteerError, match="the annotation is for 5×5 pixels"):
        frame.labels(np.zeros((5, 5), dtype=np.int64))


def test_which_files_may_be_copied(tmp_path):
    picture = noise()
    picture.save(tmp_path / "rgb.jpg")
    picture.convert("L").save(tmp_path / "grey.jpg")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "turned.jpg", exif=exif(6))
    picture.convert("P").save(tmp_path / "palette.png")
    picture.save(tmp_path / "old.bmp")
    found = {file.name: open_frame(file, "white") for file in tmp_path.iterdir()}
    assert {name for name, frame in found.items() if frame.content} == {"rgb.jpg", "grey.jpg"}
    assert found["rgb.jpg"].content == (tmp_path / "rgb.jpg").read_bytes()
    assert all(frame.picture.mode == "RGB" for frame in found.values())
    assert found["turned.jpg"].picture.size == (HEIGHT, WIDTH)
    assert np.array_equal(np.asarray(found["old.bmp"].picture), np.asarray(picture))
    cmyk = np.asarray(Image.open(tmp_path / "cmyk.jpg").convert("RGB"))
    assert np.array_equal(np.asarray(found["cmyk.jpg"].picture), cmyk)


def test_transparency_is_laid_on_the_stated_background(tmp_path):
    layers = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    layers.paste((0, 255, 0, 255), (0, 0, 8, 16))
    layers.save(tmp_path / "a.png")
    frame = open_frame(tmp_path / "a.png", "#0000ff")
    assert frame.content is None
    assert frame.picture.getpixel((2, 2)) == (0, 255, 0) and frame.picture.getpixel((12, 2)) == (0, 0, 255)


def write_faults(folder):
    (folder / "text.jpg").write_bytes(b"no picture")
    noise(size=(64, 64)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    Image.fromarray(np.full((16, 16), 40000, dtype=np.uint16)).save(folder / "deep.png")
    noise(size=(4, 4)).save(folder / "tiny.png")
    return {
        "text.jpg": "of no known format",
        "cut.jpg": "truncated",
        "deep.png": "16 bits a channel",
        "tiny.png": "4×4 pixels: too small",
        "none.jpg": "does not exist",
    }


def test_bad_files_say_what_is_wrong(tmp_path):
    for name, words in write_faults(tmp_path).items():
        with pytest.raises(PowersteerError, match=f"{name}.*{words}"):
            open_frame(tmp_path / name, "white")


# -- masks, against COCO's own tools


def test_masks_are_those_of_cocos_tools():
    tools = pytest.importorskip("pycocotools.mask")
    for seed in range(8):
        mask = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < 0.5 if seed else np.zeros((HEIGHT, WIDTH), bool)
        packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        columns = mask.ravel(order="F").astype(int)
        edges = np.flatnonzero(np.diff(columns, prepend=0))
        plain = {"size": packed["size"], "counts": np.diff(edges, prepend=0, append=columns.size).tolist()}
        assert np.array_equal(to_mask(text, (WIDTH, HEIGHT)), mask)
        assert np.array_equal(to_mask(plain, (WIDTH, HEIGHT)), mask)
    polygon = [[3.2, 2.1, 20.4, 4.0, 15.5, 13.7, 5.1, 11.2]]
    theirs = tools.decode(tools.merge(tools.frPyObjects(polygon, HEIGHT, WIDTH))).astype(bool)
    assert np.array_equal(to_mask(polygon, (WIDTH, HEIGHT)), theirs)
    square = np.zeros((HEIGHT, WIDTH), dtype=bool)
    square[4:8, 6:9] = True
    assert np.array_equal(to_mask([[6, 4, 9, 4, 9, 8, 6, 8]], (WIDTH, HEIGHT)), square)
    assert np.array_equal(to_mask([[6, 4, 9, 4, 9, 8, 6, 8], [1, 1, 20, 9]], (WIDTH, HEIGHT)), square)  # a line
    assert not to_mask([[1, 1, 20, 9]], (WIDTH, HEIGHT)).any()


def test_masks_without_cocos_tools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    root = str(write_coco(tmp_path))
    assert find_source(root).items(Wanted("layout"))
    with pytest.raises(PowersteerError, match=r"COCO's masks need pycocotools: pip install 'powersteer\[coco\]'"):
        find_source(root).items(Wanted("segmentation"))


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [3, 3], "counts": [9]}, "on a picture of"),
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "cover 5 pixels of 384"),
        ({"counts": [5]}, "neither polygons nor run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "o"}, "neither polygons nor run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "é0"}, "neither polygons nor run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, "neither polygons nor run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "PPPPPPP0"}, "neither polygons nor run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": "5"}, "end before the last of 384 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "ooo0"}, "neither polygons nor run lengths"),
        ({"size": [HEIGHT, WIDTH], "counts": [10**18, 384 - 10**18]}, "neither polygons nor run lengths"),
        ([[1, 2, 3, 4, 5, float("nan")]], "neither polygons nor run lengths"),
        ([[0, 0, 1e6, 1e6] * 100], "neither polygons nor run lengths"),
        ([[1, 2, 3]], "neither polygons nor run lengths"),
        (7, "neither polygons nor run lengths"),
    ],
)
def test_malformed_masks(segmentation, words):
    with pytest.raises(PowersteerError, match=words):
        to_mask(segmentation, (WIDTH, HEIGHT))


# -- large JSON, a record at a time


def test_records_are_found_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(json_scan, "WINDOW", 7)  # every record is longer
    content = {
        "info": {"year": 2017, "list": [1, {"images": []}]},
        "images": [{"id": 1, "s": 'é " ] } ,'}, {"id": 2, "deep": [{"x": [1, 2]}]}],
        "annotations": [],
        "n": 12.5,
        "categories": [{"id": 3}],
    }
    for indent in (None, 2):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
        found = list(json_scan.scan(path))
        assert [key for key, _, _ in found] == ["images", "images", "categories"]
        spans = tuple(span for _, _, span in found)
        assert json_scan.read_spans(path, spans) == [*content["images"], *content["categories"]]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"images": [{"id": 1}', '{"images": [{"id": 1} {"id": 2}]}', "{1: 2}"]
)
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(PowersteerError, match=r"a.json is not COCO's JSON"):
        list(json_scan.scan(tmp_path / "a.json"))


# -- COCO

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def write_coco(root):
    """Three training pictures (grey, CMYK, turned), one without captions or annotations, and a validation picture."""
    for i, folder in enumerate(("train2017", "val2017")):
        (root / folder).mkdir(parents=True)
        names = [f"{1 + j + 10 * i:012d}.jpg" for j in range(3 if i == 0 else 1)]
        for j, name in enumerate(names):
            picture = noise(10 * i + j)
            if j == 1:
                picture.convert("CMYK").save(root / folder / name)
            else:
                picture.save(root / folder / name, **({"exif": exif(6)} if j == 2 else {}))
        images = [
            {"id": int(name[:-4]), "file_name": name, "width": WIDTH, "height": HEIGHT} for name in names[: 3 - i]
        ]
        first = images[0]["id"]
        counts = [0, HEIGHT * 4, HEIGHT * (WIDTH - 4)]  # the four left columns
        things = [
            {"segmentation": [[8, 4, 16, 4, 16, 12, 8, 12]], "category_id": 18, "bbox": [8, 4, 8, 8], "area": 64},
            {"segmentation": [[0, 0, 24, 0, 24, 16, 0, 16]], "category_id": 1, "bbox": [0, 0, 24, 16], "area": 384},
            {
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
                "category_id": 1,
                "bbox": [0, 0, 4, 16],
                "area": 64,
                "iscrowd": 1,
            },
        ]
        things = [{**thing, "id": n, "image_id": first} for n, thing in enumerate(things)]
        turned = {**things[0], "id": 9, "image_id": images[-1]["id"]}
        stuff = [{**things[2], "category_id": 183}, {**things[1], "category_id": 92}]
        texts = [("A dog.", first), ("A  café\nfor dogs", first), ("Two", images[-1]["id"])]
        captions = [{"id": n, "image_id": id_, "caption": text} for n, (text, id_) in enumerate(texts)]
        (root / "annotations").mkdir(exist_ok=True)
        for kind, records, categories in (
            ("captions", captions, None),
            ("instances", [*things, turned] if i == 0 else things, CATEGORIES),
            ("stuff", stuff, [{"id": 92, "name": "banner"}]),
        ):
            content = {"info": {}, "licenses": [], "images": images, "annotations": records}
            content |= {"categories": categories} if categories else {}
            (root / "annotations" / f"{kind}_{folder}.json").write_text(json.dumps(content))
    noise(99).save(root / "train2017" / f"{7:012d}.jpg")
    return root


def test_coco_captions_and_splits(tmp_path):
    source = find_source(str(write_coco(tmp_path)))
    assert isinstance(source, Coco)
    items = source.items(Wanted("sketch"))
    assert [(item.split, int(item.name)) for item in items] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("train", 7),
        ("validation", 11),
    ]
    assert items[0].captions == ("A dog.", "A café for dogs") and items[3].captions == ()
    assert items[0].concept == "000000000001"
    assert pickle.loads(pickle.dumps(items[1])).load().subject.picture.mode == "RGB"


def test_coco_boxes_leave_crowds_out_and_turn(tmp_path):
    items = find_source(str(write_coco(tmp_path))).items(Wanted("layout"))
    assert items[0].load().subject.boxes == (Box("dog", 8, 4, 16, 12), Box("person", 0, 0, 24, 16))
    assert items[1].load().subject.boxes == ()  # annotated, and nothing is there
    assert items[2].load().subject.boxes == (Box("dog", HEIGHT - 12, 8, HEIGHT - 4, 16),)
    assert items[3].load().subject.boxes is None  # not annotated


def test_coco_labels_paint_the_small_over_the_large(tmp_path):
    items = find_source(str(write_coco(tmp_path))).items(Wanted("segmentation"))
    labels = items[0].load().subject.labels
    assert labels[5, 10] == 17 and labels[2, 10] == 0 and labels[8, 2] == 0
    (tmp_path / "stuffthingmaps" / "train2017").mkdir(parents=True)
    stored = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    stored[2, 3] = 181
    file = tmp_path / "stuffthingmaps" / "train2017" / "000000000001.png"
    Image.fromarray(stored).save(file)
    items = find_source(str(tmp_path)).items(Wanted("segmentation"))
    labels = items[0].load().subject.labels
    assert labels[2, 3] == 181 and labels[0, 0] == -1
    stored[2, 3] = 182
    Image.fromarray(stored).save(file)
    with pytest.raises(PowersteerError, match="class 182 is outside"):
        items[0].load()
    with pytest.raises(PowersteerError, match=r"000000000002.png cannot be read"):
        items[1].load()  # an image without partner


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"annotations": []}', "has no 'images'"),
        ('{"images": [{"id": 1}]}', "a record of 'images' has no 'file_name'"),
        ("not JSON", "is not COCO's JSON"),
    ],
)
def test_what_is_not_cocos_json_stops_at_once(tmp_path, content, words):
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(PowersteerError, match=words):
        find_source(str(tmp_path)).items(Wanted("layout"))
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(PowersteerError, match=r"layout needs .*instances_train2017.json"):
        find_source(str(tmp_path)).items(Wanted("layout"))


# -- ADE20K


def write_ade20k(root):
    for split, word in (("training", "train"), ("validation", "val")):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(2):
            name = f"ADE_{word}_{i:08d}"
            noise(i + 2 * (word == "val")).save(root / "images" / split / f"{name}.jpg")
            index = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 151
            Image.fromarray(index).save(root / "annotations" / split / f"{name}.png")
    scenes = "ADE_train_00000000 airport_terminal\nADE_train_00000001 misc\n"
    (root / "sceneCategories.txt").write_text(scenes)
    return root


def test_ade20k(tmp_path):
    source = find_source(str(write_ade20k(tmp_path)))
    assert isinstance(source, Ade20k)
    items = source.items(Wanted("segmentation"))
    assert [item.split for item in items] == ["train", "train", "validation", "validation"]
    assert [item.captions for item in items[:2]] == [("airport terminal",), ()]
    labels = pickle.loads(pickle.dumps(items[0])).load().subject.labels
    assert labels[0, 0] == -1 and labels[0, 1] == 0 and labels.max() == 149
    index = tmp_path / "annotations" / "training" / "ADE_train_00000000.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 151, dtype=np.uint8)).save(index)
    with pytest.raises(PowersteerError, match="class 151 is outside"):
        items[0].load()
    noise().save(index)
    with pytest.raises(PowersteerError, match="a label map has one channel"):
        items[0].load()
    index.unlink()
    with pytest.raises(PowersteerError, match=r"ADE_train_00000000.png cannot be read"):
        items[0].load()
    assert source.items(Wanted("sketch"))[0].load().subject.labels is None


# -- folders


def test_a_folder_and_what_lies_beside(tmp_path):
    noise(1).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("ein Fuchs für dich\n", encoding="utf-8")
    noise(2).save(tmp_path / "b.png")
    np.save(tmp_path / "b.npy", np.ones((4, 2, 3), dtype=np.float16))
    (tmp_path / "deeper").mkdir()
    noise(3).save(tmp_path / "deeper" / "a.jpg")
    (tmp_path / "deeper" / "loop").symlink_to(tmp_path)
    (tmp_path / "ring.png").symlink_to(tmp_path / "ring.png")
    source = find_source(str(tmp_path))
    assert isinstance(source, Folder)
    items = source.items(Wanted("feature"))
    assert [item.name for item in items] == ["a.jpg", "b.png", "deeper/a.jpg", "ring.png"]
    assert items[0].captions == ("ein Fuchs für dich",) and {item.split for item in items} == {"train"}
    assert items[1].load().subject.features.shape == (4, 2, 3)
    with pytest.raises(PowersteerError, match=r"ring.png cannot be read: Too many levels"):
        items[3].load()
    assert len(list(pictures_in(tmp_path))) == 4


def test_a_folder_with_metadata(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        noise().save(tmp_path / split / "a.png")
    drawing = Image.new("L", (WIDTH, HEIGHT), 255)
    drawing.putpixel((3, 4), 0)
    drawing.save(tmp_path / "train" / "lines.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(tmp_path / "train" / "labels.png")
    row = {
        "file_name": "a.png",
        "text": ["one", "two"],
        "concept": 5,
        "boxes": [{"label": "cat", "box": [1, 2, 3, 4]}],
        "drawing_file_name": "lines.png",
        "labels_file_name": "labels.png",
    }
    metadata = tmp_path / "train" / "metadata.jsonl"
    metadata.write_text(json.dumps(row))
    items = Folder(tmp_path).items(Wanted("layout"))
    assert [(item.split, item.name) for item in items] == [("train", "a.png"), ("validation", "a.png")]
    assert items[0].captions == ("one", "two") and items[0].concept == "5"
    subject = items[0].load().subject
    assert subject.boxes == (Box("cat", 1, 2, 3, 4),)
    assert subject.drawing.getpixel((3, 4)) == 255 and np.asarray(subject.drawing).sum() == 255
    assert (subject.labels == -1).all()

    metadata.write_text(json.dumps({**row, "boxes": [{"label": "cat", "box": [1, 2]}]}))
    with pytest.raises(PowersteerError, match="boxes must be"):
        Folder(tmp_path).items(Wanted("layout"))[0].load()
    Image.new("L", (9, 9)).save(tmp_path / "train" / "lines.png")
    with pytest.raises(PowersteerError, match="9×9 pixels, its picture 24×16"):
        items[0].load()
    for text, words in (
        ("[]", "is one JSON array"),
        ("5", "line 1 is not a JSON object but a number"),
        ('{"text": "a"}', "line 1: 'file_name' must name a file, not None"),
        ("\n", "is empty"),
        ('{"file_name": "a"}\n{"file_name": "./a"}', "line 2: 'a' comes twice, first in .*line 1"),
    ):
        metadata.write_text(text)
        with pytest.raises(PowersteerError, match=words):
            Folder(tmp_path).items(Wanted("layout"))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(PowersteerError, match="holds no pictures"):
        find_source(str(tmp_path)).items(Wanted("sketch"))
    with pytest.raises(PowersteerError, match="there is no folder"):
        find_source(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "content", [b"", b"no array", np.ones((2, 2), np.float32), np.full((1, 1, 1), np.nan), np.ones((1, 1, 1), complex)]
)
def test_malformed_features(tmp_path, content):
    noise().save(tmp_path / "a.png")
    if isinstance(content, bytes):
        (tmp_path / "a.npy").write_bytes(content)
    else:
        np.save(tmp_path / "a.npy", content)
    with pytest.raises(PowersteerError, match=r"a.npy"):
        Folder(tmp_path).items(Wanted("feature"))[0].load()


# -- OpenMoji's layers

SVG = """<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
<g id="color"><rect x="8" y="8" width="24" height="32" fill="#EA5A47"/>
<rect x="36" y="8" width="20" height="32" fill="#92d3f5" stroke="#000" stroke-width="2"/>
<g fill="none" stroke="#fcea2b"><path stroke-width="4" d="M8 50h40"/></g></g>
<g id="skin"><circle cx="20" cy="24" r="6"/></g>
<g id="line"><path fill="none" stroke="#000" stroke-width="4" d="M34 8v32"/></g></svg>"""


def test_regions_are_flat_and_have_no_outlines():
    ink = np.zeros((72, 72), dtype=np.uint8)
    ink[8:40, 32:36] = 255  # the line between the two boxes, where nothing is painted
    labels = regions(SVG, 72, ink)
    white, black, light_blue, red, yellow = 0, 3, 4, 7, 13
    assert labels[10, 10] == red and labels[24, 20] == black and labels[10, 50] == light_blue
    assert labels[50, 20] == yellow and labels[70, 70] == -1
    assert set(np.unique(labels)) == {-1, black, light_blue, red, yellow} and white not in labels
    assert labels[20, 32] == labels[20, 33] == red and labels[20, 34] == labels[20, 35] == light_blue
    assert labels[8, 36] == light_blue  # under the black outline


def test_boxes_of_the_drawn_elements():
    assert element_boxes(SVG, 72) == (
        Box("red", 8, 8, 32, 40),
        Box("light blue", 36, 8, 56, 40),
        Box("yellow", 8, 48, 48, 52),
        Box("black", 14, 18, 26, 30),
    )


def test_every_layer_of_a_fox():
    source = OpenMoji()
    by_name = {item.captions[0]: item for item in source.items(Wanted("segmentation"))}
    assert len({item.split for item in by_name.values()}) == 3
    subject = by_name["fox"].load().subject
    assert subject.picture.size == (64, 64) and subject.labels.shape == (64, 64)
    assert subject.labels[33, 32] == 16  # dark orange, between the eyes
    assert subject.drawing.mode == "L" and subject.boxes is None
    layout = {item.captions[0]: item for item in source.items(Wanted("layout", resolution=128))}["fox"].load().subject
    assert layout.picture.size == (128, 128)
    assert [box.label for box in layout.boxes] == ["dark orange", "white", "light grey", "white", "white"]


def test_crisp_pictures_mix_no_colours():
    mixed, flat = (svg_module.rasterise(SVG, 50, crisp=crisp) for crisp in (False, True))
    assert len(np.unique(flat.reshape(3, -1), axis=1).T) == 5 < len(np.unique(mixed.reshape(3, -1), axis=1).T)
