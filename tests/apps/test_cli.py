"""What a person types and reads: one clear line for whatever they can mend, exit status 2, nothing changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from conftest import draw_pairs, randomise
from powersteer.adapters.attach import attach
from powersteer.adapters.baselines import BASELINES
from powersteer.adapters.load import load_adapter, load_network
from powersteer.adapters.registry import make_adapter
from powersteer.backbones.load import load_base
from powersteer.conditions.files import read_condition
from powersteer.core.config import load_config
from powersteer.core.errors import PowersteerWarning
from powersteer.data.pairs import Pairs
from powersteer.denoising.sampling.generate import generate as generate_pictures
from powersteer.denoising.sampling.sample import steered_pictures
from powersteer.denoising.settings import GenerateSettings, PictureJob
from powersteer.training.config import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def drawing(tmp_path):
    image = Image.new("RGB", (100, 80), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 80, 70), outline="black", width=4)
    image.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def test_generate_writes_pictures_that_carry_their_settings(run, tmp_path, base_dir, adapter_dir, drawing):
    args = [
        "generate",
        "--condition",
        drawing,
        "--prompt",
        "a fox",
        "--adapter",
        adapter_dir,
        "--base",
        base_dir,
    ]
    args += ["--steps", 2, "--num-images", 2, "--seed", 5, "--out", tmp_path / "out"]
    code, out, _ = run(*args)
    assert code == 0
    files = [line for line in out.splitlines() if line]
    assert [Path(file).name for file in files] == ["00000-seed5.png", "00001-seed6.png", "grid.png"]
    with Image.open(files[1]) as picture:
        settings = json.loads(picture.text["powersteer"])
        first = picture.convert("RGB").tobytes()
    assert settings["prompt"] == "a fox" and settings["seed"] == 6 and settings["inverted"] == [True]
    run(*args)  # the same seed gives the same picture; nothing is overwritten
    with Image.open(tmp_path / "out" / "00003-seed6.png") as picture:
        assert picture.convert("RGB").tobytes() == first


def one_line(result, *parts):
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err, err


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_manifest_of_many_goes_on_where_it_stopped(run, tmp_path, base_dir, adapter_dir, drawing):
    square = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(square).rectangle((20, 20, 44, 44), outline="black", width=3)
    square.save(tmp_path / "square.png")
    rows = [
        {"prompt": "a fox", "condition": "drawing.png", "seed": 3},
        {"prompt": "the moon", "condition": ["square.png"], "seed": 4, "negative_prompt": "a fox"},
        {"prompt": "two fish", "condition": "drawing.png"},
    ]
    manifest = tmp_path / "many.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["generate", "--adapter", adapter_dir, "--base", base_dir, "--steps", 2]
    many = [*common, "--manifest", manifest, "--out", tmp_path / "many", "--batch-size", 2]
    code, out, err = run(*many)
    assert code == 0, err
    files = [Path(line) for line in out.splitlines()]
    assert [file.name for file in files] == ["00000-seed3.png", "00001-seed4.png", "00002-seed0.png", "grid.png"]
    alone = ["--condition", tmp_path / "square.png", "--prompt", "the moon", "--negative-prompt", "a fox"]
    run(*common, *alone, "--seed", 4, "--num-images", 1, "--out", tmp_path / "alone")
    assert abs(pixels(files[1]) - pixels(tmp_path / "alone" / "00000-seed4.png")).max() <= 1
    assert abs(pixels(files[0]) - pixels(files[1])).max() > 5

    first, before = files[0].stat().st_mtime_ns, pixels(files[1])
    files[1].unlink()  # as if stopped: only what is missing is made again
    assert run(*many)[0] == 0
    assert files[0].stat().st_mtime_ns == first and abs(pixels(files[1]) - before).max() <= 1
    one_line(run(*many, "--scale", 0.5), "00000-seed3.png was made with other settings")
    whole = files[1].read_bytes()
    files[1].write_bytes(b"notes of somebody")
    one_line(run(*many), "00001-seed4.png is no picture of this command: give another folder")
    assert files[1].read_bytes() == b"notes of somebody"
    files[1].write_bytes(whole)
    manifest.write_text(json.dumps(rows[0]) + '\n{"prompt": "x", "conditions": "drawing.png"}\n')
    one_line(run(*many), "line 2: unknown key 'conditions'; did you mean 'condition'?")
    manifest.write_text(json.dumps(rows[0]) + "\nnonsense\n")
    one_line(run(*many), "line 2 is not JSON")
    manifest.write_text("")
    one_line(run(*many), "many.jsonl is empty")


@pytest.mark.parametrize("kind", [*BASELINES, "ablation"])
def test_generate_takes_other_networks_too_in_part_and_beside_others(
    run, tmp_path, base_dir, adapter_dir, drawing, kind
):
    pipe = load_base(str(base_dir))
    shape = {"preset": "lite", "ablation": "added-once"} if kind == "ablation" else {"preset": kind}
    network = randomise(
        make_adapter(pipe.unet, pixel_unshuffle=4, **shape, conditioning={"kind": "sketch", "channels": 1})
    )
    network.save_pretrained(tmp_path / kind)
    args = ["generate", "--condition", drawing, "--prompt", "a fox", "--base", base_dir, "--steps", 2]
    code, out, err = run(*args, "--adapter", tmp_path / kind, "--num-images", 2, "--out", tmp_path / "out")
    assert code == 0, err
    condition, _ = read_condition(drawing, 1, "sketch", (32, 32))
    with attach(pipe.unet, network, condition[None]):
        wanted = steered_pictures(pipe, None, ["a fox"] * 2, None, seeds=[0, 1], num_inference_steps=2)
    for file, picture in zip(out.splitlines(), wanted, strict=False):
        assert np.abs(pixels(file) - np.asarray(picture).astype(int)).max() <= 1
    # In part, and beside another.
    beside = ["--adapter", adapter_dir, "--condition", drawing]
    for name, more, strength in (("scale", ["--scale", 0.5], {"scale": 0.5}), ("two", beside, {})):
        code, out, err = run(
            *args, "--adapter", tmp_path / kind, *more, "--num-images", 1, "--out", tmp_path / f"out-{name}"
        )
        assert code == 0, err
        networks = [network, load_network(adapter_dir)] if more is beside else [network]
        conditions = [condition[None]] * len(networks)
        [wanted] = steered_pictures(pipe, networks, ["a fox"], conditions, seeds=[0], num_inference_steps=2, **strength)
        assert np.abs(pixels(out.splitlines()[0]) - np.asarray(wanted).astype(int)).max() <= 1


def test_a_folder_of_pairs_is_steered_as_it_was_trained(run, tmp_path, base_dir, adapter_dir):
    pairs = draw_pairs(tmp_path / "pairs", 3, size=48)
    for file in pairs.rglob("*.png"):  # wide ones, whose sides are cropped off; and half of it ink
        with Image.open(file) as picture:
            wide = Image.new(picture.mode, (72, 48), 255)
            wide.paste(picture, (12, 0))
        wide.save(file)
    args = ["generate", "--pairs", pairs, "--adapter", adapter_dir, "--base", base_dir, "--steps", 2, "--seed", 7]
    code, out, err = run(*args, "--batch-size", 2, "--out", tmp_path / "made")
    assert code == 0, err
    files = [Path(line) for line in out.splitlines()]
    assert [file.name for file in files[:3]] == ["00000-seed7.png", "00001-seed8.png", "00002-seed9.png"]
    pipe, model = load_base(str(base_dir)), load_adapter(str(adapter_dir))
    for i, (_, condition) in enumerate(Pairs(pairs, (32, 32))[k] for k in range(3)):
        (wanted,) = steered_pictures(
            pipe, model, ["a fox"], condition[None].float() / 255, seeds=[7 + i], num_inference_steps=2
        )
        assert np.abs(pixels(files[i]) - np.asarray(wanted).astype(int)).max() <= 1
    with Image.open(files[1]) as picture:
        assert json.loads(picture.text["powersteer"])["inverted"] == [False]
    first = files[0].stat().st_mtime_ns
    files[2].unlink()
    assert run(*args, "--out", tmp_path / "made")[0] == 0  # goes on where it stopped
    assert files[2].exists() and files[0].stat().st_mtime_ns == first
    (pairs / "metadata.jsonl").write_text((pairs / "metadata.jsonl").read_text().replace('"text"', '"words"'))
    one_line(run(*args, "--out", tmp_path / "made"), "has no caption")


def test_schedulers_pictures_to_start_from_masks_and_several_adapters(run, tmp_path, base_dir, adapter_dir, drawing):
    start, mask = Image.new("RGB", (32, 32), "orange"), Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    start.save(tmp_path / "start.png")
    mask.save(tmp_path / "mask.png")
    made = {}

    def generate(name, *extra):
        args = ["--prompt", "a fox", "--condition", drawing, "--adapter", adapter_dir, "--base", base_dir, "--steps", 3]
        code, _, err = run("generate", *args, *extra, "--num-images", 1, "--out", tmp_path / name)
        assert code == 0, err
        made[name] = pixels(tmp_path / name / "00000-seed0.png")

    init = ["--init-image", tmp_path / "start.png"]
    generate("plain")
    for scheduler in ("dpm++", "euler-a", "unipc"):
        generate(scheduler, "--scheduler", scheduler)
    generate("late", "--start", 0.5)
    generate("image to image", *init, "--strength", 0.6)
    generate("inpainting", *init, "--mask-image", tmp_path / "mask.png")
    generate("two", "--condition", drawing, "--adapter", adapter_dir, "--scale", 0.5, "--scale", 0.5)
    generate("one and none", "--condition", drawing, "--adapter", adapter_dir, "--scale", 1, "--scale", 0)
    assert abs(made["two"] - made["plain"]).max() <= 1  # two halves of one steering
    assert abs(made["one and none"] - made["plain"]).max() <= 1
    for name in ("dpm++", "euler-a", "unipc", "late", "image to image", "inpainting"):
        assert abs(made[name] - made["plain"]).max() > 3, name
    bad = ["generate", "--prompt", "a fox", "--base", base_dir, "--adapter", adapter_dir]
    one_line(run(*bad), "no condition")
    bad += ["--condition", drawing]
    one_line(run(*bad, "--condition", drawing), "1 adapters need as many conditions, not 2")
    one_line(run(*bad, "--scale", 1, "--scale", 2), "2 times --scale for 1 adapters")
    one_line(run(*bad, "--mask-image", tmp_path / "mask.png"), "give --init-image too")
    one_line(run(*bad, "--scheduler", "magic"), "'scheduler'", "ddim")
    one_line(run(*bad, *init, "--strength", 0), "'strength'")


def test_bad_generate_input_is_one_line_each(run, tmp_path, base_dir, adapter_dir, drawing):
    def generate(condition=drawing, prompt="a fox", adapter=adapter_dir, base=base_dir, out=tmp_path / "out"):
        args = [
            "--condition",
            condition,
            "--prompt",
            prompt,
            "--adapter",
            adapter,
            "--base",
            base,
            "--out",
            out,
        ]
        return run("generate", "--steps", 1, *args)

    broken, tiny, deep = tmp_path / "broken.png", tmp_path / "tiny.png", tmp_path / "deep.png"
    broken.write_bytes(drawing.read_bytes()[:60])
    Image.new("L", (3, 3)).save(tiny)
    Image.new("I;16", (64, 64)).save(deep)
    (tmp_path / "empty").mkdir()
    one_line(generate(condition=tmp_path / "none.png"), "none.png cannot be read: it does not exist")
    one_line(generate(condition=broken), "broken.png is not a readable picture")
    one_line(generate(condition=tiny), "tiny.png is 3×3 pixels: too small")
    one_line(generate(condition=deep), "save it with 8 bits a channel")
    one_line(generate(prompt="  "), "the prompt is empty")
    one_line(generate(adapter=tmp_path / "empty"), "holds no config.json")
    one_line(generate(base=tmp_path / "empty"), "cannot load the base", "model_index.json")
    one_line(generate(out=drawing / "out"), "cannot write to")
    assert not (tmp_path / "out").exists()


def test_bad_train_input_is_one_line_each(run, tmp_path, base_dir):
    good = {
        "pretrained_model_name_or_path": str(base_dir),
        "train_data_dir": str(draw_pairs(tmp_path / "pairs", 4)),
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "train.yaml"

    def train(*overrides, **changes):
        config.write_text(json.dumps(good | changes))
        return run("train", config, *overrides)

    one_line(run("train", tmp_path / "none.yaml"), "none.yaml cannot be read: it does not exist")
    one_line(train(learning_rat=1e-4), "unknown key 'learning_rat'", "did you mean 'learning_rate'?")
    one_line(train("max_train_steps=soon"), "'max_train_steps'", "valid integer")
    one_line(train("steps"), "not of the form key=value")
    one_line(train(train_data_dir=str(tmp_path / "none")), "there is no folder of pairs")
    one_line(train(train_data_dir=str(tmp_path)), "holds no pairs that can be read", "metadata.jsonl")
    (tmp_path / "file").write_text("")
    one_line(train(output_dir=str(tmp_path / "file" / "run")), "cannot write to")
    config.write_text("a: [")
    one_line(run("train", config), "not valid YAML")
    config.write_text("- 1")
    one_line(run("train", config), "must hold `key: value` pairs")


def test_data_check_says_what_is_there_and_exits_with_1_where_training_would_fail(run, tmp_path):
    pairs = draw_pairs(tmp_path / "pairs", 4)
    status, printed, _ = run("data", "check", pairs)
    assert status == 0 and "32 to 32, median 32" in printed
    assert "4 of 4 captions" in printed and "such as" in printed
    (pairs / "images" / "2.png").write_bytes(b"no picture")
    status, printed, _ = run("data", "check", pairs, "--json")
    assert status == 1 and "is not a readable picture" in json.loads(printed)["errors"][0]
    one_line(run("data", "check", tmp_path / "none"), "there is no folder of pairs")


@pytest.mark.parametrize("name", ["many-pairs", "few-shot"])
def test_the_readmes_training_commands_need_nothing_but_the_pairs(name):
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml", TrainConfig)
    assert {key for key, value in config if isinstance(value, Path)} == {"output_dir"}
    assert config.train_data_dir == "my/pairs" and config.preset in (None, name)


def test_dry_run_loads_nothing_and_prints_every_key(run, tmp_path, base_dir):
    config = tmp_path / "train.yaml"
    given = {"train_data_dir": "none", "output_dir": tmp_path / "run", "pretrained_model_name_or_path": base_dir}
    config.write_text("".join(f"{key}: {value}\n" for key, value in given.items()))
    code, printed, _ = run("train", config, "preset=low-memory", "--dry-run")
    assert code == 0 and not (tmp_path / "run").exists()
    where_given = {"weighting_scheme", "variant", "revision", "base_config"}
    for key in TrainConfig.model_fields.keys() - where_given:
        assert f"{key}: " in printed
    assert "effective batch size" in printed and "activations" in printed and "free now" in printed
    code, printed, _ = run("train", config, "--dry-run", "--json")
    facts = json.loads(printed)
    assert facts["config"]["learning_rate"] == 1e-4 and facts["memory"]["total"] > facts["memory"]["optimizer"] > 0
    one_line(
        run("train", config, "pretrained_model_name_or_path=none/such", "--dry-run"), "cannot read the base 'none/such'"
    )


def test_train_then_generate_with_it(run, tmp_path, base_dir, drawing):
    config = tmp_path / "train.yaml"
    pairs = draw_pairs(tmp_path / "pairs", 6)
    config.write_text(
        f"train_data_dir: {pairs}\noutput_dir: {tmp_path / 'run'}\npretrained_model_name_or_path: {base_dir}"
    )
    code, out, _ = run("train", config, "max_train_steps=2", "train_batch_size=2", "learning_rate=1e-4")
    assert code == 0 and "best weights are of step 2 of 2" in out
    code, *_ = run(
        "generate", "--condition", drawing, "--prompt", "x", "--adapter", tmp_path / "run", "--base", base_dir,
        "--steps", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and (tmp_path / "out" / "grid.png").exists()


def test_help_reads_well_at_80_columns_and_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "powersteer.apps.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    for command in ("generate", "train", "pretrain", "demo"):
        assert command in done.stdout
    assert "torch" not in done.stderr


def test_a_missing_option_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "powersteer.apps.cli", "generate"], capture_output=True, text=True)
    assert done.returncode == 2 and "--condition" in done.stderr and "Traceback" not in done.stderr


# -- what was asked for is obeyed, or refused in a line


@pytest.fixture
def generate(run, tmp_path, base_dir, adapter_dir, drawing):
    """`powersteer generate` of two steps, with further arguments."""
    given = {"condition": drawing, "prompt": "a fox", "adapter": adapter_dir, "base": base_dir, "steps": 2}
    given |= {"num-images": 1, "out": tmp_path / "out"}

    def generate(*more, **change):
        values = given | {name.replace("_", "-"): value for name, value in change.items()}
        flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
        return run("generate", *flags, *more)

    return generate


HUGE = 10**40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scale", "nan"], "'scale.0': Input should be a finite number"),
        (["--scale", "inf"], "'scale.0': Input should be a finite number"),
        (["--scale", "1e30"], "'scale.0'"),
        (["--start", "nan"], "'start.0'"),
        (["--end", "1.5"], "'end.0'"),
        (["--guidance-scale", "inf"], "'guidance_scale': Input should be a finite number"),
        (["--seed", HUGE], "'seed'"),
        (["--seed", -1], "'seed'"),
        (["--seed", 2**63 - 1, "--num-images", 2], "'seed'"),
        (["--num-images", HUGE], "--num-images must be from 1 to 100,000"),
        (["--scheduler", "pndm", "--steps", 3], "PNDMScheduler cannot take 3 steps"),
        (["--strength", 0.5], "--strength has no effect without --init-image: leave it out"),
        (["--pairs", "somewhere"], "--condition has no effect with --pairs, whose pairs have their own: leave it out"),
        (["--manifest", "it.jsonl"], "--condition has no effect with --manifest"),
    ],
)
def test_numbers_and_options_that_generate_cannot_obey(generate, tmp_path, options, said):
    one_line(generate(*options), said)
    assert not (tmp_path / "out").exists()


def test_a_strength_that_leaves_no_steps_is_refused(generate, tmp_path, drawing):
    one_line(
        generate("--init-image", drawing, "--strength", 0.01),
        "2 steps at a strength of 0.01 leave none to do: give 100 steps or more",
    )


def test_narrow_conditions_are_refused_in_a_line(generate, tmp_path):
    Image.new("L", (3000, 10)).save(tmp_path / "narrow.png")
    one_line(generate(condition=tmp_path / "narrow.png"), "narrow.png is 3000×10 pixels: too narrow to steer by")


def test_pictures_that_are_not_finite_are_never_written(run, tmp_path, drawing):
    args = ["generate", "--condition", drawing, "--prompt", "a fox", "--out", tmp_path / "out", "--num-images", 1]
    one_line(
        run(*args, "--scheduler", "euler-a", "--steps", 3),
        "the pictures are not finite numbers, of 3 steps of EulerAncestralDiscreteScheduler",
    )
    assert not list((tmp_path / "out").glob("*.png"))
    assert run(*args, "--scheduler", "euler-a", "--steps", 4)[0] == 0


def test_drawing_photo_and_mask_are_fitted_alike(monkeypatch, tmp_path, base_dir, adapter_dir):
    """A mark at the same place of three wide pictures is at one place of what the pipeline is given."""
    seen = {}

    def steered(pipe, models, prompts, conditions, **inputs):
        seen.update(condition=conditions[0][0, 0], **inputs)
        return [Image.new("RGB", (32, 32))]

    monkeypatch.setattr("powersteer.denoising.sampling.sampler.steered_pictures", steered)
    files = {}
    for name, mark, ground in (("drawing", "black", "white"), ("photo", "red", "blue"), ("mask", "white", "black")):
        picture = Image.new("RGB", (200, 100), ground)
        ImageDraw.Draw(picture).rectangle((110, 60, 139, 89), fill=mark)
        files[name] = tmp_path / f"{name}.png"
        picture.save(files[name])
    common = {"adapter": (str(adapter_dir),), "base": str(base_dir), "num_inference_steps": 2}
    job = PictureJob(prompt="a fox", condition=(files["drawing"],))
    for prepared in (False, True):
        settings = GenerateSettings(**common, init_image=files["photo"], mask_image=files["mask"], prepared=prepared)
        generate_pictures(settings, [job], tmp_path / f"out-{prepared}")
        ink = seen["condition"].numpy() if not prepared else 1 - seen["condition"].numpy()
        photo, mask = np.asarray(seen["image"][0]).astype(float), np.asarray(seen["mask_image"]) / 255
        red = (photo[..., 0] - photo[..., 2]) > 0
        if not prepared:
            rows, columns = np.where(ink > 0.5)
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (18, 21, 18, 21)  # of 32, padded above
            red &= photo[..., 1] < 128  # the paper around it is white
        assert (red == (ink > 0.5)).mean() > 0.97 and (mask > 0.5).sum() > 0
        assert ((mask > 0.5) == (ink > 0.5)).mean() > 0.97
    wide = Image.new("RGB", (100, 100), "blue")
    wide.save(files["photo"])
    with pytest.warns(
        PowersteerWarning, match=r"photo.png is 100×100 pixels, .*drawing.png 200×100: their shapes differ"
    ):
        generate_pictures(GenerateSettings(**common, init_image=files["photo"]), [job], tmp_path / "other")


def test_a_folder_is_gone_on_with_only_where_files_and_weights_are_the_same(generate, tmp_path, drawing, adapter_dir):
    manifest = tmp_path / "it.jsonl"
    manifest.write_text(json.dumps({"prompt": "a fox", "condition": str(drawing)}) + "\n")
    many = {"manifest": manifest, "condition": None, "prompt": None, "num_images": None}
    assert generate(**many)[0] == 0 and generate(**many)[0] == 0
    before = drawing.read_bytes()
    picture = Image.open(drawing).convert("RGB")
    ImageDraw.Draw(picture).line((0, 0, 60, 5), fill="black", width=2)
    picture.save(drawing)
    one_line(generate(**many), "00000-seed0.png was made with other settings")
    drawing.write_bytes(before)
    network = load_network(adapter_dir)
    next(network.parameters()).data.view(-1)[3] += 1e-3
    network.save_pretrained(adapter_dir)
    one_line(generate(**many), "00000-seed0.png was made with other settings")


def test_a_path_is_printed_as_it_is(generate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("o/a[/b]c", "a[red]c", "esc\x1b[31m"):
        code, out, err = generate(out=name)
        assert code == 0, err
        assert out.splitlines()[0] == f"{name}/00000-seed0.png".replace("\x1b", "\\x1b")
        assert Path(name, "grid.png").exists()


def test_our_own_warnings_reach_the_terminal(generate, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "blank.png")
    code, _, err = generate(condition=tmp_path / "blank.png")
    assert code == 0
    assert "warning: the condition is blank, one value all over" in err
    assert generate(condition=tmp_path / "blank.png", scale=0)[0] == 0


def test_options_of_the_other_mode_are_refused(run, tmp_path):
    for folder in ("real", "made"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "a.png")
    both = ["evaluate", "--real", tmp_path / "real", "--generated", tmp_path / "made"]
    one_line(run(*both, "--seed", 3), "--seed has no effect with --real and --generated: leave it out")
    one_line(run(*both, "--adapter", "none"), "--adapter has no effect with --real and --generated")
    experiment = ROOT / "configs" / "experiments" / "few-shot.yaml"
    one_line(run("compare", experiment, "--out", tmp_path / "it.md"), "--out has no effect without --report")
