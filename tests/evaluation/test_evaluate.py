"""`powersteer evaluate`, from files to a table and one JSON."""

import json
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from condition_files import features, write_conditions
from conftest import draw_pairs, randomise, uniform_log_snr
from powersteer import PowersteerError
from powersteer.adapters.attach import attach
from powersteer.adapters.baselines import BASELINES
from powersteer.adapters.registry import make_adapter
from powersteer.backbones.load import load_base
from powersteer.conditions.extractor import EXTRACTORS
from powersteer.core.pictures import as_bytes, to_pil
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs, spread
from powersteer.data.splits import held_out_folder
from powersteer.denoising.objective import objective_of
from powersteer.denoising.sampling.sample import steered_pictures
from powersteer.evaluation import evaluate as evaluation
from powersteer.evaluation.evaluate import EvaluateSettings, evaluate
from powersteer.evaluation.figures import Evaluation, Figure, Value
from powersteer.evaluation.information import denoiser_errors, measure_information
from powersteer.evaluation.measures import (
    MeasureSettings,
    distances,
    fidelity,
    load_condition_extractor,
    paired,
)

FAST = {"pictures": 4, "diversity": 1, "diversity_seeds": 2, "num_inference_steps": 2, "draws": 2}
PALETTE = {"red": [255, 0, 0], "blue": [0, 0, 255]}


@pytest.fixture
def data(tmp_path):
    draw_pairs(tmp_path / "data" / "train", 4)
    draw_pairs(tmp_path / "data" / "test", 6, seed=1)
    (tmp_path / "data" / "dataset.json").write_text('{"conditioning": {"kind": "sketch", "channels": 1}}')
    return tmp_path / "data"


@pytest.fixture
def run(run):
    return partial(run, "evaluate")


def test_the_command_writes_every_figure_with_its_protocol(run, data, base_dir, adapter_dir, clip_dir, tmp_path):
    args = [data, "--adapter", adapter_dir, "--base", base_dir, "--clip", clip_dir, "--pictures", 4, "--steps", 2]
    code, out, err = run(
        *args, "--draws", 2, "--diversity", 1, "--json", tmp_path / "out.json", "--save-pictures", tmp_path / "made"
    )
    assert code == 0, err
    written = json.loads((tmp_path / "out.json").read_text())
    figures = written["figures"]
    information = figures["information, nats a latent dimension"]
    assert information["values"]["steered"]["error"] > 0 and information["protocol"]["pairs"] == 6
    assert set(figures["denoising loss"]["values"]) == {"prior", "steered", "shuffled"}
    assert set(figures["edge F1"]["values"]) == {"prior", "steered", "shuffled", "real"}
    assert figures["edge F1"]["values"]["real"]["value"] > 0.9
    assert figures["edge F1"]["protocol"]["sampling"] == {
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "first_seed": 0,
        "size": [32, 32],
        "pictures": 4,
    }
    assert figures["FD, clip"]["protocol"]["pictures"] == {"real": 6, "prior": 4, "steered": 4}
    assert len(figures["FD, clip"]["protocol"]["weights_sha256"]) == 64
    assert figures["KD, clip"]["protocol"]["subset_size"] == 2
    assert {"edge SSIM", "PSNR, dB", "SSIM", "CLIP score", "spread over seeds"} < set(figures)
    assert written["provenance"]["data"]["pairs"] == 6 and len(written["provenance"]["adapter"]["sha256"]) == 64
    assert "torch" in written["provenance"]["versions"] and "threads" in written["provenance"]["hardware"]
    assert "2,048" in written["warnings"][0] and "warning: 4 pictures" in out
    assert "steered" in out and "real" in out
    made = sorted(str(file.relative_to(tmp_path / "made")) for file in (tmp_path / "made").rglob("*.png"))
    assert len(made) == 4 * 4 + 2 and {"grid.png", "diversity.png", "steered/00003.png"} < set(made)


def test_the_same_seed_gives_the_same_figures_and_the_prior_has_its_own(data, base_dir):
    settings = EvaluateSettings(data=data, adapter=None, base=str(base_dir), **FAST)
    found = evaluate(settings).as_json()
    assert found["figures"] == evaluate(settings).as_json()["figures"]
    assert set(found["figures"]["denoising loss"]["values"]) == {"prior"}
    assert set(found["figures"]["edge F1"]["values"]) == {"prior", "real"}
    assert "information, nats a latent dimension" not in found["figures"] and found["provenance"]["adapter"] is None


def test_no_pictures_leave_the_denoising_figures(data, base_dir, adapter_dir):
    settings = EvaluateSettings(data=data, adapter=str(adapter_dir), base=str(base_dir), pictures=0, pairs=3, draws=1)
    assert len(evaluate(settings).figures) == 2


def save_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        to_pil(image).save(folder / f"{i}.png")
    return folder


def test_pairs_stand_for_their_pictures_cropped_as_in_training(run, tmp_path):
    pairs = draw_pairs(tmp_path / "pairs", 5)
    for file in pairs.rglob("*.png"):
        with Image.open(file) as picture:
            wide = Image.new(picture.mode, (64, 32), "red" if picture.mode == "RGB" else 0)
            wide.paste(picture, (16, 0))
        wide.save(file)
    made = tmp_path / "made"
    made.mkdir()
    for i in range(5):
        with Image.open(pairs / "images" / f"{i}.png") as picture:
            picture.crop((16, 0, 48, 32)).save(made / f"{i:05d}-seed{i}.png")
    Image.new("RGB", (200, 200), "blue").save(made / "grid.png")  # what `generate` puts beside them
    code, _, err = run("--real", pairs, "--generated", made, "--json", tmp_path / "out.json")
    assert code == 0, err
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["figures"]["FD, clip"]["values"]["generated"]["value"] == pytest.approx(0, abs=1e-6)
    assert [written["provenance"][kind]["pictures"] for kind in ("real", "generated")] == [5, 5]


def test_two_folders(run, tmp_path):
    images = torch.rand(5, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real = save_folder(tmp_path / "real", images)
    twin = save_folder(tmp_path / "twin", images)
    other = save_folder(tmp_path / "other", -images[:4])
    (real / "notes.txt").write_text("no picture")
    code, _, err = run("--real", real, "--generated", twin, "--json", tmp_path / "twin.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "twin.json").read_text())["figures"]
    assert figures["FD, clip"]["values"]["generated"]["value"] == pytest.approx(0, abs=1e-3)
    assert figures["SSIM"]["values"]["generated"]["value"] == pytest.approx(1)
    assert figures["PSNR, dB"]["values"]["generated"]["value"] is None  # infinite
    code, _, _ = run("--real", real, "--generated", other, "--json", tmp_path / "other.json")
    figures = json.loads((tmp_path / "other.json").read_text())["figures"]
    assert code == 0 and figures["FD, clip"]["values"]["generated"]["value"] > 1 and "SSIM" not in figures


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give DATA, the folder of pairs; or --real and --generated"),
        (["data", "--real", "real", "--generated", "data"], "give DATA, the folder of pairs; or --real"),
        (["--real", "nowhere", "--generated", "data/test/images"], "nowhere is no folder"),
        (["--real", "empty", "--generated", "data/test/images"], "empty has no pictures"),
        (["data", "--features", "vgg"], "'features.0'"),
        (["data", "--scheduler", "magic"], "'scheduler'"),
        (["data", "--adapter", "none", "--pairs", 3], "need 4 at least: give --pictures 0"),
        (["data", "--adapter", "none", "--features", "clip"], "--clip"),
        (["data", "--adapter", "none", "--clip", "empty"], "cannot load a CLIP from 'empty'"),
    ],
)
def test_bad_input_is_one_line(run, monkeypatch, tmp_path, data, base_dir, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = run(*args, *(["--base", base_dir] if "data" in args[:1] else []))
    assert code == 2 and words in err and err.count("\n") == 1, err


def test_the_held_out_split_is_taken(data):
    assert held_out_folder(data) == data / "test" and held_out_folder(data / "test") == data / "test"


def test_a_split_is_known_by_any_of_its_names(tmp_path):
    (tmp_path / "Val2017").mkdir()
    assert held_out_folder(tmp_path) == tmp_path / "Val2017" and held_out_folder(tmp_path / "no") == tmp_path / "no"
    (tmp_path / "testing").mkdir()
    assert held_out_folder(tmp_path) == tmp_path / "testing"


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_are_evaluated_as_bps_is(run, data, base_dir, tmp_path, kind):
    pipe = load_base(str(base_dir))
    record = {"kind": "sketch", "channels": 1}
    torch.manual_seed(0)  # else its initialisation depends on the tests before
    network = make_adapter(pipe.unet, preset=kind, pixel_unshuffle=4, prediction_type="epsilon", conditioning=record)
    randomise(randomise(network), seed=1).save_pretrained(tmp_path / kind)  # twice: strong enough to be seen
    args = [data, "--adapter", tmp_path / kind, "--base", base_dir, "--pictures", 4, "--steps", 2, "--draws", 2]
    args += ["--diversity", 1, "--json", tmp_path / "out.json", "--save-pictures", tmp_path / "made"]
    pairs = encode_pairs(pipe, Pairs(data / "test", (32, 32)))
    with uniform_log_snr():
        code, _, err = run(*args)
        errors = denoiser_errors(pipe, network, pairs)
        wanted = measure_information(errors, objective_of(pipe.scheduler), 6, draws=2)
    assert code == 0, err
    written = json.loads((tmp_path / "out.json").read_text())
    found = written["figures"]["information, nats a latent dimension"]["values"]
    # Gains of both signs cancel in the mean: rounding is small beside its error, not beside it.
    assert found["steered"]["value"] == pytest.approx(wanted.steered.mean, rel=1e-3, abs=1e-3 * wanted.steered.error)
    assert found["shuffled"]["value"] == pytest.approx(wanted.shuffled.mean, rel=1e-3, abs=1e-3 * wanted.shuffled.error)
    # Pictures are those of the network under its own condition.
    condition = pairs[1, 0].condition[None].float() / 255
    with attach(pipe.unet, network, condition):
        (picture,) = steered_pictures(pipe, None, ["a fox"], None, seeds=[1], num_inference_steps=2)
    chosen = Image.open(tmp_path / "made" / "steered" / "00001.png")
    assert spread(6, 4)[1] == 1 and np.abs(np.array(chosen).astype(int) - np.array(picture)).max() <= 1
    prior = Image.open(tmp_path / "made" / "prior" / "00001.png")
    assert np.abs(np.array(prior).astype(int) - np.array(picture)).max() > 5
    assert written["provenance"]["adapter"]["network"] == type(network).__name__
    assert set(written["figures"]["spread over seeds"]["values"]) == {"prior", "steered"}


def flat(colour):
    return (torch.tensor(colour) / 127.5 - 1).view(1, 3, 1, 1).expand(1, 3, 16, 16).clone()


def test_label_maps_layouts_and_styles_have_their_measures():
    picture = flat([250, 10, 0])
    picture[..., 8:] = flat([0, 20, 240])[..., 8:]
    condition = (flat([255, 0, 0]) + 1) / 2
    condition[..., 8:] = (flat([0, 0, 255])[..., 8:] + 1) / 2
    pictures = {"steered": as_bytes(picture), "shuffled": as_bytes(flat([255, 0, 0]))}
    (miou,) = fidelity("segmentation", PALETTE, pictures, condition, 4)
    assert [value.value for value in miou.values.values()] == pytest.approx([1, (0.5 + 0) / 2])
    (boxes,) = fidelity("layout", PALETTE, pictures, condition, 4)
    assert [value.value for value in boxes.values.values()] == pytest.approx([1, (0.5 + 0) / 2])
    (style,) = fidelity("style", {}, pictures, torch.cat([condition, condition[:, :1]], 1), 4)
    assert style.values["steered"].value < 10 < style.values["shuffled"].value
    assert fidelity("pose", {}, pictures, condition, 4) == [] == fidelity("segmentation", {}, pictures, condition, 4)


class Seen:
    """Sees every picture as one that is given: RGB, or ink where it is dark."""

    def __init__(self, palette=None):
        self.palette = palette

    def __call__(self, subject):
        return subject.picture if self.palette else subject.picture.convert("L").point(lambda value: 255 - value)

    def record(self):
        return {"extractor": "seen", "palette": self.palette}


def test_an_extractor_looks_for_edges():
    picture = flat([255, 255, 255])
    picture[:, :, 5] = -1
    drawing = (1 - picture[:, :1]) / 2
    figures = fidelity(
        "sketch", {}, {"steered": as_bytes(picture), "shuffled": as_bytes(picture.roll(4, 2))}, drawing, 4, Seen()
    )
    assert [figure.values["steered"].value for figure in figures] == pytest.approx([1, 1, 1, 1])
    assert [figure.values["shuffled"].value for figure in figures[:3]] == [0, 0, 0]
    assert figures[0].protocol["extractor"]["extractor"] == "seen"


def test_an_extractor_looks_for_labels_which_go_together_by_name():
    own = {"green": [0, 255, 0], "blue": [0, 0, 200], "red": [200, 0, 0]}
    picture = flat([200, 0, 0])
    picture[..., 8:] = flat([0, 255, 0])[..., 8:]  # red and green, where red and blue were wanted
    condition = (flat([255, 0, 0]) + 1) / 2
    condition[..., 8:] = (flat([0, 0, 255])[..., 8:] + 1) / 2
    (figure,) = fidelity("segmentation", PALETTE, {"steered": as_bytes(picture)}, condition, 4, Seen(own))
    assert figure.values["steered"].value == pytest.approx((1 + 0) / 2)
    with pytest.raises(PowersteerError, match="none of the palette's names"):
        fidelity("layout", PALETTE, {"steered": as_bytes(picture)}, condition, 4, Seen({"sky": [1, 2, 3]}))


def test_extractors_of_conditions_are_found_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "powersteer.conditions.extractors.catalogue", types.ModuleType("catalogue"))
    monkeypatch.setattr(EXTRACTORS, "known", {})
    EXTRACTORS.add("segmentation", "seen")(lambda model="none": Seen({model: [1, 2, 3]}))
    assert load_condition_extractor(MeasureSettings(), "sketch") is None
    found = load_condition_extractor(MeasureSettings(extractor="seen", extractor_model="big"), "layout")
    assert found.record()["palette"] == {"big": [1, 2, 3]}
    with pytest.raises(PowersteerError, match="there is no extractor 'unseen' for segmentation"):
        load_condition_extractor(MeasureSettings(extractor="unseen"), "segmentation")


def test_lpips_is_measured_when_asked_for(monkeypatch):
    monkeypatch.setattr("powersteer.evaluation.measures.lpips", lambda one, other: (one - other).abs().mean((1, 2, 3)))
    pictures = {"steered": as_bytes(flat([255, 255, 255])), "real": as_bytes(flat([0, 0, 0]))}
    found = paired(pictures, MeasureSettings(lpips=True))
    assert [figure.name for figure in found] == ["PSNR, dB", "SSIM", "LPIPS"]
    assert found[2].values["steered"].value == pytest.approx(1) and found[0].values["steered"].value == 0


def test_distances_by_inception_have_the_names_they_are_known_by():
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    figures, warning = distances("inception", {}, features, {"steered": features})
    assert [figure.name for figure in figures] == ["FID", "KID"] and warning is not None
    assert figures[0].values["steered"].value == pytest.approx(0, abs=1e-9)


def test_values_and_headings():
    value = Value.mean(torch.tensor([1.0, 3.0, float("nan")]))
    assert (value.value, value.error) == (2, 1) and str(value) == "2 ± 1"
    assert str(Value.mean(torch.tensor([2.0]))) == "2"
    assert Figure("SSIM", "higher", {}).heading == "SSIM ↑" and Figure("spread", "", {}).heading == "spread"
    evaluation = Evaluation([Figure("x", "", {"real": value, "prior": Value(float("inf"))})], {}, {}, [])
    assert evaluation.columns == ["prior", "real"]
    assert evaluation.as_json()["figures"]["x"]["values"]["prior"] == {"value": None, "error": None}


def test_feature_maps_are_steered_by_as_they_are(tmp_path, base_dir, monkeypatch):
    folder = write_conditions(draw_pairs(tmp_path / "pairs", 5), features, ".npy")
    (folder / "dataset.json").write_text('{"conditioning": {"kind": "feature", "channels": 5, "range": null}}')
    pipe = load_base(str(base_dir))
    shape = {"conditioning_channels": 5, "pixel_unshuffle": 1, "weights": "uniform"}
    conditioning = {"kind": "feature", "channels": 5, "range": None}
    randomise(make_adapter(pipe.unet, **shape, conditioning=conditioning)).save_pretrained(tmp_path / "adapter")
    seen = []
    made = evaluation.steered_pictures
    monkeypatch.setattr(evaluation, "steered_pictures", lambda *a, **k: (seen.append(a[3]), made(*a, **k))[1])
    settings = FAST | {"data": folder, "adapter": str(tmp_path / "adapter"), "base": str(base_dir), "pictures": 5}
    evaluate(EvaluateSettings(**settings, save_pictures=tmp_path / "made"))
    given = [condition for condition in seen if condition is not None]
    assert torch.equal(given[0], torch.from_numpy(np.stack([features(i) for i in range(5)])))
    assert torch.equal(given[-1][0], given[0][0])  # of several seeds
    assert given[0].abs().max() > 3 and (tmp_path / "made" / "grid.png").exists()


def test_what_does_not_pair_is_said_and_kid_has_its_spread(run, tmp_path):
    rng = np.random.default_rng(0)
    for folder, names in (("real", "abcdefgh"), ("same", "abcdefgh"), ("other", "abcdefgx"), ("small", "abcdefgh")):
        (tmp_path / folder).mkdir()
        for i, name in enumerate(names):
            side = 16 if folder == "small" and i == 7 else 32
            noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if folder != "same" else None
            picture = Image.open(tmp_path / "real" / f"{name}.png") if noise is None else Image.fromarray(noise)
            picture.save(tmp_path / folder / f"{name}.png")

    def compared(folder):
        code, out, err = run("--real", tmp_path / "real", "--generated", tmp_path / folder, "--json", tmp_path / "it")
        assert code == 0, err
        return out, json.loads((tmp_path / "it").read_text())["figures"]

    out, figures = compared("same")
    kernel, protocol = figures["KD, clip"]["values"]["generated"], figures["KD, clip"]["protocol"]
    assert kernel["error"] == protocol["spread_over_subsets"]["generated"] > 0
    assert f"± {kernel['error']:.2g}" in out and "SSIM" in figures and "picture by picture" not in out
    out, figures = compared("other")
    assert "warning: no figures picture by picture: 8 real and 8 generated pictures, and no one of the" in out
    assert "generated ones is named 'h'" in out and "SSIM" not in figures
    out, figures = compared("small")
    assert "some have another size than their partner" in out and "SSIM" not in figures
