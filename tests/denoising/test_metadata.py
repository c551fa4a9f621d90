import re

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from powersteer.core.errors import PowersteerError
from powersteer.denoising.sampling.metadata import CONDITIONS_KEY, SETTINGS_KEY, read_metadata, save_picture


def test_settings_and_conditions_come_back_as_they_were(tmp_path):
    (tmp_path / "drawing.png").write_bytes(bytes(range(256)))
    settings = {"prompt": "ein Füchslein 🦊", "scale": [0.5, 1.0], "scheduler": None}
    save_picture(Image.new("RGB", (4, 4), "red"), tmp_path / "it.png", settings, [tmp_path / "drawing.png"] * 2)
    read = read_metadata(tmp_path / "it.png")
    assert (read.settings, read.conditions) == (settings, [bytes(range(256))] * 2)
    with Image.open(tmp_path / "it.png") as picture:
        assert picture.getpixel((3, 3)) == (255, 0, 0)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".partial"] == []


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "does not say how it was made"),
        ({SETTINGS_KEY: "{"}, "the text of the settings in it.png is not JSON"),
        ({SETTINGS_KEY: "[1]"}, "the text of the settings in it.png is not a JSON object but an array"),
        ({SETTINGS_KEY: "[" * 100_000}, "nested deeper than 100 levels"),
        ({SETTINGS_KEY: '{"scale": NaN}'}, "NaN is no number"),
        ({SETTINGS_KEY: '{"seed": ' + "7" * 6000 + "}"}, "has 6000 digits, more than 300"),
        ({SETTINGS_KEY: '{"seed": 1, "seed": 2}'}, "'seed' comes twice"),
        ({SETTINGS_KEY: "{}", CONDITIONS_KEY: "7"}, "are damaged"),
        ({SETTINGS_KEY: "{}", CONDITIONS_KEY: '["%"]'}, "are damaged"),
        ({SETTINGS_KEY: " " * 50_000_000}, "it.png"),  # packed to a few kilobytes
    ],
)
def test_what_a_picture_does_not_say_or_says_wrongly_is_refused(tmp_path, told, said):
    metadata = PngInfo()
    for key, text in told.items():
        metadata.add_text(key, text, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "it.png", pnginfo=metadata)
    with pytest.raises(PowersteerError, match=re.escape(said)):
        read_metadata(tmp_path / "it.png")


def test_no_picture_is_refused(tmp_path):
    (tmp_path / "it.png").write_text("no picture")
    with pytest.raises(PowersteerError, match=r"it\.png is not a readable picture"):
        read_metadata(tmp_path / "it.png")
