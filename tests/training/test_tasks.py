"""Each task by the commands of docs/tasks.md, a few steps of each: from OpenMoji to steered pictures."""

import json
import sys

import pytest
import torch
from PIL import Image

from powersteer.adapters.attach import attach as steer
from powersteer.adapters.load import load_adapter
from powersteer.apps import cli
from powersteer.backbones.load import load_base
from powersteer.data.prepare.sources import openmoji

KINDS = {
    "sketch": (1, []),
    "segmentation": (3, ["weights=head-heavy"]),
    "layout": (3, []),
    "style": (4, ["weights=head-heavy"]),
}
"""Channels, and what is given beside the file, whose weights are uniform."""


@pytest.fixture
def some_drawings(monkeypatch):
    """A dozen of OpenMoji's concepts to train on, four of each other split."""
    listed = openmoji.list_drawings()
    splits = openmoji.split_by_concept([one.concept for one in listed])
    some = []
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        of_split = [one for one in listed if splits[one.concept] == split]
        some += of_split[:: len(of_split) // count][:count]
    monkeypatch.setattr(openmoji, "list_drawings", lambda: some)
    monkeypatch.setattr(openmoji, "split_by_concept", lambda concepts: splits)


def powersteer(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["powersteer", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, args


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_from_pictures_to_steered_ones(task, tmp_path, monkeypatch, some_drawings):
    pairs, run = tmp_path / "pairs", tmp_path / "run"
    powersteer(monkeypatch, "prepare", task, "openmoji", pairs, "--workers", 1)
    powersteer(monkeypatch, "data", "check", pairs / "train", "--validation", pairs / "validation")
    args = [f"train_data_dir={pairs / 'train'}", f"validation_data_dir={pairs / 'validation'}", f"output_dir={run}"]
    channels, given = KINDS[task]
    args += [*given, "train_batch_size=4", "max_train_steps=3", "validation_steps=3", "num_validation_images=2"]
    powersteer(monkeypatch, "train", "configs/many-pairs.yaml", *args)
    powersteer(monkeypatch, "evaluate", pairs, "--adapter", run, "--pictures", 4, "--steps", 2, "--diversity", 0,
               "--draws", 1, "--json", tmp_path / "figures.json", "--save-pictures", tmp_path / "pictures")  # fmt: skip

    model = load_adapter(str(run))
    assert model.config["conditioning_channels"] == channels and model.config["conditioning"]["kind"] == task
    assert model.config["mid_weight"] == (32 if given else 1)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["provenance"]["data"]["pairs"] == 4 and figures["provenance"]["data"]["kind"] == task
    assert Image.open(tmp_path / "pictures" / "grid.png").width == 5 * (128 + 2) - 2

    condition = next((pairs / "test" / "conditions").iterdir())
    args = ["--adapter", run, "--condition", condition, "--prompt", "a fox", "--steps", 2, "--num-images", 1]
    powersteer(monkeypatch, "generate", *args, "--out", tmp_path / "made")
    picture = Image.open(tmp_path / "made" / "00000-seed0.png")
    assert picture.size == (64, 64)

    # The run's own condition, read from its file, changes what the base predicts.
    unet = load_base().unet
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 4, unet.config.cross_attention_dim)
    with torch.no_grad():
        before = unet(latents, 500, text).sample
        with steer(unet, model, torch.rand(1, channels, 64, 64)):
            assert not torch.equal(unet(latents, 500, text).sample, before)
