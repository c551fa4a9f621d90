import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw_pairs
from powersteer import PowersteerError
from powersteer.data.encode import encode_pairs
from powersteer.data.openmoji import concept_of, draw_pair, list_drawings, split_by_concept
from powersteer.data.pairs import Pairs

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
        (lambda rows: rows[1].pop("text"), r"\[1\] has no caption: write one, or give default_prompt"),
        (lambda rows: rows[1].pop("file_name"), r"\[1\]: column 'file_name' is missing"),
        (lambda rows: rows.insert(4, "{"), r"\[4\]: not a JSON object"),
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
def test_encoded_pairs_are_what_the_pipeline_makes(pipe, pairs_dir):
    pairs = Pairs(pairs_dir, SIZE)
    encoded = encode_pairs(pipe, pairs)
    wanted = pipe.vae.encode(pairs[4][0][None]).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encoded.latents[4:5], wanted, atol=1e-5, rtol=1e-4)
    tokens = pipe.tokenizer("a fox", padding="max_length", max_length=12, return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens)[0]
    torch.testing.assert_close(encoded.text_states[encoded.text_rows[4]][None], states)
    assert np.allclose(encoded.condition(torch.tensor([4])).numpy()[0, 0], pairs[4][1][0] / 255)


def test_cache_is_used_and_follows_content_and_weights(pipe, tmp_path):
    folder = draw_pairs(tmp_path / "pairs", 4)
    cache = tmp_path / "cache"
    calls = []
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = encode_pairs(pipe, Pairs(folder, SIZE), cache)
    again = encode_pairs(pipe, Pairs(folder, SIZE), cache)
    assert len(calls) == 1 and torch.equal(first.latents, again.latents)
    Image.new("RGB", SIZE, "navy").save(folder / "images" / "2.png")
    assert not torch.equal(encode_pairs(pipe, Pairs(folder, SIZE), cache).latents, first.latents)
    pipe.vae.encoder.conv_in.weight.data += 0.1
    encode_pairs(pipe, Pairs(folder, SIZE), cache)
    assert len(calls) == 3
    for file in cache.iterdir():  # cut short
        file.write_bytes(file.read_bytes()[:100])
    encode_pairs(pipe, Pairs(folder, SIZE), cache)
    assert len(calls) == 4
