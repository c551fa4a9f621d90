"""Bases by variant and revision, of a folder and of the Hub; and configurations that the Hub has for one file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import build_pipe, draw_pairs
from ldm_names import save_ldm
from powersteer import PowersteerError, load_base
from powersteer.backbones.load import base_configs
from powersteer.data.limits import limits_of
from tiny_bases import tiny_pipe
from tiny_hub import files_of, use_endpoint

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"
FIRST = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def with_variant(folder, variant, files=(UNET, VAE, TEXT), scale=2.0):
    """Weights of a variant beside the plain ones, which differ from them."""
    for file in files:
        tensors = {name: tensor * scale for name, tensor in load_file(folder / file).items()}
        target = str(folder / file).replace(".safetensors", f".{variant}.safetensors")
        save_file(tensors, target, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(base_dir, tmp_path):
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


def refusal(place, load=load_base, **options) -> str:
    with pytest.raises(PowersteerError) as error:
        load(str(place), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def first_weights(pipe):
    return [next(part.parameters()) for part in (pipe.unet, pipe.vae, pipe.text_encoder)]


def test_a_variant_of_a_folder(folder):
    plain = first_weights(load_base(str(folder)))
    with_variant(folder, "fp16")
    for given, scale in ((None, 1), ("fp16", 2)):
        for ours, theirs in zip(first_weights(load_base(str(folder), variant=given)), plain, strict=True):
            assert torch.equal(ours, theirs * scale)


def test_a_variant_that_some_networks_have(folder):
    """As the Hub's copies of Stable Diffusion 1.x: ``non_ema`` is a U-Net alone."""
    plain = first_weights(load_base(str(folder)))
    with_variant(folder, "non_ema", files=(UNET,))
    for ours, theirs, scale in zip(
        first_weights(load_base(str(folder), variant="non_ema")), plain, (2, 1, 1), strict=True
    ):
        assert torch.equal(ours, theirs * scale)


def test_a_variant_in_pieces(folder, base_dir):
    pipe = build_pipe()
    pipe.unet.save_pretrained(folder / "unet", variant="bf16", max_shard_size="100KB")
    pipe.text_encoder.save_pretrained(folder / "text_encoder", variant="bf16", max_shard_size="10KB")
    (folder / UNET).unlink()
    (folder / TEXT).unlink()
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.bf16.json").exists()
    loaded, wanted = load_base(str(folder), variant="bf16"), load_base(str(base_dir))
    for name, tensor in wanted.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor)


def test_variants_that_there_are_not(folder):
    told = refusal(folder, variant="fp16")
    assert "none of its parts has weights of the variant 'fp16' (files named *.fp16.safetensors)" in told
    for variant in ("../x", "", "*", "a b"):
        assert "`variant` is a part of the files' names, such as fp16" in refusal(folder, variant=variant)
    with_variant(folder, "fp16")
    (folder / UNET.replace(".safe", ".fp16.safe")).write_bytes(b"x" * 30)
    assert "diffusion_pytorch_model.fp16.safetensors is truncated" in refusal(folder, variant="fp16")


def test_a_variant_of_the_hub_is_all_that_is_fetched(hub, folder):
    plain = first_weights(load_base(str(folder)))
    hub.repos["you/base"] = files_of(with_variant(folder, "fp16"))
    pipe = load_base("you/base", variant="fp16")
    for ours, theirs in zip(first_weights(pipe), plain, strict=True):
        assert torch.equal(ours, theirs * 2)
    assert not [path for path in hub.requests if path.endswith((UNET, VAE, TEXT))]
    assert "none of its parts has weights of the variant 'bf16'" in refusal("you/base", variant="bf16")


def test_a_revision_of_the_hub(hub, folder, monkeypatch, tmp_path):
    hub.repos["you/base"] = files_of(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {"beta_end": 0.02})
    )
    hub.repos["you/base@v2"] = files_of(with_variant(folder, "fp16"))
    assert load_base("you/base").scheduler.config.beta_end == 0.012
    pipe = load_base("you/base", revision="v2", variant="fp16")
    assert pipe.scheduler.config.beta_end == 0.02
    assert base_configs("you/base", revision="v2")["scheduler"]["beta_end"] == 0.02
    assert "the Hub has the model, but not this revision of it; check `revision`" in refusal("you/base", revision="v3")
    use_endpoint(monkeypatch, tmp_path, "http://127.0.0.1:9")
    assert load_base("you/base", revision="v2", variant="fp16").scheduler.config.beta_end == 0.02  # as fetched before
    assert "cannot be reached" in refusal("you/base", revision="v4")


def configuration(folder):
    return {name: content for name, content in files_of(folder).items() if not name.endswith(".safetensors")}


def test_one_file_finds_its_familys_configuration(hub, base_dir, monkeypatch, tmp_path):
    file = save_ldm(build_pipe(), tmp_path / "mine.safetensors")
    told = refusal(file)
    assert f"the file is Stable Diffusion 1.x (text to picture); its configuration '{FIRST}' does not serve" in told
    assert "give `base_config`, a folder in diffusers' layout or a model of the Hub of this family" in told
    hub.repos[FIRST] = files_of(base_dir)
    pipe, wanted = load_base(str(file)), load_base(str(base_dir))
    for name, tensor in wanted.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor)
    assert not [path for path in hub.requests if path.endswith(".safetensors")]
    hub.repos["you/words"] = configuration(base_dir)
    load_base(str(file), base_config="you/words")
    assert base_configs(str(file)).keys() == {"unet", "vae", "text_encoder", "scheduler"}
    assert limits_of(str(file)).side == 32
    use_endpoint(monkeypatch, tmp_path, "http://127.0.0.1:9")
    load_base(str(file))  # as it was fetched before
    xl = save_ldm(tiny_pipe("xl"), tmp_path / "other.safetensors")
    for load in (load_base, base_configs):
        told = refusal(xl, load)
        assert "the file is Stable Diffusion XL (text to picture)" in told and "the Hub cannot be reached" in told
        assert "give `base_config`, a folder in diffusers' layout" in told


def test_commands_take_one_file(hub, base_dir, adapter_dir, run, tmp_path):
    hub.repos[FIRST] = configuration(base_dir)
    file = save_ldm(build_pipe(), tmp_path / "mine.safetensors")
    pairs = draw_pairs(tmp_path / "pairs", 4)
    made = {}
    for name, base in (("file", file), ("folder", base_dir)):
        out = tmp_path / name
        command = ["generate", "--prompt", "a fox", "--condition", pairs / "drawings" / "0.png", "--seed", 3]
        code, _, err = run(*command, "--adapter", adapter_dir, "--base", base, "--steps", 2, "--out", out)
        assert code == 0, err
        made[name] = [Image.open(picture).tobytes() for picture in sorted(out.glob("*.png"))]
    assert made["file"] and made["file"] == made["folder"]
    settings = {"pretrained_model_name_or_path": str(file), "train_data_dir": str(pairs), "max_train_steps": 1}
    settings |= {"output_dir": str(tmp_path / "run"), "train_batch_size": 2, "mixed_precision": "no"}
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    code, _, err = run("train", tmp_path / "train.yaml", "--dry-run")
    assert code == 0, err
    code, _, err = run("train", tmp_path / "train.yaml")
    assert code == 0 and (tmp_path / "run" / "config.json").exists(), err
    code, _, err = run("data", "check", pairs, "--base", file)
    assert code == 0, err
