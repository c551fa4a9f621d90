"""Shards: claimed twice, damaged, or hostile. Nothing is extracted, nothing outside is read, nothing is lost unsaid."""

import io
import json
import random
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.data.layouts import Columns, look, read_rows
from powersteer.data.stream import list_shards, read_shard


@pytest.fixture
def source(tmp_path):
    return draw_pairs(tmp_path / "source", 4)


def entry(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def pack(path, entries, **options):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(source, i, key=None, **others):
    key = f"{i:04d}" if key is None else key
    members = {
        "image.png": (source / "images" / f"{i}.png").read_bytes(),
        "conditioning_image.png": (source / "drawings" / f"{i}.png").read_bytes(),
        "txt": f"thing {i}".encode(),
    } | others
    return [entry(f"{key}.{kind}", content) for kind, content in members.items() if content is not None]


def both(shard):
    """How the folder and the stream read it: rows, or the refusal."""
    results = []
    for read in (lambda: read_rows(shard.parent), lambda: list(read_shard(str(shard), Columns()))):
        try:
            rows = read()
            for row in rows:
                row.image.content(), row.conditioning_image.content()
            results.append([(row.where, row.texts) for row in rows])
        except PowersteerError as error:
            assert "\n" not in str(error)
            results.append(str(error))
    return results


def refused(shard, words):
    for said in both(shard):
        assert isinstance(said, str) and words in said, said


# -- names claimed twice


def test_two_members_that_claim_one_column(source, tmp_path):
    picture, shard = (source / "images" / "0.png").read_bytes(), tmp_path / "web" / "a.tar"
    for kind, claimed in (
        ("image.jpg", "both 'image'"),
        ("png", "both 'image'"),
        ("IMAGE.PNG", "both 'image.png'"),
        ("conditioning_image.npy", "both 'conditioning_image'"),
    ):
        pack(shard, pair(source, 0, **{kind: picture}))
        refused(shard, claimed)
        for said in both(shard):
            assert "'0000." in said and f"0000.{kind}'" in said
    pack(shard, [*pair(source, 0), *pair(source, 0)[:1]])
    refused(shard, "a.tar[0000]: '0000.image.png' and '0000.image.png' are both 'image.png'")
    pack(shard, pair(source, 0, json=json.dumps({"text": "another thing"}).encode()))
    refused(shard, "0000.txt and 0000.json give different captions: keep one of them")
    pack(shard, pair(source, 0, json=json.dumps({"text": "thing 0", "generated_text": "it"}).encode()))
    assert both(shard) == [[("a.tar[0000]", ("thing 0",))]] * 2


def test_a_key_that_comes_twice_in_a_shard(source, tmp_path):
    shard = pack(tmp_path / "web" / "a.tar", [*pair(source, 0), *pair(source, 1), *pair(source, 0)])
    refused(shard, "a.tar[0000]: the key comes twice in the shard: its members must lie side by side")
    halves = [*pair(source, 0)[:1], *pair(source, 1), *pair(source, 0)[1:]]
    refused(pack(shard, halves), "a.tar[0000]")


def test_the_same_pair_in_two_shards_is_refused_and_the_same_number_is_not(source, tmp_path):
    """Many tools number each shard from 0; a copy of a shard is something else."""
    pack(tmp_path / "web" / "a.tar", [*pair(source, 0, "0"), *pair(source, 1, "1")])
    pack(tmp_path / "web" / "b.tar", [*pair(source, 2, "0"), *pair(source, 3, "1")])
    assert [row.text for row in read_rows(tmp_path / "web")] == [f"thing {i}" for i in range(4)]
    pack(tmp_path / "web" / "c.tar", pair(source, 1, "1"))
    with pytest.raises(PowersteerError, match=r"c.tar\[1\]: the same pair as in .*a.tar: remove one"):
        read_rows(tmp_path / "web")
    assert len(look(tmp_path / "web").rows) == 4


# -- what is no member of a pair


def test_hidden_members_are_none_and_others_are_said(source, tmp_path):
    hidden = [
        entry("._0000.image.png", b"\0\5\x16\7"),
        entry("__MACOSX/0000.image.png", b"x"),
        entry("./.x/0.png", b"x"),
    ]
    shard = pack(tmp_path / "web" / "a.tar", [*hidden, *pair(source, 0, cls=b"3", **{"depth.png": b"x"})])
    (tmp_path / "web" / "._a.tar").write_bytes(b"\0\5\x16\7")
    (tmp_path / "web" / ".b.tar").write_bytes(b"half a shard")
    (tmp_path / "web" / "notes.txt").write_text("mine")
    assert both(shard) == [[("a.tar[0000]", ("thing 0",))]] * 2
    left = [name.rpartition("/")[2] for name in look(tmp_path / "web").left_out]
    assert left == ["notes.txt", "a.tar:0000.cls", "a.tar:0000.depth.png"]
    assert list_shards(str(tmp_path / "web")) == [f"file://{shard}"]


def test_a_dot_in_a_key_is_told(source, tmp_path):
    shard = pack(tmp_path / "web" / "a.tar", pair(source, 0, "photo.v2"))
    refused(
        shard, "no member photo.image.png (column image), but v2.conditioning_image.png, v2.image.png, v2.txt: a key"
    )


def test_links_and_devices_are_not_followed(source, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes((source / "images" / "1.png").read_bytes())
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        for target in (str(secret), "0000.txt"):
            picture = entry("0000.image.png", type=kind, linkname=target)
            shard = pack(tmp_path / "web" / "a.tar", [picture, *pair(source, 0, **{"image.png": None})])
            refused(shard, "no member 0000.image.png")
    outside = [entry(name, b"x") for name in ("../../evil.txt", "/evil.txt", "a/../../evil.txt")]
    before = sorted(path for path in tmp_path.rglob("*"))
    both(pack(tmp_path / "web" / "a.tar", [*outside, *pair(source, 0)]))
    assert sorted(path for path in tmp_path.rglob("*")) == before


# -- damaged


def test_a_shard_that_ends_early_or_goes_on_is_refused(source, tmp_path):
    shard = pack(tmp_path / "web" / "a.tar", [one for i in range(4) for one in pair(source, i)])
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        headers = [member.offset for member in tar]
    ends = whole.rindex(b"thing 3") // 512 * 512 + 512
    assert both(shard) == [[(f"a.tar[{i:04d}]", (f"thing {i}",)) for i in range(4)]] * 2
    for damaged in (
        whole[:ends],  # the last pair is whole, what says so is missing
        whole[: headers[6]],
        whole[: headers[6] + 100],
        whole[: headers[6] + 600],
        whole[: headers[6]] + b"\1" * 512 + whole[headers[6] + 512 :],  # tarfile would end here, in silence
        whole + whole,  # joined with cat
        b"",
        b"\0" * 10,
    ):
        shard.write_bytes(damaged)
        refused(shard, f"cannot read the shard {shard}: ")
    shard.write_bytes(whole[: ends + 1024])  # without the padding of tar's records
    assert len(both(shard)[0]) == 4
    shard.write_bytes(b"\0" * 1024)  # a shard of nothing
    assert both(shard)[1] == []


def number(value):
    """As GNU tar writes what eight digits do not hold."""
    return tarfile.itn(value, 12, tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [2**40, 2**62, 2**63, 2**80, -512, -1024, -(2**40), 10**6])
def test_sizes_that_are_none(source, tmp_path, size):
    """Python 3.11 follows a negative size back to where it was, for ever."""
    info, _ = entry("0000.image.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = number(size)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    shard = tmp_path / "web" / "a.tar"
    shard.parent.mkdir()
    shard.write_bytes(bytes(header) + pack(tmp_path / "x.tar", pair(source, 0)).read_bytes())
    began = time.monotonic()
    refused(shard, f"cannot read the shard {shard}: ")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "-512"},
        {"size": "9" * 6000},
        {"size": str(2**62)},
        {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": str(2**40),
            "GNU.sparse.name": "0.png",
        },
        {"GNU.sparse.map": "0," * 1000 + "1", "GNU.sparse.size": str(2**40)},
        {"path": "0000.image.png\0"},
        {"comment": "1" * 1_000_000},
    ],
)
def test_extended_headers_that_lie(source, tmp_path, fields):
    info, content = entry("0000.image.png", b"1\n0\n512\n" + b"\0" * 600)
    info.pax_headers = fields
    shard = pack(tmp_path / "web" / "a.tar", [(info, content), *pair(source, 0)[1:]], format=tarfile.PAX_FORMAT)
    began = time.monotonic()
    both(shard)
    assert time.monotonic() - began < 10
    if "comment" not in fields and "path" not in fields:
        refused(shard, "cannot read the shard")


def test_long_chains_of_headers(source, tmp_path):
    """Each says that another follows: tarfile goes into itself for every one."""
    long = tarfile.TarInfo._create_payload(b"x" * 200)
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 200
    chain = (header.tobuf(tarfile.GNU_FORMAT) + long) * 3000
    shard = tmp_path / "web" / "a.tar"
    shard.parent.mkdir()
    shard.write_bytes(chain + pack(tmp_path / "x.tar", pair(source, 0)).read_bytes())
    refused(shard, "cannot read the shard")


def test_names_that_are_no_text(source, tmp_path):
    shard = pack(tmp_path / "web" / "a.tar", pair(source, 0, "f\udcff\udcfe"), errors="surrogateescape")
    (one,), (other,) = both(shard)
    assert one == other and one[1] == ("thing 0",)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x93NUMPY\1\0\xff\xff", None])
def test_feature_maps_in_shards(source, tmp_path, content):
    if content is None:
        buffer = io.BytesIO()
        np.save(buffer, np.ones((5, 8, 8), dtype=np.float16))
        content = buffer.getvalue()
    members = pair(source, 0, **{"conditioning_image.png": None, "conditioning_image.npy": content})
    (row,) = read_rows(pack(tmp_path / "web" / "a.tar", members).parent)
    assert row.conditioning_image.is_features
    if len(content) > 100:
        assert row.conditioning_image.features().shape == (5, 8, 8)
    else:
        with pytest.raises(PowersteerError, match=r"a.tar:0000.conditioning_image.npy' .*\.npy"):
            row.conditioning_image.features()


def test_json_and_text_in_shards(source, tmp_path):
    shard = tmp_path / "web" / "a.tar"
    for kind, content, words in (
        ("json", b"[" * 100_000, "a.tar[0000] is not JSON: nested deeper than 100 levels"),
        ("json", rb'{"text": "\ud83d"}', "holds half a character"),
        ("json", b"[1]", "a.tar[0000] is not a JSON object but an array"),
        ("json", b'{"text": 5}', "column 'text' holds 5, which is no text"),
        ("txt", b"\xff\xfea\0", "a.tar[0000] is not UTF-8 text but UTF-16"),
    ):
        pack(shard, pair(source, 0, **{"txt": None, kind: content}))
        refused(shard, words)
    pack(shard, pair(source, 0, txt=b"\xef\xbb\xbfein Fuchs\n"))
    assert both(shard) == [[("a.tar[0000]", ("ein Fuchs",))]] * 2


def test_ranges_of_shards(source, tmp_path):
    pack(tmp_path / "web" / "001.tar", pair(source, 0))
    folder = tmp_path / "web"
    for pattern in ("{5..1}.tar", "{0..99999999999}.tar", "{0.." + "9" * 6000 + "}.tar"):
        with pytest.raises(PowersteerError, match=r"is no range of shards: give \{000\.\.099\}, the lesser first"):
            list_shards(f"{folder}/{pattern}")
    with pytest.raises(PowersteerError, match="stands for more than 100,000 shards"):
        list_shards(f"{folder}/{{0..999}}-{{0..999}}.tar")
    assert list_shards(f"{folder}/{{001..001}}.tar") == [f"{folder}/001.tar"]
    names = [f"{folder}/{name}.tar" for name in ("a-08", "a-10", "b-08", "b-10")]
    assert list_shards(f"{folder}/{{a,b}}-{{08..10..2}}.tar") == names
    for literal in ("{001}.tar", "{001.tar", "\\001.tar", "{" * 5000 + "}" * 5000 + ".tar"):  # folders may be called so
        assert list_shards(f"{folder}/{literal}") == [f"{folder}/{literal}"]


def fuzzed(whole, chance):
    content = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        at = chance.randrange(len(content))
        what = chance.random()
        if what < 0.5:
            at = at // 512 * 512 + chance.randrange(512) if what < 0.25 else at
            content[min(at, len(content) - 1)] = chance.randrange(256)
        elif what < 0.7:
            del content[at : at + chance.choice([1, 511, 512, 5000])]
        elif what < 0.9:
            content[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice([1, 512])))
        else:
            content[at : at + 512] = content[:512]
        content = content or bytearray(b"\0")
    return bytes(content)


@pytest.mark.slow
def test_a_thousand_damaged_shards_are_read_or_refused(source, tmp_path):
    """Each as a folder and as a stream; half of them with their headers' checksums mended, to get further in."""
    entries = [one for i in range(3) for one in pair(source, i, json=b'{"generated_text": "it"}')]
    shard = tmp_path / "web" / "a.tar"
    chance, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for i in range(1000):
        layout = tarfile.PAX_FORMAT if i % 4 < 2 else tarfile.GNU_FORMAT
        content = fuzzed(pack(shard, entries, format=layout).read_bytes(), chance)
        if i % 2:
            content = bytearray(content)
            for at in range(0, len(content) - 511, 512):
                if content[at + 257 : at + 262] == b"ustar":
                    content[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(content[at : at + 512]))[0]
        shard.write_bytes(content)
        for result in both(shard):
            outcomes["refused" if isinstance(result, str) else "read"] += 1
    assert sum(outcomes.values()) == 2000 and min(outcomes.values()) > 100, outcomes


def test_pictures_in_shards_are_opened_in_place(source, tmp_path):
    shard = pack(tmp_path / "web" / "a.tar", pair(source, 2))
    (row,) = read_rows(shard.parent)
    assert row.image.picture().tobytes() == Image.open(source / "images" / "2.png").tobytes()
    shard.unlink()
    with pytest.raises(PowersteerError, match=r"a.tar:0002.image.png' \(column image\) cannot be read: No such file"):
        row.image.picture()
