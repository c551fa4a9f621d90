"""The door for pictures: profiles, depth, sizes, formats; and the one rule for what is transparent."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw
from PIL.PngImagePlugin import PngInfo

from powersteer import PowersteerError
from powersteer.conditions import to_condition
from powersteer.conditions.files import read_condition
from powersteer.core.images import open_picture, picture_suffixes
from powersteer.data.rows import Picture


def encoded(picture, kind="PNG", **settings):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def wide_gamut():
    """A profile whose primaries are those of sRGB, red and green exchanged: no eye could miss it."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb)
    count = struct.unpack(">I", srgb[128:132])[0]
    tags = {srgb[132 + 12 * i : 136 + 12 * i]: 132 + 12 * i for i in range(count)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        srgb[green + 4 : green + 12],
        srgb[red + 4 : red + 12],
    )
    text = srgb.find("sRGB".encode("utf-16-be"))
    swapped[text : text + 8] = "mine".encode("utf-16-be")
    return bytes(swapped)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_followed(mode):
    plain = Image.new("RGB", (16, 16), (200, 30, 40))
    picture = plain.quantize(4) if mode == "P" else plain.convert(mode)
    found = open_picture(encoded(picture, icc_profile=wide_gamut()), "x").convert("RGB").getpixel((5, 5))
    assert np.abs(np.array(found) - (30, 200, 40)).max() <= 2  # what is said to be green is green
    assert open_picture(encoded(picture), "x").convert("RGB").getpixel((5, 5)) == (200, 30, 40)


def test_srgb_itself_changes_no_pixel_and_a_broken_profile_is_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(open_picture(encoded(noise, icc_profile=srgb), "x"), noise)
    with pytest.raises(PowersteerError, match="x has a colour profile that cannot be used"):
        open_picture(encoded(noise, icc_profile=b"no profile"), "x")


def deep_png():
    """16 bits a channel, RGB: Pillow would drop the lower ones and say nothing."""
    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 8 for _ in range(8))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in parts:
        made += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return made


def much_text():
    info = PngInfo()
    info.add_text("notes", " " * 80_000_000, zip=True)
    return encoded(Image.new("L", (16, 16)), pnginfo=info)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"no picture", "of no known format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC picture, which is not read here: save it as PNG or JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "of no known format"),  # would run Ghostscript
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "not a readable picture"),
        (deep_png(), "16 bits a channel or more"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "16 bits a channel or more"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "16 bits a channel or more"),
        (much_text(), "too much text beside its pixels"),
        (encoded(Image.new("1", (20_000, 20_000))), "too many pixels: scale it down to 178 million at most"),
    ],
)
def test_what_is_no_usable_picture_is_told_apart(content, said):
    with pytest.raises(PowersteerError, match=f"^x .*{said}"):
        open_picture(content, "x")


def test_suffixes_are_those_that_pillow_reads():
    assert {".png", ".jpg", ".jfif", ".avif", ".webp", ".tif", ".gif", ".bmp", ".jpe"} <= picture_suffixes()
    assert not {".eps", ".pdf", ".mpg", ".txt", ".npy", ".svg"} & picture_suffixes()


# -- transparency

INK = (slice(10, 22), slice(4, 28))


def sketch(ink, paper, size=(32, 32)):
    """A bar of ink; colours are RGBA."""
    picture = Image.new("RGBA", size, paper)
    ImageDraw.Draw(picture).rectangle((4, 10, 27, 21), fill=ink)
    return picture


BAR = np.zeros((32, 32))
BAR[INK] = 1
CLEAR, WHITE, BLACK = (0, 0, 0, 0), (255, 255, 255, 255), (0, 0, 0, 255)


@pytest.mark.parametrize(
    "picture",
    [sketch(BLACK, CLEAR), sketch(WHITE, CLEAR), sketch(BLACK, (255, 255, 255, 0)), sketch(WHITE, BLACK)],
    ids=["dark on nothing", "light on nothing", "dark on white nothing", "light on black"],
)
def test_a_transparent_sketch_is_the_same_everywhere(picture, tmp_path):
    picture.save(tmp_path / "sketch.png")
    training = Picture("sketch.png", "c", (tmp_path / "sketch.png").read_bytes).condition(1, "sketch")
    generated, _ = read_condition(tmp_path / "sketch.png", 1, "sketch", (32, 32))
    prepared, _ = read_condition(tmp_path / "sketch.png", 1, "sketch", (32, 32), prepared=True)
    steered = to_condition(picture, 1, kind="sketch")
    array = to_condition(np.asarray(picture), 1, kind="sketch")
    for found in (np.asarray(training) / 255, generated[0], prepared[0], steered[0, 0], array[0, 0]):
        assert np.array_equal(found, BAR)


def test_transparent_margins_of_a_drawing_are_paper(tmp_path):
    for ink, paper in ((BLACK, WHITE), (WHITE, BLACK)):
        picture = sketch(ink, paper)
        ImageDraw.Draw(picture).rectangle((0, 0, 31, 3), fill=CLEAR)
        picture.save(tmp_path / "drawing.png")
        assert np.array_equal(read_condition(tmp_path / "drawing.png", 1, "sketch", (32, 32))[0][0], BAR)


def test_in_other_conditions_transparent_is_nothing_and_in_pictures_it_is_white(tmp_path):
    picture = sketch((90, 60, 30, 255), CLEAR)
    picture.save(tmp_path / "it.png")
    held = Picture("it.png", "c", (tmp_path / "it.png").read_bytes)
    for kind in ("segmentation", "layout", "normal", "pose"):
        found, _ = read_condition(tmp_path / "it.png", 3, kind, (32, 32))
        assert found[:, 0, 0].tolist() == [0, 0, 0] and (found[:, 15, 15] * 255).round().tolist() == [90, 60, 30]
        assert np.array_equal(np.asarray(held.condition(3, kind)) / np.float32(255), found.permute(1, 2, 0))
        assert np.array_equal(to_condition(picture, 3, kind=kind)[0], found)
    assert read_condition(tmp_path / "it.png", 1, "depth", (32, 32))[0][0, 0, 0] == 0
    assert held.picture().getpixel((0, 0)) == (255, 255, 255)


# -- what people hand over in Python


def test_arrays_are_conditions():
    grey = np.random.default_rng(0).integers(0, 256, (32, 24), dtype=np.uint8)
    wanted = to_condition(Image.fromarray(grey), 1)
    colour = np.random.default_rng(1).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    for given, found in (
        (grey, wanted),
        (grey[..., None], wanted),
        (grey.astype(np.uint16) * 257, wanted),
        (grey / 255, wanted),
        (grey.astype(np.float32) / 255, wanted),
        ([grey, grey], wanted.repeat(2, 1, 1, 1)),
        (grey > 127, (wanted > 0.5).float()),
        (colour, to_condition(Image.fromarray(colour), 1)),
    ):
        assert np.allclose(to_condition(given, 1), found, atol=1e-6)
    assert np.array_equal(to_condition(colour, 3)[0], (colour.transpose(2, 0, 1) / np.float32(255)))
    features = np.random.default_rng(2).normal(0, 3, (24, 8, 6))
    assert to_condition(features, 24, None, "feature").shape == (1, 24, 8, 6)


def test_16_bits_and_floats_are_not_clipped():
    ramp = np.linspace(0, 1, 4096).reshape(64, 64)
    deep = Image.fromarray((ramp * 65535).astype(np.uint16))
    assert to_condition(deep, 1).mean().item() == pytest.approx(0.5, abs=1e-3)
    assert np.allclose(to_condition(Image.fromarray(ramp.astype(np.float32)), 1), ramp, atol=1e-6)
    with pytest.raises(PowersteerError, match=r"must lie in \[0, 1\], not \[0, 255\]; did you forget to divide by 255"):
        to_condition(Image.fromarray((255 * ramp).astype(np.float32)), 1)
    with pytest.raises(PowersteerError, match="mode I may hold anything"):
        to_condition(Image.new("I", (8, 8)), 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "a NoneType is no condition: give a picture, array or tensor"),
        ("drawing.png", r"a str is no condition: open it: Image\.open"),
        ([None], "a NoneType is no condition"),
        (7, "a int is no condition"),
        (np.zeros(5), r"this one is \(5,\), float64"),
        (np.array([["a"]]), "this one is"),
        (np.zeros((8, 8), np.int64), "this one is .*int64"),
        (np.full((8, 8), np.nan), "must lie in"),
        (np.zeros((8, 8, 2), np.float32), r"must have shape \(N, 1, H, W\)"),
    ],
)
def test_what_is_no_condition_is_refused(given, said):
    with pytest.raises(PowersteerError, match=said):
        to_condition(given, 1)


def test_what_is_not_said_of_a_feature_map_is_refused(tmp_path):
    whole = io.BytesIO()
    np.save(whole, np.zeros((2, 4, 4), np.float32))
    content = whole.getvalue()
    forged = content.replace(b"(2, 4, 4)", b"(9**9,)  ")
    absurd = content.replace(b"'shape': (2, 4, 4), }", b"'shape': (999999999, 9999), }"[:21])
    for i, wrong in enumerate((forged, absurd, content[:-1], content + b"\0", content[:20], b"", b"\x93NUMPY\x09\x09")):
        (tmp_path / f"{i}.npy").write_bytes(wrong)
        with pytest.raises(PowersteerError, match=rf"{i}\.npy is not a readable \.npy"):
            read_condition(tmp_path / f"{i}.npy", 2, "feature", (4, 4))
