import base64
import io
import json
import random
import struct
import zipfile
import zlib

import pytest
from PIL import Image

from conftest import draw_pairs
from powersteer.apps.studio import uploads
from powersteer.apps.studio.training import Training
from powersteer.apps.studio.uploads import check_picture, unpack_pairs, write_drawing
from powersteer.core.errors import PowersteerError


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is a few bytes long."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def as_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def packed(tmp_path, members: dict[str, bytes]):
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return tmp_path / "pairs.zip"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no picture", "not a readable picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable picture"),
        (png_of_size(10_000, 8_000), "10000×8000 pixels"),
        (png_of_size(60_000, 60_000), "too large"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused_before_a_pixel_is_decoded(tmp_path, content, said):
    (tmp_path / "it.png").write_bytes(content)
    with pytest.raises(PowersteerError, match=said):
        check_picture(tmp_path / "it.png")


def test_a_drawing_is_kept_byte_for_byte(tmp_path):
    content = encoded(Image.linear_gradient("L"))
    file = write_drawing(as_url(content), tmp_path / "drawing.png")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "drawing",
    [
        "/etc/passwd",
        "data:image/png;base64,!!!",
        "data:image/svg+xml;base64,PHN2Zy8+",
        as_url(encoded(Image.new("L", (8, 8)), "JPEG")),
        as_url(encoded(Image.new("L", (2000, 8)))),
        as_url(png_of_size(60_000, 60_000)),
        "data:image/png;base64,ä",
        "data:image/png;base64,",
        "data:image/png;base64," + "A" * 8_000_004,
        as_url(encoded(Image.new("L", (8, 8)))[:40]),
    ],
)
def test_a_drawing_that_no_canvas_made_is_refused(tmp_path, drawing):
    with pytest.raises(PowersteerError, match="drawing could not be read"):
        write_drawing(drawing, tmp_path / "drawing.png")
    assert not (tmp_path / "drawing.png").exists()


def test_a_zip_of_one_folder_gives_that_folder(tmp_path):
    members = {"mine/metadata.jsonl": b"{}", "mine/images/0.png": encoded(Image.new("L", (8, 8))), "__MACOSX/x": b""}
    folder = unpack_pairs(packed(tmp_path, members), tmp_path / "out")
    assert folder == tmp_path / "out" / "mine"
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == ["images/0.png", "metadata.jsonl"]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(PowersteerError, match="leads out of it"):
        unpack_pairs(packed(tmp_path, {"a.txt": b"a", name: b"x"}), tmp_path / "deep" / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["pairs.zip"]


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("images/0.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(PowersteerError, match=r"the link 'images/0\.png'"):
        unpack_pairs(tmp_path / "pairs.zip", tmp_path / "out")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"zeros.bin": bytes(40_000_000)}, "or a trap"),
        ({"images/0.png": png_of_size(60_000, 60_000)}, "too large"),
        ({"images/0.png": b"no picture"}, "not a readable picture"),
        ({}, "is empty"),
    ],
)
def test_bombs_and_rubbish_leave_nothing_behind(tmp_path, members, said):
    with pytest.raises(PowersteerError, match=said):
        unpack_pairs(packed(tmp_path, members), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_and_bytes_of_a_zip_are_bounded(tmp_path, monkeypatch):
    archive = packed(tmp_path, {f"{i}.txt": bytes(range(256)) * 20 for i in range(4)})
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    with pytest.raises(PowersteerError, match="4 files, more than 3"):
        unpack_pairs(archive, tmp_path / "out")
    monkeypatch.setattr(uploads, "MAX_FILES", 4)
    monkeypatch.setattr(uploads, "MAX_UNPACKED_BYTES", 3 * 5120 + 1)
    with pytest.raises(PowersteerError, match="too large"):
        unpack_pairs(archive, tmp_path / "out")
    monkeypatch.setattr(uploads, "MAX_UNPACKED_BYTES", 4 * 5120)
    assert len(list(unpack_pairs(archive, tmp_path / "out").iterdir())) == 4


def test_damaged_and_encrypted_zips_are_refused(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 is no zip")
    with pytest.raises(PowersteerError, match=r"no.zip cannot be unpacked"):
        unpack_pairs(tmp_path / "no.zip", tmp_path / "out")
    archive = packed(tmp_path, {"a.txt": b"a" * 100})
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # of the file's own header, and of the directory's
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(PowersteerError, match="without a password"):
        unpack_pairs(archive, tmp_path / "out")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A zip with flipped bytes, cut short, with a part twice, or without one."""
    data = bytearray(content)
    place, length = chance.randrange(len(data)), chance.randrange(1, 64)
    kind = chance.randrange(5)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        del data[place : place + length]
    elif kind == 2:
        data[place:place] = data[place : place + length]
    else:
        for _ in range(1 if kind == 3 else chance.randrange(2, 20)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def fuzzed(tmp_path, compression: int, seeds: range) -> tuple[int, int]:
    """How many of so many damaged zips are unpacked, and how many refused; a refused one leaves nothing."""
    pairs = draw_pairs(tmp_path / "mine", 3)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", compression) as archive:
        for file in sorted(pairs.rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path))
    content = (tmp_path / "whole.zip").read_bytes()
    training = Training("powersteer-tiny", tmp_path / "runs", tmp_path / "work")
    unpacked = refused = 0
    for seed in seeds:
        (tmp_path / "it.zip").write_bytes(damaged(content, random.Random(seed)))
        before = sorted((tmp_path / "work" / "pairs").glob("*"))
        try:
            found = training.look(tmp_path / "it.zip", who=str(seed % 2))
            assert found.folder.is_dir()
            unpacked += 1
        except PowersteerError as error:
            assert str(tmp_path) not in str(error)
            assert "\n" not in str(error)
            assert sorted((tmp_path / "work" / "pairs").glob("*")) == before
            refused += 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.zip", "mine", "whole.zip", "work"]
    return unpacked, refused


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_zips_are_unpacked_or_refused_and_leave_nothing(tmp_path, compression):
    unpacked, refused = fuzzed(tmp_path, compression, range(75))
    assert refused > 30
    assert unpacked + refused == 75


@pytest.mark.slow
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_thousands_of_damaged_zips(tmp_path, compression):
    unpacked, refused = fuzzed(tmp_path, compression, range(1000, 1500))
    assert unpacked + refused == 500
    assert min(unpacked, refused) > 0


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a" * 300 + ".png"], "cannot be unpacked"),
        (["a/" * 2000 + "0.png"], "more than 20 deep"),
        (["a/" * 19 + "a" * 200 + "/" + "b" * 300], "more than 20 deep|cannot be unpacked"),
        (["a\0b.png", "a\0c.png"], "twice|leads out of it|cannot be unpacked|not a readable picture"),
        (["images", "images/0.png"], "cannot be unpacked"),
        (["0.txt", "0.txt"], "'0.txt' twice"),
        (["a/0.txt", "a//0.txt"], "'a/0.txt' twice"),
        (["a\\0.txt", "a/0.txt"], "'a/0.txt' twice"),
        ([""], "cannot be unpacked"),
        (["."], "cannot be unpacked"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_no_folder_can_hold_are_refused(tmp_path, names, said):
    def raw(name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        return info

    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for name in names:
            archive.writestr(raw(name), b"x")
    with pytest.raises(PowersteerError, match=said):
        unpack_pairs(tmp_path / "pairs.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("elsewhere", ["../secret.png", "../../secret.png", "{tmp_path}/secret.png"])
def test_a_zip_whose_metadata_names_pictures_elsewhere_is_refused(tmp_path, elsewhere):
    secret = Image.new("RGB", (32, 32))
    secret.save(tmp_path / "secret.png")
    named = elsewhere.format(tmp_path=tmp_path)
    row = json.dumps({"file_name": "0.png", "conditioning_image_file_name": named, "text": "a"})
    archive = packed(tmp_path, {"0.png": encoded(secret), "metadata.jsonl": row.encode()})
    work_dir = tmp_path / "work"
    (work_dir / "pairs").mkdir(parents=True)
    for place in (work_dir, work_dir / "pairs"):
        secret.save(place / "secret.png")
    with pytest.raises(PowersteerError, match="names pictures that are not in it"):
        Training("powersteer-tiny", tmp_path / "runs", work_dir).look(archive)
    assert [file.name for file in (work_dir / "pairs").iterdir()] == ["secret.png"]


def test_pairs_of_a_zip_are_checked_and_shown(tmp_path):
    pairs = draw_pairs(tmp_path / "mine", 14)
    files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in pairs.rglob("*.*")}
    found = Training("powersteer-tiny", tmp_path / "runs", tmp_path / "work").look(packed(tmp_path, files))
    assert found.report.facts["pairs"] == 14
    assert found.report.errors == []
    assert len(found.shown) == 12
    shown, caption = found.shown[0]
    assert (shown.size, caption) == ((160 + 4 + 160, 160), "a fox")


def test_errors_of_pairs_do_not_tell_where_the_server_keeps_them(tmp_path):
    pairs = draw_pairs(tmp_path / "mine", 8)
    Image.new("L", (32, 20)).save(pairs / "drawings" / "3.png")
    files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in pairs.rglob("*.*")}
    training = Training("powersteer-tiny", tmp_path / "runs", tmp_path / "work")
    found = training.look(packed(tmp_path, files))
    assert "must have one aspect ratio" in found.report.errors[0]
    assert str(tmp_path) not in found.report.errors[0]
    with pytest.raises(PowersteerError, match="cannot be trained on"):
        training.start(found, "mine")
    assert not (tmp_path / "runs").exists()
