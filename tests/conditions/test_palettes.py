"""Colours of classes: closed forms, known values, and the way back."""

import json

import numpy as np
import pytest
from PIL import Image

from powersteer import PowersteerError
from powersteer.conditions.palettes import NO_LABEL, Palette, voc_colours


def test_the_voc_colours_are_those_of_its_development_kit():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    colours = voc_colours(256)
    assert {i: tuple(colours[i].tolist()) for i in known} == known
    assert len({tuple(colour) for colour in colours.tolist()}) == 256


def test_built_in_palettes_have_their_classes_and_colours():
    ade, coco = Palette.find("ade20k"), Palette.find("coco-stuff")
    assert len(ade) == 150 and ade.names[0] == "wall" and ade.names[149] == "flag"
    assert (
        ade.table["wall"] == [120, 120, 120] and ade.table["sky"] == [6, 230, 230] and ade.table["flag"] == [92, 0, 255]
    )
    assert len(coco) == 182 and np.array_equal(coco.colours, voc_colours(183)[1:])
    # The position is the category's id less one: things to 90, stuff from 92.
    assert (coco.index("person"), coco.index("toothbrush"), coco.index("banner"), coco.index("wood")) == (
        0,
        89,
        91,
        181,
    )


@pytest.mark.parametrize("name", ["ade20k", "coco-stuff"])
def test_labels_come_back_from_their_colours_even_when_these_are_a_little_off(name):
    palette = Palette.find(name)
    labels = np.arange(-1, len(palette)).repeat(2).reshape(2, -1)
    picture = palette.picture(labels)
    assert picture.getpixel((0, 0)) == (0, 0, 0)  # no label
    found = palette.labels_of(picture)
    assert found.dtype == np.int64 and (found == NO_LABEL).sum() == 2
    differ = {palette.names[label] for label in labels[found != labels]}
    assert differ == ({"skyscraper"} if name == "ade20k" else set())  # it has the road's colour
    if name == "coco-stuff":  # colours lie 32 levels apart or more
        noisy = np.clip(
            np.asarray(picture, dtype=int) + np.random.default_rng(0).integers(-8, 9, (*labels.shape, 3)), 0, 255
        )
        assert np.array_equal(palette.labels_of(Image.fromarray(noisy.astype(np.uint8))), labels)


def test_a_palette_of_ones_own(tmp_path):
    (tmp_path / "mine.json").write_text('{"sea": [0, 0, 200], "land": [0, 160, 0]}')
    palette = Palette.find(str(tmp_path / "mine.json"))
    assert palette.names == ("sea", "land") and palette.table == json.loads((tmp_path / "mine.json").read_text())
    picture = palette.picture(np.array([[1, -1], [0, 0]]))
    assert np.asarray(picture).tolist() == [[[0, 160, 0], [0, 0, 0]], [[0, 0, 200], [0, 0, 200]]]
    assert Palette.of_names(["a", "b"]).table == {"a": [128, 0, 0], "b": [0, 128, 0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no palette '.*mine.json': give ade20k, coco-stuff, openmoji, or a JSON file"),
        ("{", "is not JSON"),
        ("[]", "is no palette: it must hold"),
        ("[" * 100_000, "mine.json is not JSON: nested deeper than 100 levels"),
        ('{"sea": [1, 2, 3], "sea": [3, 2, 1]}', "'sea' comes twice"),
        ('{"sea": [1, 2, NaN]}', "NaN is no number"),
        ('{"sea": [1, 2, ' + "9" * 6000 + "]}", "has 6000 digits, more than 300"),
        ('{"\\ud83d": [1, 2, 3]}', "half a character"),
        ('{"sea": [0, 0]}', "'sea' is .* not three whole numbers from 0 to 255"),
        ('{"sea": [0, 0, 256]}', "not three whole numbers"),
        ('{"sea": [1, 2, 3], "land": [1, 2, 3]}', "'sea' and 'land' have one colour"),
    ],
)
def test_what_is_no_palette_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(PowersteerError, match=message):
        Palette.find(str(tmp_path / "mine.json"))


def test_a_palette_with_a_byte_order_mark_and_names_that_no_file_can_have(tmp_path):
    (tmp_path / "mine.json").write_bytes(b"\xef\xbb\xbf" + '{"wörter": [0, 0, 200]}'.encode())
    assert Palette.find(str(tmp_path / "mine.json")).names == ("wörter",)
    for name in ("a" * 5000, "a\0b", str(tmp_path)):
        with pytest.raises(PowersteerError, match="there is no palette"):
            Palette.find(name)


def test_labels_that_it_has_not_are_refused():
    palette = Palette.of_names(["cat", "dog"])
    with pytest.raises(PowersteerError, match="label 'dogs' is not among the palette's 2 classes; did you mean 'dog'"):
        palette.index("dogs")
    for label in (2, -2):
        with pytest.raises(PowersteerError, match=f"label {label} is outside the palette of 2 classes"):
            palette.picture(np.array([[0, label]]))
