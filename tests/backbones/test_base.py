"""Bases of others: what is incomplete, damaged, of another base or not finite is refused, and the part is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from powersteer import PowersteerError, load_base
from powersteer.backbones.load import base_configs, load_clip
from powersteer.core.errors import PowersteerWarning
from powersteer.core.files import embedded
from powersteer.evaluation.features import Clip
from tiny_bases import tiny_pipe

UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT, TOKENIZER = "text_encoder/model.safetensors", "tokenizer/tokenizer.json"
SUPPORTED = "give Stable Diffusion 1.x, 2.x or XL, its inpainting, or InstructPix2Pix"


@pytest.fixture
def base(base_dir, tmp_path):
    """A folder that may be spoilt."""
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


def refusal(place, load=load_base) -> str:
    with pytest.raises(PowersteerError) as error:
        load(str(place))
    assert "\n" not in str(error.value)
    return str(error.value)


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(file, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_the_embedded_base_without_its_words_is_refused(tmp_path, capsys):
    copy = Path(shutil.copytree(embedded("powersteer-tiny"), tmp_path / "b"))
    load_base(str(copy))
    (copy / TOKENIZER).unlink()
    told = refusal(copy)
    assert told.startswith(f"cannot load the base '{copy}': ")
    assert "tokenizer lacks tokenizer.json (or vocab.json and merges.txt)" in told
    shutil.copy(embedded("powersteer-tiny") / TOKENIZER, copy / TOKENIZER)
    change_weights(copy / TEXT, lambda tensors: tensors.pop("encoder.layers.0.mlp.fc1.weight"))
    capsys.readouterr()
    assert f"{TEXT} lacks the weights encoder.layers.0.mlp.fc1.weight" in refusal(copy)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""  # what transformers says of it is not all that a person needs to know


FILES = {
    "model_index.json": "give 'powersteer-tiny', a folder with a model_index.json, a model of the Hub, or a .safe",
    "unet/config.json": "unet/config.json cannot be read: it does not exist",
    "vae/config.json": "vae/config.json cannot be read: it does not exist",
    "text_encoder/config.json": "text_encoder/config.json cannot be read: it does not exist",
    "scheduler/scheduler_config.json": "scheduler/scheduler_config.json cannot be read: it does not exist",
    TOKENIZER: "tokenizer lacks tokenizer.json (or vocab.json and merges.txt)",
    "tokenizer/tokenizer_config.json": "the text encoder 12: its tokenizer_config.json is missing",
    UNET: "unet lacks diffusion_pytorch_model.safetensors",
    VAE: "vae lacks diffusion_pytorch_model.safetensors",
    TEXT: "text_encoder lacks model.safetensors",
}


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(base, file):
    (base / file).unlink()
    assert FILES[file] in refusal(base)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_folder_is_named(base, part):
    shutil.rmtree(base / part)
    assert f"{base / part} is missing" in refusal(base)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_weights_that_are_not_all_the_parts_own(base, base_dir, file):
    name = next(name for name in load_file(base / file) if name.endswith("norm1.weight"))

    def spoilt(change):
        shutil.copy(base_dir / file, base / file)
        change_weights(base / file, change)
        return refusal(base)

    assert f"{file} lacks the weights {name}" in spoilt(lambda tensors: tensors.pop(name))
    told = spoilt(lambda tensors: tensors.update({name: torch.ones(3, 3)}))
    assert f"{file}: {name} has the shape 3×3, its config.json asks for" in told
    other = name.replace("norm1", "norm7")
    told = spoilt(lambda tensors: tensors.update({other: torch.ones(3)}))
    assert f"{file} holds weights that its config.json does not ask for, {other}" in told
    for value in (float("nan"), float("inf")):
        told = spoilt(lambda tensors, value=value: tensors[name].data.flatten()[2:3].fill_(value))
        assert f"{name} holds values that are infinite or no numbers (float32)" in told
    told = spoilt(lambda tensors: tensors.update({name: tensors[name].int()}))
    assert f"{name} holds I32, no weights" in told
    content = (base_dir / file).read_bytes()
    (base / file).write_bytes(content[:-9])
    assert f"{file} is truncated or no checkpoint" in refusal(base)
    (base / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n")
    assert f"{file} is a pointer of Git LFS" in refusal(base)


def test_the_other_tower_of_a_clip_is_no_fault(base):
    others = {"vision_model.encoder.x": torch.ones(2), "logit_scale": torch.ones(())}
    others["text_model.embeddings.position_ids"] = torch.arange(12)
    change_weights(base / TEXT, lambda tensors: tensors.update(others))
    load_base(str(base))


def test_overflow_in_half_precision_is_told(base):
    change_weights(base / UNET, lambda tensors: tensors["conv_in.bias"].fill_(1e5))
    load_base(str(base))
    with pytest.raises(PowersteerError, match=r"conv_in.bias holds values that are .* \(float16\)"):
        load_base(str(base), torch.float16)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "DDPMPipeline"}, "it is a DDPMPipeline without vae: " + SUPPORTED),
        ({"_class_name": "FluxPipeline"}, "it is a FluxPipeline without unet: " + SUPPORTED),
        ({"_class_name": "SomethingNewPipeline"}, "names the class 'SomethingNewPipeline', no pipeline of this"),
        ({"_class_name": "UNet2DConditionModel"}, "names the class 'UNet2DConditionModel', no pipeline of this"),
        ({"_class_name": ["my_code", "Pipeline"]}, "names the class ['my_code', 'Pipeline'], no pipeline of this"),
        ({"_class_name": 5}, "names the class 5, no pipeline of this"),
        ({"_class_name": None}, "names the class None, no pipeline of this"),
        ({"unet": 5}, "without a UNet2DConditionModel: " + SUPPORTED),
        ({"unet": ["os", "system"]}, "without a UNet2DConditionModel: " + SUPPORTED),
        ({"vae": ["subprocess", "Popen"]}, "names the class 'Popen' of 'subprocess' as vae, which is not loaded"),
        ({"text_encoder": ["transformers", "GPT2Model"]}, "names the class 'GPT2Model' of 'transformers' as text"),
        ({"scheduler": ["diffusers", "UNet2DModel"]}, "names the class 'UNet2DModel' of 'diffusers' as scheduler"),
        ({"tokenizer": [1, 2, 3]}, "names the class [1, 2, 3] of None as tokenizer"),
        ({"tokenizer": None}, "without tokenizer"),
        ({"vae": [None, None]}, "without vae"),
        ({"safety_checker": 5}, "its parts make no pipeline"),
        ({"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}, "safety_checker is missing"),
        ({"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}, "feature_extractor is missing"),
    ],
)
def test_indices_of_what_cannot_be_steered(base, changes, told):
    change_json(base / "model_index.json", **changes)
    assert told in refusal(base)


def test_a_pipeline_of_another_kind(tmp_path):
    unet = UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert "it is a DDPMPipeline without a UNet2DConditionModel: " + SUPPORTED in refusal(tmp_path)


CONFIGS = ("model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("file", [*CONFIGS, "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", "[]", "\0", '{"a": 1, "a": 2}'])
def test_configs_that_are_none(base, file, content):
    (base / file).write_text(content)
    assert f"{base / file} is not" in refusal(base)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        (
            "unet",
            {"block_out_channels": [10**9, 10**9]},
            "'block_out_channels' is 1000000000, no network is that large",
        ),
        ("unet", {"block_out_channels": [16] * 1000}, "'block_out_channels' has 1000 numbers"),
        ("unet", {"block_out_channels": [16, 64]}, "has the shape"),
        ("unet", {"layers_per_block": 10**9}, "'layers_per_block' is 1000000000, no network is that large"),
        ("unet", {"layers_per_block": -1}, "holds weights that its config.json does not ask for"),
        ("unet", {"layers_per_block": "x"}, "unet is no UNet2DConditionModel"),
        ("unet", {"norm_num_groups": 0}, "unet is no UNet2DConditionModel"),
        ("unet", {"down_block_types": ["X", "Y"]}, "unet is no UNet2DConditionModel (X does not exist.)"),
        ("unet", {"_class_name": "UNetMotionModel"}, "is of the class 'UNetMotionModel', not UNet2DConditionModel"),
        ("vae", {"latent_channels": 10**9}, "'latent_channels' is 1000000000, no network is that large"),
        ("vae", {"scaling_factor": "x"}, "'scaling_factor' must be more than 0, not 'x'"),
        ("vae", {"scaling_factor": 0}, "'scaling_factor' must be more than 0, not 0"),
        ("text_encoder", {"vocab_size": 10**7}, "asks for 240010080 weights, the files hold"),
        ("text_encoder", {"hidden_size": 10**6}, "weights, the files hold"),
        ("text_encoder", {"max_position_embeddings": 10**7}, "weights, the files hold"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, no network is that large"),
        ("text_encoder", {"num_hidden_layers": 1}, "does not ask for, encoder.layers.1."),
        ("text_encoder", {"num_hidden_layers": 3}, "lacks the weights encoder.layers.2."),
        ("text_encoder", {"hidden_act": "x"}, "describes no CLIPTextModel"),
        ("text_encoder", {"hidden_size": "x"}, "describes no CLIPTextModel"),
    ],
)
def test_configs_of_a_part_that_is_not_there(base, part, changes, told):
    change_json(base / part / "config.json", **changes)
    assert told in refusal(base)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_train_timesteps": 10**12}, "'num_train_timesteps' must be 1 to 100000"),
        ({"num_train_timesteps": "x"}, "'num_train_timesteps' must be 1 to 100000, not 'x'"),
        ({"prediction_type": "noise"}, "must be one of epsilon, v_prediction, sample, not 'noise'"),
        ({"beta_schedule": "x"}, "scheduler is no DDIMScheduler"),
        ({"beta_start": 5}, "no noise schedule follows from its betas"),
        ({"trained_betas": [1.5] * 1000}, "no noise schedule follows from its betas"),
        ({"beta_end": None}, "scheduler is no DDIMScheduler"),
    ],
)
def test_schedulers_without_a_schedule(base, changes, told):
    change_json(base / "scheduler" / "scheduler_config.json", **changes)
    assert told in refusal(base)


def spelt_out(base):
    """The tokenizer as older versions write it."""
    model = json.loads((base / TOKENIZER).read_text())["model"]
    (base / TOKENIZER).unlink()
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (base / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return merges


def test_a_tokenizer_in_two_files_needs_both_and_whole(base):
    wanted = load_base(str(base)).tokenizer("a red house").input_ids
    merges = spelt_out(base)
    assert load_base(str(base)).tokenizer("a red house").input_ids == wanted
    file = base / "tokenizer" / "merges.txt"
    for share in (0.5, 0.8):  # a download that broke off
        file.write_text("\n".join(["#version: 0.2", *merges[: int(share * len(merges))], ""]))
        assert "does not know its own words: its files are incomplete" in refusal(base)
    file.unlink()
    assert "tokenizer lacks merges.txt" in refusal(base)
    (base / "tokenizer" / "vocab.json").rename(base / "vocab.json")
    file.write_text("\n".join(["#version: 0.2", *merges]))
    assert "tokenizer lacks vocab.json" in refusal(base)


def test_a_tokenizer_of_another_text_encoder(base):
    content = json.loads((base / TOKENIZER).read_text())
    known = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {f"zz{i}</w>": known + i for i in range(5)}
    (base / TOKENIZER).write_text(json.dumps(content))
    assert f"knows {known + 5} tokens, the text encoder {known}: one is another model's" in refusal(base)
    (base / TOKENIZER).write_text("[" * 100_000)
    assert "tokenizer is no CLIPTokenizer" in refusal(base)


def test_longer_captions_than_the_text_encoder_takes(base):
    change_json(base / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    assert "takes captions of 77 tokens, the text encoder 12" in refusal(base)


def test_parts_of_two_bases(base):
    shape = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 2, "layers_per_block": 2}
    shape["down_block_types"], shape["up_block_types"] = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    UNet2DConditionModel(**shape, cross_attention_dim=32).save_pretrained(base / "unet")
    assert "the text encoder gives 24 numbers a token, the U-Net reads 32: one is another base's" in refusal(base)
    UNet2DConditionModel(**shape, cross_attention_dim=24, in_channels=7).save_pretrained(base / "unet")
    assert "the VAE's latents have 4 channels, the U-Net reads 7: one is another base's" in refusal(base)
    for read in (8, 9):  # InstructPix2Pix, inpainting
        UNet2DConditionModel(**shape, cross_attention_dim=24, in_channels=read).save_pretrained(base / "unet")
        assert load_base(str(base)).unet.config.in_channels == read


def test_the_bases_that_there_are(base, tmp_path):
    """XL with its two text encoders, inpainting, InstructPix2Pix, and what comes with Stable Diffusion 1.x."""
    tiny_pipe("xl").save_pretrained(tmp_path / "xl")
    xl = load_base(str(tmp_path / "xl"))
    assert type(xl) is StableDiffusionXLPipeline and not any(p.requires_grad for p in xl.text_encoder_2.parameters())
    change_weights(tmp_path / "xl" / "text_encoder_2" / "model.safetensors", lambda tensors: tensors.popitem())
    assert "text_encoder_2/model.safetensors lacks the weights" in refusal(tmp_path / "xl")
    shutil.rmtree(tmp_path / "xl" / "tokenizer_2")
    shutil.rmtree(tmp_path / "xl" / "text_encoder_2")
    change_json(tmp_path / "xl" / "model_index.json", tokenizer_2=[None, None], text_encoder_2=[None, None])
    assert "the text encoder gives 24 numbers a token, the U-Net reads 48" in refusal(tmp_path / "xl")
    for kind in (StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline):
        change_json(base / "model_index.json", _class_name=kind.__name__)
        assert type(load_base(str(base))) is kind

    change_json(base / "model_index.json", _class_name="StableDiffusionPipeline", requires_safety_checker=True)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(base / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(base / "feature_extractor")
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    parts["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]  # the name it had
    change_json(base / "model_index.json", **parts)
    pipe = load_base(str(base))
    assert pipe.safety_checker is not None and pipe.feature_extractor.crop_size["height"] == 32
    change_weights(base / "safety_checker" / "model.safetensors", lambda tensors: tensors.pop("concept_embeds"))
    assert "safety_checker/model.safetensors lacks the weights concept_embeds" in refusal(base)


def test_weights_by_the_names_that_they_had(base, base_dir):
    """As on the Hub: Stable Diffusion 1.x's VAE has diffusers' old names of attention, its text encoder a prefix."""
    wanted = load_base(str(base_dir))
    was = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_names(tensors):
        for name in list(tensors):
            old = name
            for now, before in was.items():
                old = old.replace(f".{now}.", f".{before}.") if "mid_block.attentions" in name else old
            tensors[old] = tensors.pop(name)

    change_weights(base / VAE, old_names)
    assert any(name.endswith("attentions.0.proj_attn.weight") for name in load_file(base / VAE))
    change_weights(base / TEXT, lambda t: [t.update({f"text_model.{name}": t.pop(name)}) for name in list(t)])
    pipe = load_base(str(base))
    for part in ("vae", "text_encoder"):
        for name, tensor in getattr(wanted, part).state_dict().items():
            assert torch.equal(getattr(pipe, part).state_dict()[name], tensor)
    change_weights(base / TEXT, lambda t: t.pop("text_model.encoder.layers.1.mlp.fc1.bias"))
    assert "lacks the weights encoder.layers.1.mlp.fc1.bias" in refusal(base)
    change_weights(base / TEXT, lambda t: t.update({"text_model.encoder.layers.1.mlp.fc1.bias": torch.ones(48)}))
    change_weights(base / TEXT, lambda t: t.update({"text_model.encoder.layers.2.mlp.fc1.bias": torch.ones(48)}))
    assert "does not ask for, encoder.layers.2.mlp.fc1.bias" in refusal(base)


def test_half_precision_alone_is_loaded(base, base_dir):
    for file in (UNET, VAE, TEXT):
        change_weights(base / file, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
        (base / file).rename(str(base / file).replace(".safetensors", ".fp16.safetensors"))
    pipe, other = load_base(str(base)), load_base(str(base_dir))
    for part in ("unet", "vae", "text_encoder"):
        loaded, whole = getattr(pipe, part), getattr(other, part)
        assert loaded.dtype == torch.float32
        for name, tensor in whole.state_dict().items():
            assert torch.equal(
                loaded.state_dict()[name], tensor.half().float() if tensor.is_floating_point() else tensor
            )


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("file", [UNET, TEXT])
def test_pickles_are_read_without_running_them(base, base_dir, file, capsys):
    tensors = load_file(base / file)
    (base / file).unlink()
    pickled = (base / file).with_name("pytorch_model.bin" if file == TEXT else "diffusion_pytorch_model.bin")
    torch.save(tensors, pickled)
    load_base(str(base))
    torch.save({**tensors, "x": Evil()}, pickled)
    refusal(base)
    printed = capsys.readouterr()
    assert "this ran" not in printed.out + printed.err


def test_names_that_no_base_has(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("a\0b", "x" * 5000, str(tmp_path / "loop"), str(tmp_path / "none"), ""):
        told = refusal(name)
        assert "cannot fetch" in told or "a folder with a model_index.json" in told


def test_a_setting_that_diffusers_leaves_out_is_told(base):
    change_json(base / "unet" / "config.json", wings=2)
    with pytest.warns(
        PowersteerWarning, match=r"unet/config.json has the setting 'wings', which this diffusers does not"
    ):
        load_base(str(base))


def test_configs_are_read_without_weights(base):
    for file in (UNET, VAE, TEXT):
        (base / file).unlink()
    configs = base_configs(str(base))
    assert set(configs) == {"unet", "vae", "text_encoder", "scheduler"}
    assert configs["unet"]["block_out_channels"] == [16, 32] and configs["scheduler"]["num_train_timesteps"] == 1000
    change_json(base / "vae" / "config.json", latent_channels=10**9)
    assert "cannot read the base" in refusal(base, base_configs) and "that large" in refusal(base, base_configs)
    (base / "unet" / "config.json").write_text("[" * 100_000)
    assert "unet/config.json is not JSON" in refusal(base, base_configs)
    change_json(base / "model_index.json", _class_name=5)
    assert "names the class 5" in refusal(base, base_configs)


def test_loading_leaves_the_libraries_as_they_were(base):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_base(str(base))
    (base / UNET).unlink()
    refusal(base)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("clip/model.safetensors", b"", "model.safetensors is truncated or no checkpoint"),
        ("clip/config.json", b"[" * 100_000, "config.json is not JSON"),
        ("clip/config.json", b'{"vision_config": {"hidden_size": 7}}', "clip: there is no such network"),
        ("clip/config.json", b'{"projection_dim": 10000000000}', "no network is that large"),
        (TEXT, b"\0" * 50, "model.safetensors is truncated or no checkpoint"),
        (TOKENIZER, None, "tokenizer lacks tokenizer.json"),
    ],
)
def test_the_clip_of_a_base_that_is_damaged(tmp_path, file, content, told):
    copy = Path(shutil.copytree(embedded("powersteer-tiny"), tmp_path / "b"))
    (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
    assert told in refusal(copy, lambda place: load_clip(Path(place)))
    assert "cannot load a CLIP from" in refusal(copy, Clip.load)


def test_weights_of_a_clip_that_lack_or_are_not_finite(tmp_path):
    copy = Path(shutil.copytree(embedded("powersteer-tiny"), tmp_path / "b"))
    file, name = copy / "clip" / "model.safetensors", "visual_projection.weight"
    change_weights(file, lambda tensors: tensors[name].fill_(float("nan")))
    assert f"{name} holds values that are infinite" in refusal(copy, Clip.load)
    change_weights(file, lambda tensors: tensors.pop(name))
    assert f"lacks the weights {name}" in refusal(copy, Clip.load)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: change_weights(f / "model.safetensors", lambda t: t.pop("logit_scale")), "lacks the weights logit"),
        (lambda f: change_weights(f / "model.safetensors", lambda t: t["logit_scale"].fill_(torch.nan)), "no numbers"),
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda f: change_json(f / "config.json", projection_dim=10**7), "weights, the files hold"),
        (lambda f: (f / "preprocessor_config.json").write_text("[" * 100_000), "is no CLIPImageProcessor"),
        (lambda f: change_json(f / "preprocessor_config.json", image_mean=[1]), "'mean"),
        (
            lambda f: change_json(f / "preprocessor_config.json", image_std=[0, 0, 0]),
            "'std.0': Input should be greater",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is truncated or no checkpoint"),
    ],
)
def test_any_clip_that_is_damaged(clip_dir, tmp_path, spoil, told):
    copy = Path(shutil.copytree(clip_dir, tmp_path / "clip"))
    Clip.load(str(copy))
    spoil(copy)
    refused = refusal(copy, Clip.load)
    assert refused.startswith(f"cannot load a CLIP from '{copy}'") and told in refused


def test_a_command_tells_it_in_one_line_and_makes_nothing(base, adapter_dir, run, tmp_path):
    (base / TOKENIZER).unlink()
    drawing = tmp_path / "drawing.png"
    Image.new("L", (32, 32), 255).save(drawing)
    command = ["generate", "--prompt", "a fox", "--condition", drawing, "--adapter", adapter_dir]
    code, out, err = run(*command, "--base", base, "--out", tmp_path / "out")
    assert code == 2 and out == "" and err.startswith("error: cannot load the base") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
