"""What ships in the package: the base, its CLIP, its sketch adapter, and the demo that uses them."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

from powersteer import load_adapter, load_base, steer
from powersteer.adapters.load import EMBEDDED_ADAPTERS
from powersteer.apps.demo import one_of_each_concept, run_demo
from powersteer.apps.pretrain.clip import caption_ranks
from powersteer.backbones.load import EMBEDDED_BASE, load_clip
from powersteer.conditions import to_condition
from powersteer.conditions.fidelity.lines import line_f1
from powersteer.core.files import embedded
from powersteer.core.pictures import from_pil
from powersteer.data.pairs import Pairs
from powersteer.data.prepare.openmoji import prepare_openmoji
from powersteer.denoising.sampling.sample import steered_pictures


@pytest.fixture(scope="module")
def openmoji_dir(tmp_path_factory):
    return prepare_openmoji(tmp_path_factory.mktemp("openmoji"))


def test_sizes_stay_within_what_a_package_should_carry():
    for name in (EMBEDDED_BASE, *EMBEDDED_ADAPTERS.values()):
        files = [file for file in embedded(name).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 45e6
        assert max(file.stat().st_size for file in files) <= 40e6
        assert (embedded(name) / "README.md").exists()


def test_base_is_a_stable_diffusion_in_small():
    pipe = load_base()
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.vae_scale_factor == 4
    assert pipe.unet.config.sample_size == 16 and pipe.unet.config.in_channels == 4
    assert not any(p.requires_grad for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())


@pytest.mark.slow
def test_openmoji_pairs_on_disk(openmoji_dir):
    counts = {split: len(Pairs(openmoji_dir / split, (64, 64))) for split in ("train", "validation", "test")}
    assert sum(counts.values()) == 3948 and counts["train"] > 3300
    concepts = {
        split: {json.loads(line)["concept"] for line in (openmoji_dir / split / "metadata.jsonl").open()}
        for split in counts
    }
    assert not concepts["train"] & concepts["test"] and not concepts["train"] & concepts["validation"]
    assert "CC BY-SA 4.0" in (openmoji_dir / "LICENSE.txt").read_text()
    marker = openmoji_dir / "train" / "images" / "1F98A.png"
    before = marker.stat().st_mtime_ns
    prepare_openmoji(openmoji_dir)  # the second time there is nothing to do
    assert marker.stat().st_mtime_ns == before


@pytest.mark.slow
def test_pictures_keep_their_promise(openmoji_dir):
    """The shipped adapter follows held-out drawings; the small CLIP tells what the pictures show."""
    pipe, model = load_base(), load_adapter("sketch")
    test = Pairs(openmoji_dir / "test", (64, 64))
    chosen = one_of_each_concept(test, 12)
    drawings = torch.stack([test[i][1] for i in chosen]).float() / 255
    prompts, seeds = [test.texts[i] for i in chosen], range(12)
    steered = steered_pictures(pipe, model, prompts, drawings, seeds=seeds, num_inference_steps=20)
    prior = steered_pictures(pipe, None, prompts, None, seeds=seeds, num_inference_steps=20)
    with_lines, without = (line_f1(drawings, torch.stack([from_pil(p) for p in made])) for made in (steered, prior))
    assert with_lines.mean() > without.mean() + 0.3

    clip, tokenizer = load_clip(embedded(EMBEDDED_BASE))
    artist = torch.stack([test[i][0] for i in chosen])
    ranks = caption_ranks(clip, tokenizer, artist, prompts, torch.arange(12))
    assert (ranks < 3).float().mean() > 0.5  # chance: a quarter


def test_readme_example_follows_the_drawing(tmp_path):
    drawing = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(drawing).ellipse((12, 12, 52, 52), outline=255, width=2)
    pipe, model = load_base(), load_adapter("sketch")
    with steer(pipe, model, drawing):
        picture = pipe("a red ball", num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]
    condition = to_condition(drawing, 1)
    assert line_f1(condition, from_pil(picture)[None]).item() > 0.5


@pytest.mark.slow
def test_demo_from_nothing_to_report_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("powersteer.apps.demo.MEASURED_PAIRS", 40)
    result = run_demo(tmp_path, pairs=12, steps=3, pictures=4)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == result.metrics and metrics["pairs"] == 12 and metrics["steps"] == 3
    assert 0 < metrics["denoising_loss"]["prior"] < 1 and metrics["line_f1"]["artist"] > 0.9
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 16 and "http" not in report.replace("http-equiv", "")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 * 130 - 2, 18 + 2 * 130 - 2)
    again = run_demo(tmp_path, pairs=12, steps=3, pictures=4)  # trained already: measures the same
    assert again.metrics["denoising_loss"] == metrics["denoising_loss"]
