"""Conditions of every kind, from file to network: colour and structure, label maps, features; and dataset.json."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from condition_files import features, styled, write_conditions
from conftest import draw_pairs, randomise
from powersteer import BPSModel, PowersteerError, load_adapter, steer
from powersteer.backbones.load import load_base
from powersteer.conditions import condition_picture, to_condition
from powersteer.conditions.arrays import resized
from powersteer.conditions.files import check_condition, read_condition
from powersteer.data.check import check_pairs
from powersteer.data.conditioning import conditioning_of
from powersteer.data.encode import conditions_of, encode_pairs
from powersteer.data.layouts import Columns, read_rows
from powersteer.data.pairs import Pairs, Transform, Views
from powersteer.data.stream import read_shard
from powersteer.denoising.sampling.generate import generate
from powersteer.denoising.settings import GenerateSettings, PictureJob
from powersteer.training.dry_run import dry_run
from powersteer.training.run import train
from powersteer.training.setup import Setup, conditioning, new_network

LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST


@pytest.fixture
def styled_dir(tmp_path):
    return write_conditions(draw_pairs(tmp_path / "styled", 6), lambda i: styled(), ".png")


@pytest.fixture
def features_dir(tmp_path):
    folder = write_conditions(
        draw_pairs(tmp_path / "features", 8), lambda i: features(i, [np.float32, np.float16][i % 2]), ".npy"
    )
    say(folder, kind="feature", channels=5, range=None, extractor="npy")
    return folder


def say(folder, **conditioning):
    (folder / "dataset.json").write_text(json.dumps({"name": "mine", "conditioning": conditioning}))


def feature_pairs(folder, **given):
    return Pairs(folder, (32, 32), 5, kind="feature", vae_scale_factor=4, **given)


def test_colour_survives_where_there_is_no_structure():
    picture = styled((64, 64))
    box = (3.5, 0, 61.5, 58)
    small = resized(picture, (16, 16), LANCZOS, box)
    assert np.array_equal(np.asarray(small)[..., :3], picture.convert("RGB").resize((16, 16), LANCZOS, box))
    assert np.array_equal(np.asarray(small)[..., 3], picture.getchannel("A").resize((16, 16), LANCZOS, box))
    assert small.getpixel((8, 14)) == (10, 60, 220, 0)


def test_style_reaches_the_network_in_four_channels(styled_dir, tmp_path):
    _, condition = Pairs(styled_dir, (16, 16), 4, kind="style", views=Views(random_flip=True)).view(2, 1)
    assert condition.shape == (4, 16, 16) and condition.dtype == torch.uint8
    assert condition[:, 14, 8].tolist() == [10, 60, 220, 0] and condition[3].max() > 200
    whole = to_condition(styled(), 4)
    assert whole.shape == (1, 4, 32, 32) and whole[0, :, 30, 5].mul(255).tolist() == pytest.approx([10, 60, 220, 0])
    Image.new("RGB", (40, 40)).save(tmp_path / "plain.png")
    for read in (
        lambda: to_condition(Image.new("RGB", (8, 8)), 4),
        lambda: read_condition(tmp_path / "plain.png", 4, "style", (16, 16)),
        lambda: Pairs(draw_pairs(tmp_path / "grey", 1), (32, 32), 4)[0],
    ):
        with pytest.raises(PowersteerError, match="has no alpha channel: a condition of 4 channels is colour in RGB"):
            read()


def test_label_maps_keep_their_colours_and_have_none_where_transparent(tmp_path):
    colours = np.random.default_rng(0).choice([(128, 0, 0), (0, 128, 0)], 50 * 60).reshape(50, 60, 3).astype(np.uint8)
    labels = Image.fromarray(colours)
    labels.putalpha(Image.new("L", labels.size, 255))
    labels.paste((128, 0, 0, 0), (0, 0, 60, 10))
    labels.save(tmp_path / "labels.png")
    condition, inverted = read_condition(tmp_path / "labels.png", 3, "segmentation", (32, 32))
    found = set(map(tuple, condition.mul(255).round().flatten(1).T.tolist()))
    assert found == {(128, 0, 0), (0, 128, 0), (0, 0, 0)} and not inverted
    assert not condition[:, :6].any()
    folder = write_conditions(draw_pairs(tmp_path / "pairs", 1), lambda i: labels.resize((64, 64), NEAREST), ".png")
    assert not Pairs(folder, (32, 32), 3, kind="layout")[0][1][:, :6].any()


def test_only_sketches_are_inverted_and_others_are_cropped_as_in_training(tmp_path):
    picture = Image.new("L", (64, 32), 240)
    ImageDraw.Draw(picture).rectangle((0, 0, 15, 31), fill=0)
    picture.save(tmp_path / "wide.png")
    depth, inverted = read_condition(tmp_path / "wide.png", 1, "depth", (32, 32))
    assert not inverted and torch.allclose(depth, torch.tensor(240 / 255))  # the middle of it
    for kind in ("sketch", None):
        sketch, inverted = read_condition(tmp_path / "wide.png", 1, kind, (32, 32))
        assert inverted and sketch[0, 16, 2] == 1 and not sketch[0, 2].any()


def test_features_are_read_as_they_are_and_mirrored_with_their_picture(features_dir):
    pairs = feature_pairs(features_dir, views=Views(random_flip=True))
    for i in (0, 1):
        image, condition = pairs.view(i, 0)
        assert condition.dtype == (torch.float32, torch.float16)[i]
        assert np.array_equal(condition.numpy(), features(i, condition.numpy().dtype))
        mirrored_image, mirrored = pairs.view(i, 1)
        assert torch.equal(mirrored, condition.flip(-1)) and torch.equal(mirrored_image, image.flip(-1))


@torch.no_grad()
def test_cached_features_are_the_files_own(pipe, features_dir, tmp_path):
    pairs = feature_pairs(features_dir)
    for cache in (tmp_path / "cache", tmp_path / "cache", None):
        encoded = encode_pairs(pipe, pairs, cache)
        samples = [encoded[i, 0] for i in range(8)]
        assert samples[1].condition.dtype == torch.float16 and samples[2].condition.dtype == torch.float32
        expected = np.stack([features(i, [np.float32, np.float16][i % 2]).astype(np.float32) for i in range(8)])
        assert np.array_equal(conditions_of(samples).numpy(), expected)


def test_features_in_other_layouts(features_dir, tmp_path):
    for folder in ("images", "conditioning_images"):
        (tmp_path / "plain" / folder).mkdir(parents=True)
    (tmp_path / "plain" / "images" / "a.png").write_bytes((features_dir / "images" / "0.png").read_bytes())
    (tmp_path / "plain" / "conditioning_images" / "a.npy").write_bytes((features_dir / "drawings/0.npy").read_bytes())
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for kind, file in (("image.png", "images/0.png"), ("conditioning_image.npy", "drawings/0.npy")):
            content = (features_dir / file).read_bytes()
            info = tarfile.TarInfo(f"a.{kind}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = [*read_rows(tmp_path / "plain"), *read_shard(f"file://{tmp_path}/0.tar", Columns())]
    transform = Transform(5, "feature", 4)
    assert len(rows) == 2 and all(np.array_equal(transform(row, (32, 32))[1], features(0)) for row in rows)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.zeros((5, 8, 4), np.float32), r"has shape \(5, 8, 4\), not \(5, 8, 8\): .* latents of a 32×32 picture"),
        (np.zeros((8, 8), np.float32), r"must hold a feature map \(C, h, w\), not an array of shape \(8, 8\)"),
        (np.full((5, 8, 8), np.nan, np.float32), "holds values that are not finite"),
        (np.full((5, 8, 8), "x"), "is not a readable .npy of numbers"),
        (np.array([{}], dtype=object), "is not a readable .npy of numbers"),
    ],
)
def test_bad_features_are_named(features_dir, made, message):
    np.save(features_dir / "drawings" / "3.npy", made)
    with pytest.raises(PowersteerError, match=rf"3.npy' \(column conditioning_image_file_name\) {message}"):
        feature_pairs(features_dir)[3]
    report = check_pairs(features_dir)
    assert len(report.errors) == 1 and report.errors[0].startswith("features[3]: ")


def test_features_and_pictures_are_not_mistaken_for_each_other(features_dir, pairs_dir):
    with pytest.raises(PowersteerError, match="is a feature map: give conditioning_kind=feature"):
        Pairs(features_dir, (32, 32))[0]
    with pytest.raises(PowersteerError, match=r"is no \.npy: conditioning_kind=feature reads feature maps"):
        feature_pairs(pairs_dir)[0]
    Image.new("RGB", (64, 32)).save(features_dir / "images" / "0.png")
    with pytest.raises(PowersteerError, match=r"is 64×32 pixels and would be cropped .* feature map cannot be"):
        feature_pairs(features_dir)[0]


def test_conditions_are_what_dataset_json_says(pairs_dir, tmp_path):
    found = conditioning_of(str(pairs_dir))
    assert (found.kind, found.channels, found.stated) == ("sketch", 1, False)
    assert found.record["polarity"] == "ink 1 on 0" and found.record["range"] == [0, 1]
    given = conditioning_of(str(pairs_dir), 3, "layout")
    assert (given.kind, given.channels, given.stated) == ("layout", 3, True)
    (pairs_dir.parent / "dataset.json").write_text('{"made by": "another program"}')
    assert not conditioning_of(str(pairs_dir)).stated
    say(pairs_dir.parent, kind="segmentation", channels=3, extractor="labels", palette={"sky": [6, 230, 230]})
    for source in (pairs_dir, pairs_dir / "{000..003}.tar", f"file://{pairs_dir}"):
        above = conditioning_of(str(source))
        assert (above.kind, above.channels, above.stated) == ("segmentation", 3, True)
        assert above.record["palette"] == {"sky": [6, 230, 230]} and above.record["extractor"] == "labels"
    say(pairs_dir, kind="depth", channels=1)
    assert conditioning_of(str(pairs_dir), 1).kind == "depth"  # beside comes before above


@pytest.mark.parametrize(
    ("said", "given", "message"),
    [
        ('{"conditioning": {"kind": "depth"}}', (None, "sketch"), "conditioning_kind is sketch, but .*json says depth"),
        (
            '{"conditioning": {"channels": 3}}',
            (1, None),
            "conditioning_channels is 1, but .* says 3: leave the key out",
        ),
        ('{"conditioning": {"channels": "3 or so"}}', (), "dataset.json: 'conditioning.channels': Input should be"),
        ('{"conditioning": []}', (), "dataset.json: 'conditioning': Input should be"),
        ('{"conditioning": {"range": [1]}}', (), "dataset.json: 'conditioning.range.1': Field required"),
        ("{", (), "dataset.json is not JSON: .*: mend it"),
        ("{}", (2, None), r"conditioning_channels must be 1 \(grey\), 3 \(RGB\) or 4 .*, not 2; only feature maps"),
        ("{}", (None, "feature"), "feature maps need conditioning_channels: give their channel count"),
    ],
)
def test_contradictions_are_one_clear_error(pairs_dir, said, given, message):
    (pairs_dir / "dataset.json").write_text(said)
    with pytest.raises(PowersteerError, match=message):
        conditioning_of(str(pairs_dir), *given)


def test_data_check_follows_dataset_json(styled_dir, features_dir):
    say(styled_dir, kind="style", channels=4)
    style, feature = check_pairs(styled_dir), check_pairs(features_dir)
    assert style.errors == feature.errors == []
    assert (style.facts["condition"]["kind"], style.facts["condition"]["channels"]) == ("style", 4)
    assert feature.facts["condition"]["low"] < -3 and feature.facts["condition"]["channels"] == 5
    say(features_dir, kind="feature", channels=5, range=[0, 1])
    assert len(check_pairs(features_dir).errors) == 8
    say(features_dir, kind="feature", channels=6)
    assert "has 5 channels, not 6" in check_pairs(features_dir).errors[0]


def adjusted(config, folder, **changes):
    held_out = shutil.copytree(folder, folder.with_name("held-out"))
    changes = {"validation_data_dir": held_out, "max_train_steps": 2, "num_validation_images": 1} | changes
    return config.model_copy(update={"train_data_dir": str(folder), **changes})


def generated(base_dir, adapter, condition, out):
    settings = GenerateSettings(base=str(base_dir), adapter=(str(adapter),), num_inference_steps=2)
    *pictures, grid = generate(settings, [PictureJob(prompt="a fox", condition=(condition,))], out)
    assert Image.open(grid).size == (2 * 128 + 2, 128)
    return np.asarray(Image.open(pictures[0]), dtype=int)


def test_training_and_generating_with_features(config, base_dir, features_dir, tmp_path):
    config = adjusted(config, features_dir, random_flip=True)
    facts = dry_run(config).facts
    assert facts["conditions"] == [5, 8, 8] and facts["condition_kind"] == "feature"
    result = train(config)
    adapter = load_adapter(str(result.adapter_dir))
    assert adapter.config["pixel_unshuffle"] == 1 and adapter.config["conditioning_channels"] == 5
    record = adapter.config["conditioning"]
    assert record["kind"] == "feature" and record["range"] is None and record["extractor"] == "npy"
    assert Image.open(result.adapter_dir / "validation" / "step-000002.png").width == 3 * 128 + 2 * 2
    randomise(adapter).save_pretrained(tmp_path / "random")
    one, other = (
        generated(base_dir, tmp_path / "random", features_dir / "drawings" / f"{i}.npy", tmp_path / f"out{i}")
        for i in (0, 1)
    )
    assert np.abs(one - other).max() > 2
    with pytest.raises(PowersteerError, match=r"the adapter reads feature maps of 5 channels: give a \.npy"):
        generated(base_dir, tmp_path / "random", features_dir / "images" / "0.png", tmp_path / "no")
    with pytest.raises(PowersteerError, match="random_crops cannot cut feature maps out"):
        train(config.model_copy(update={"random_crops": 2}))


def test_training_and_generating_with_colour_and_structure(config, base_dir, styled_dir, tmp_path):
    record = {"kind": "style", "channels": 4, "extractor": "palette", "settings": {"cells": 8}}
    say(styled_dir, **record)
    adapter_dir = train(adjusted(config, styled_dir)).adapter_dir
    adapter = load_adapter(str(adapter_dir))
    assert adapter.config["conditioning"].items() >= record.items()
    assert adapter.config["conditioning_channels"] == 4
    randomise(adapter).save_pretrained(tmp_path / "random")
    other = styled()
    other.paste((0, 255, 0, 0), (0, 16, 32, 32))  # another colour where there is no structure
    other.save(tmp_path / "other.png")
    one = generated(base_dir, tmp_path / "random", styled_dir / "drawings" / "0.png", tmp_path / "one")
    assert np.abs(one - generated(base_dir, tmp_path / "random", tmp_path / "other.png", tmp_path / "two")).max() > 2


def test_starting_from_another_adapter(config, base_dir, styled_dir, tmp_path):
    unet = load_base(str(base_dir)).unet
    BPSModel.from_unet(unet, pixel_unshuffle=4, weights="uniform", conditioning={"kind": "sketch"}).save_pretrained(
        tmp_path / "grey"
    )
    config = config.model_copy(update={"init_from": str(tmp_path / "grey")})
    pipe = load_base(str(base_dir))
    assert new_network(Setup.of(config, pipe), pipe).config["conditioning"] == {"kind": "sketch"}
    wanted = Setup.of(config.model_copy(update={"conditioning_kind": "depth"}), pipe)
    depth = new_network(wanted, pipe).config["conditioning"]
    assert depth["kind"] == "depth" and depth["polarity"] == "near 1, far 0"
    say(styled_dir, kind="style", channels=4)
    with pytest.raises(PowersteerError, match="reads 1 channels, the conditions have 4"):
        new_network(Setup.of(config.model_copy(update={"train_data_dir": str(styled_dir)}), pipe), pipe)


def test_held_out_pairs_must_be_of_the_same_kind(config):
    say(config.validation_data_dir, kind="depth")
    with pytest.raises(PowersteerError, match=r"conditioning_kind is sketch, but .*validation/dataset.json says depth"):
        conditioning(config)


def test_features_may_have_any_range_unless_their_record_tells_one(pipe):
    wide = torch.full((1, 5, 8, 8), 7.0)
    with pytest.raises(PowersteerError, match=r"must be finite, not \[inf, inf\]"):
        to_condition(wide / 0, 5, None)
    for bounds, fault in ((None, None), ([0, 10], None), ([-1, 1], r"must lie in \[-1, 1\], not \[7, 7\]")):
        model = BPSModel.from_unet(
            pipe.unet, conditioning_channels=5, pixel_unshuffle=1, conditioning={"kind": "feature", "range": bounds}
        )
        if fault is None:
            with steer(pipe.unet, model, wide):
                pass
        else:
            with pytest.raises(PowersteerError, match=fault), steer(pipe.unet, model, wide):
                pass


def test_files_that_are_neither_picture_nor_features(tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "small.npy", features(0)[:, :4])
    for file, message in (
        ("text.npy", "is not a readable .npy of numbers"),
        ("none.npy", "does not exist"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(PowersteerError, match=message):
            check_condition(tmp_path / file)
    check_condition(tmp_path / "small.npy")
    with pytest.raises(PowersteerError, match=r"small.npy has shape \(5, 4, 8\), not \(5, 8, 8\)"):
        read_condition(tmp_path / "small.npy", 5, "feature", (8, 8))


def test_every_condition_can_be_looked_at():
    grey, colour, style, many = (
        torch.full((1, 4, 4), 0.5),
        torch.rand(3, 4, 4),
        torch.rand(4, 4, 4),
        torch.rand(24, 2, 2),
    )
    assert condition_picture(grey, (4, 4)).unique().tolist() == [0]
    assert torch.allclose(condition_picture(colour, (4, 4)), colour * 2 - 1)
    assert torch.allclose(condition_picture(style, (4, 4)), style[:3] * (1 - style[3]) * 2 - 1)
    shown = condition_picture(many, (4, 4))
    assert shown.shape == (3, 4, 4) and shown.min() == -1 and shown.max() == 1
    assert condition_picture(torch.zeros(24, 2, 2), (4, 4)).unique().tolist() == [-1]
