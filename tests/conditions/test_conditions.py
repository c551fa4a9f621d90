import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from powersteer import PowersteerError
from powersteer.conditions import to_condition
from powersteer.conditions.sketch import open_picture, sketch_condition


def drawn(mode="L", paper=255, ink=0, size=(40, 40)):
    image = Image.new(mode, size, paper)
    ImageDraw.Draw(image).line((5, 5, 35, 35), fill=ink, width=3)
    return image


def test_polarity_is_found_and_turned():
    dark_on_light, was = sketch_condition(drawn(), (40, 40))
    light_on_dark, was_not = sketch_condition(drawn(paper=0, ink=255), (40, 40))
    assert was and not was_not
    assert np.array_equal(np.array(dark_on_light), np.array(light_on_dark))
    assert dark_on_light.getpixel((20, 20)) == 255 and dark_on_light.getpixel((2, 38)) == 0


def test_a_wide_drawing_is_fitted_not_stretched():
    image = Image.new("L", (80, 40), 255)
    ImageDraw.Draw(image).rectangle((20, 0, 59, 39), fill=0)
    condition = np.array(sketch_condition(image, (40, 40))[0])
    assert condition[:8].max() == 0 and condition[-8:].max() == 0  # padded with paper above and below
    rows, columns = np.where(condition > 127)
    assert np.ptp(rows) == np.ptp(columns) == 19


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_mode_is_read(tmp_path, mode):
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    drawn("RGB", "white", "black").convert(mode).save(path)
    picture = open_picture(path)
    assert picture.mode == "RGB" and picture.getpixel((20, 20))[0] < 60 and picture.getpixel((2, 38))[0] > 200


def test_transparency_becomes_paper(tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((5, 5)) == (255, 255, 255)


def test_rotation_in_exif_is_followed(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90°
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 40)


def test_pictures_become_tensors_in_their_own_channels():
    grey = to_condition([drawn(), drawn()], 1)
    colour = to_condition(drawn("RGB", "red", "blue"), 3)
    assert grey.shape == (2, 1, 40, 40) and colour.shape == (1, 3, 40, 40)
    assert colour[0, :, 2, 38].tolist() == [1, 0, 0] and colour[0, :, 20, 20].tolist() == [0, 0, 1]


def test_a_tensor_passes_as_it_is():
    tensor = torch.rand(2, 4, 8, 8)
    assert to_condition(tensor, 4) is tensor


@pytest.mark.parametrize(
    ("condition", "channels", "message"),
    [
        ([drawn(), drawn(size=(20, 20))], 1, "pictures of one size"),
        ([], 1, "one or more pictures"),
        (drawn(), 5, "5 channels is no PIL picture"),
        (drawn(), 4, "no alpha channel: a condition of 4 channels is colour in RGB and structure in alpha"),
        (torch.rand(1, 8, 8), 1, r"must have shape \(N, 1, H, W\), not \(1, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8) - 0.5, 1, r"in \[0, 1\], not \[-0.5, -0.5\]"),
    ],
)
def test_malformed_conditions_are_refused(condition, channels, message):
    with pytest.raises(PowersteerError, match=message):
        to_condition(condition, channels)
