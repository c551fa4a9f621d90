import io
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.backbones.unet import UNetBackbone
from powersteer.data import encode
from powersteer.data.contents import Contents
from powersteer.data.encode import conditions_of, encode_pairs
from powersteer.data.pairs import Pairs, Views, bucket_sizes, nearest
from powersteer.data.prepare.openmoji import concept_of, draw_pair, list_drawings, split_by_concept
from powersteer.data.rows import Picture

SIZE = (32, 32)

SVG = """<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
<g id="color"><rect x="9" y="9" width="54" height="54" fill="#ff0000"/></g>
<g id="line"><rect x="9" y="9" width="54" height="54" fill="none" stroke="#000000" stroke-width="4"/></g></svg>"""


def points(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_drawing_is_the_line_group_alone_with_ink_on_black():
    picture, ink = draw_pair(SVG, 72)
    assert picture.shape == (72, 72, 3) and ink.shape == (72, 72)
    assert picture[36, 36].tolist() == [255, 0, 0] and picture[2, 2].tolist() == [255, 255, 255]
    assert ink[9, 36] == 255 and ink[36, 36] == 0 and ink[2, 2] == 0


@pytest.mark.parametrize(
    "members",
    [
        ["👩‍🚀", "👨‍🚀", "🧑🏽‍🚀", "👩🏿‍🚀"],
        ["🏃", "🏃🏻‍♀️", "🏃‍♂️", "🏃‍♀️‍➡️"],
        ["👨‍🦰", "👩🏿‍🦳", "🧑‍🦱", "🧑", "👩🏻"],
        ["👪", "👨‍👩‍👧‍👦", "👩‍👦"][1:],
        ["👫", "👭🏽", "👬"],
        ["🤴", "👸🏾", "🫅"],
    ],
)
def test_one_concept_whatever_tone_gender_and_hair(members):
    assert len({concept_of(points(member)) for member in members}) == 1


def test_other_things_are_other_concepts():
    assert len({concept_of(points(emoji)) for emoji in ["🦊", "🐻", "👩‍🚀", "👩‍🚒", "👩", "👧", "👵", "🇯🇵", "🇫🇷"]}) == 9


def test_no_concept_straddles_the_splits():
    drawings = list_drawings()
    assert len(drawings) > 3900
    splits = split_by_concept([drawing.concept for drawing in drawings])
    counts = defaultdict(set)
    for drawing in drawings:
        counts[splits[drawing.concept]].add(drawing.concept)
    assert len(counts["test"]) == 200 and len(counts["validation"]) == 40
    assert not counts["test"] & counts["train"]
    # The same name in two tones: looked up by name, not by concept.
    by_name = {drawing.name: splits[drawing.concept] for drawing in drawings}
    tones = [name for name in by_name if name.endswith("dark skin tone")]
    assert len(tones) > 100
    for name in tones:
        plain = name.replace(" medium-dark skin tone", "").replace(" dark skin tone", "")
        assert by_name.get(plain, by_name[name]) == by_name[name], name


def test_pairs_are_read_in_their_ranges(pairs_dir):
    pairs = Pairs(pairs_dir, SIZE)
    image, condition = pairs[3]
    assert len(pairs) == 12 and image.shape == (3, 32, 32) and condition.shape == (1, 32, 32)
    assert image.min() == -1 and image.max() == 1 and set(condition.unique().tolist()) == {0, 255}
    assert pairs.texts[3] == "a fox"


def test_limit_spreads_over_the_folder(pairs_dir):
    names = [Path(row.image.name).stem for row in Pairs(pairs_dir, SIZE, limit=4).rows]
    assert names == ["0", "3", "6", "9"]


def _rewrite(folder, change):
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[2].update(file_name="images/none.png"),
            r"\[2\]: '.*none.png' not found \(column file_name\)",
        ),
        (lambda rows: rows[1].pop("text"), r"\[1\] has no caption \(.*\): write one, or give default_prompt"),
        (lambda rows: rows[1].pop("file_name"), r"\[1\]: column 'file_name' is missing"),
        (lambda rows: rows.insert(4, "{"), r"\[4\] is not JSON: "),
        (lambda rows: rows.clear(), "has no rows"),
    ],
)
def test_a_bad_row_is_named(pairs_dir, change, message):
    _rewrite(pairs_dir, change)
    with pytest.raises(PowersteerError, match=message):
        Pairs(pairs_dir, SIZE)


def test_missing_folder_and_too_many_asked_for(tmp_path, pairs_dir):
    with pytest.raises(PowersteerError, match="there is no folder of pairs"):
        Pairs(tmp_path / "none", SIZE)
    with pytest.raises(PowersteerError, match="holds 12 pairs, 13 were asked for"):
        Pairs(pairs_dir, SIZE, limit=13)


def test_bad_pictures_are_named(pairs_dir):
    (pairs_dir / "images" / "5.png").write_bytes(b"no picture")
    Image.new("L", (16, 32)).save(pairs_dir / "drawings" / "6.png")
    pairs = Pairs(pairs_dir, SIZE)
    with pytest.raises(PowersteerError, match=r"5.png' \(column file_name\) is not a readable picture"):
        pairs[5]
    with pytest.raises(PowersteerError, match=r"\[6\]: .*conditioning_image_file_name\) is 16×32 .* one aspect ratio"):
        pairs[6]


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_encoded_pairs_are_what_the_pipeline_makes(pipe, pairs_dir, tmp_path, cached):
    pairs = Pairs(pairs_dir, SIZE, views=Views(random_flip=True, crops=1))
    encoded = encode_pairs(pipe, pairs, tmp_path / "cache" if cached else None)
    assert encoded.cached == cached
    for view in range(4):
        sample = encoded[4, view]
        image, condition = pairs.view(4, view)
        wanted = pipe.vae.encode(image[None]).latent_dist.mean * pipe.vae.config.scaling_factor
        torch.testing.assert_close(encoded.latents([sample]), wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(sample.condition, condition) and sample.texts == ("a fox",)
        assert torch.equal(conditions_of([sample])[0], condition / 255)
    tokens = pipe.tokenizer(["a fox", ""], padding="max_length", max_length=12, return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens)[0]
    torch.testing.assert_close(encoded.texts(["a fox", ""])["encoder_hidden_states"], states)


def test_views_cut_and_mirror_picture_and_condition_alike(pairs_dir):
    pairs = Pairs(pairs_dir, SIZE, views=Views(random_flip=True, crops=2))
    assert len(pairs.views) == 6
    plain, mirrored = pairs.view(3, 0), pairs.view(3, 1)
    assert all(torch.equal(one.flip(-1), other) for one, other in zip(plain, mirrored, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(plain, pairs[3], strict=True))
    for view in (2, 4):
        image, condition = pairs.view(3, view)
        assert not torch.equal(image, plain[0])
        # The outline is black in the picture, and ink in the drawing: still in the same places.
        dark, ink = (image.mean(0) < -0.6), condition[0] > 160
        assert (dark & ink).sum() / (dark | ink).sum() > 0.7
        assert all(torch.equal(a.flip(-1), b) for a, b in zip((image, condition), pairs.view(3, view + 1), strict=True))
    assert not torch.equal(pairs.view(3, 2)[0], pairs.view(3, 4)[0])


def test_cut_outs_are_no_smaller_than_asked_for():
    views = Views(crops=3, smallest_crop=0.9)
    sides = [views.of(index, view)[0] for index in range(100) for view in range(1, 4)]
    assert 0.9 <= min(sides) < 0.91 and 0.99 < max(sides) <= 1


def test_cache_is_used_and_follows_content_and_weights(pipe, tmp_path):
    folder = draw_pairs(tmp_path / "pairs", 4)
    cache = tmp_path / "cache"
    calls = []
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))

    def latents(folder=folder):
        encoded = encode_pairs(pipe, Pairs(folder, SIZE), cache)
        return torch.stack([encoded[i, 0].image for i in range(4)])

    first = latents()
    assert torch.equal(first, latents()) and len(calls) == 1
    shutil.copytree(folder, tmp_path / "moved")  # the same content at another place
    assert torch.equal(first, latents(tmp_path / "moved")) and len(calls) == 1
    Image.new("RGB", SIZE, "navy").save(folder / "images" / "2.png")
    changed = (latents() - first).abs().amax((1, 2, 3)) > 0
    assert changed.tolist() == [False, False, True, False]
    pipe.vae.encoder.conv_in.weight.data += 0.1
    latents()
    assert len(calls) == 3
    for file in cache.glob("*.safetensors"):  # cut short
        file.write_bytes(file.read_bytes()[:100])
    (cache / "contents.json").write_text("{")
    latents()
    assert len(calls) == 4


def test_cache_tells_its_size_and_refuses_to_fill_the_disk(pipe, pairs_dir, tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    encode_pairs(pipe, Pairs(pairs_dir, SIZE), tmp_path / "cache", console=console)
    told = console.file.getvalue()
    assert "encoding into" in told and "GB free" in told and "12 pictures, 2 captions" in told
    encode_pairs(pipe, Pairs(pairs_dir, SIZE), tmp_path / "cache", console=console)
    assert console.file.getvalue() == told  # nothing to encode, nothing to tell
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: full)
    with pytest.raises(PowersteerError, match="give another cache_dir, or cache_latents=false"):
        encode_pairs(pipe, Pairs(pairs_dir, SIZE), tmp_path / "other")


def test_half_precision_halves_the_cache(pipe, pairs_dir, tmp_path):
    whole = encode_pairs(pipe, Pairs(pairs_dir, SIZE), tmp_path / "whole")
    half = encode_pairs(pipe, Pairs(pairs_dir, SIZE), tmp_path / "half", dtype=torch.float16)
    torch.testing.assert_close(half[3, 0].image, whole[3, 0].image, atol=1e-3, rtol=1e-3)
    assert half[3, 0].image.dtype == torch.float32
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("text*")) for name in ("whole", "half")]
    assert 1.7 < sizes[0] / sizes[1] < 2.1


@pytest.mark.slow
def test_two_processes_share_one_cache(base_dir, tmp_path):
    folder = draw_pairs(tmp_path / "pairs", 40)
    code = (
        "import sys, torch; from pathlib import Path; from powersteer.backbones.load import load_base; "
        "from powersteer.data import encode; from powersteer.data.pairs import Pairs; encode.SHARD = 5; "
        "torch.set_num_threads(1); pipe = load_base(sys.argv[1]); calls = []; "
        "pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1)); "
        "encoded = encode.encode_pairs(pipe, Pairs(Path(sys.argv[2]), (32, 32)), Path(sys.argv[3])); "
        "print(len(calls), float(sum(encoded[i, 0].image.sum() for i in range(40))))"
    )
    command = [sys.executable, "-c", code, base_dir, folder, tmp_path / "cache"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].split() for process in running]
    assert sum(int(calls) for calls, _ in told) == 8  # each file of the cache was made once
    assert told[0][1] == told[1][1]


def test_buckets_have_the_area_and_both_orientations():
    sizes = bucket_sizes((512, 512), 64)
    assert (512, 512) in sizes and (384, 640) in sizes and (640, 384) in sizes
    assert all(h % 64 == w % 64 == 0 and h * w <= 512 * 512 and 0.5 <= w / h <= 2 for h, w in sizes)
    assert nearest(sizes, 1920, 1080) == (384, 640)
    assert nearest(sizes, 1000, 1000) == (512, 512)


def test_sizes_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    file = tmp_path / "turned.jpg"
    assert Contents().size(Picture(str(file), "image", file.read_bytes, file)) == (20, 40)
    with pytest.raises(PowersteerError, match=r"\(column image\) is not a readable picture"):
        Contents().size(Picture("x", "image", lambda: b"none"))


def test_sdxl_is_told_the_size(pipe):
    states = {"encoder_hidden_states": torch.zeros(2, 7, 24), "text_embeds": torch.zeros(2, 16)}
    inputs = UNetBackbone.inputs(states, (32, 48))
    assert inputs["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert UNetBackbone.inputs({"encoder_hidden_states": states["encoder_hidden_states"]}, (32, 48)).keys() == {
        "encoder_hidden_states"
    }
