"""A base in one file, under LDM's names: taken by what is in it, with a configuration from elsewhere, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file

from conftest import build_pipe, build_unet, randomise
from ldm_names import UNET, ldm_state, ldm_unet, ldm_vae, save_ldm
from powersteer import BPSModel, PowersteerError, load_base, steer
from powersteer.backbones.load import base_configs
from powersteer.data.limits import limits_of
from tiny_bases import second_pipe, tiny_pipe

SUPPORTED = "Stable Diffusion 1.x, 2.x or XL, its inpainting, or InstructPix2Pix"
FAMILIES = {"1.x": build_pipe, "2.x": second_pipe, "XL": lambda: tiny_pipe("xl")}
EXPECTED = {"1.x": StableDiffusionPipeline, "2.x": StableDiffusionPipeline, "XL": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family → folder in diffusers' layout, and the same weights in one file, whose name says nothing."""
    made = {}
    for family, build in FAMILIES.items():
        folder = tmp_path_factory.mktemp("base")
        pipe = build()
        pipe.save_pretrained(folder / "folder")
        made[family] = (folder / "folder", save_ldm(pipe, folder / "model.safetensors"))
    return made


@pytest.fixture
def first(bases, tmp_path):
    """A base of 1.x: a folder, and a file that may be spoilt."""
    folder, file = bases["1.x"]
    return Path(shutil.copytree(folder, tmp_path / "folder")), Path(shutil.copy(file, tmp_path / "model.safetensors"))


def refusal(file, load=load_base, **options) -> str:
    with pytest.raises(PowersteerError) as error:
        load(str(file), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(file, changed, metadata=None):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    changed(tensors)
    save_file(tensors, file, metadata=metadata)


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def steered_picture(pipe):
    factor = pipe.vae_scale_factor
    torch.manual_seed(0)
    adapter = randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=factor, weights="uniform"))
    side = 8 * factor
    condition = torch.linspace(0, 1, side * side).reshape(1, 1, side, side)
    with steer(pipe, adapter, condition):
        return pipe(
            "a fox",
            num_inference_steps=2,
            height=side,
            width=side,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_the_folder(bases, family):
    folder, file = bases[family]
    pipe, wanted = load_base(str(file), base_config=str(folder)), load_base(str(folder))
    assert type(pipe) is EXPECTED[family] and pipe.scheduler.config == wanted.scheduler.config
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "XL" else [])):
        ours, theirs = getattr(pipe, part), getattr(wanted, part)
        assert type(ours) is type(theirs) and not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    made, expected = steered_picture(pipe), steered_picture(wanted)
    assert expected.std() > 0 and torch.equal(made, expected)


def test_v_prediction_is_the_schedulers(bases):
    folder, file = bases["2.x"]
    assert load_base(str(file), base_config=str(folder)).scheduler.config.prediction_type == "v_prediction"
    assert base_configs(str(file), base_config=str(folder))["scheduler"]["prediction_type"] == "v_prediction"
    assert "do not tell whether it predicts ε or v: give `base_config`" in refusal(file)


def test_half_precision_in_file_and_in_memory(first):
    folder, file = first
    change(file, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    pipe, half = (
        load_base(str(file), base_config=str(folder)),
        load_base(str(file), torch.float16, base_config=str(folder)),
    )
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    assert {p.dtype for part in (half.unet, half.vae, half.text_encoder) for p in part.parameters()} == {torch.float16}
    weight = load_base(str(folder)).unet.conv_in.weight
    assert torch.equal(pipe.unet.conv_in.weight, weight.half().float())


@pytest.mark.parametrize(
    ("channels", "kind"), [(9, StableDiffusionInpaintPipeline), (8, StableDiffusionInstructPix2PixPipeline)]
)
def test_inpainting_and_instructions(first, channels, kind):
    folder, file = first
    unet = build_unet(in_channels=channels)
    change(file, lambda tensors: tensors.update({UNET + name: tensor for name, tensor in ldm_unet(unet).items()}))
    told = refusal(file, base_config=str(folder))
    assert f"whose U-Net reads {channels} channels; that of the configuration reads 4" in told
    unet.save_config(folder / "unet")
    change_json(folder / "model_index.json", _class_name=kind.__name__)
    pipe = load_base(str(file), base_config=str(folder))
    assert type(pipe) is kind and torch.equal(pipe.unet.conv_in.weight, unet.conv_in.weight)


def test_names_that_older_and_other_tools_write(first):
    """EMA's copies, the schedule, losses of training, position ids, and text encoders without ``text_model.``."""
    folder, file = first
    prefix = "cond_stage_model.transformer."

    def others(tensors):
        for name in [name for name in tensors if name.startswith(f"{prefix}text_model.")]:
            tensors[name.replace("text_model.", "")] = tensors.pop(name)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
        tensors |= {"betas": torch.ones(1000), "model_ema.decay": torch.ones(()), "logit_scale": torch.ones(())}
        tensors["first_stage_model.loss.logvar"] = torch.ones(())
        tensors["cond_stage_model.logit_scale"] = torch.ones(())

    change(file, others)
    pipe, wanted = load_base(str(file), base_config=str(folder)), load_base(str(folder))
    for name, tensor in wanted.text_encoder.state_dict().items():
        assert torch.equal(pipe.text_encoder.state_dict()[name], tensor)


def test_second_openclip_keeps_its_projection(bases):
    folder, file = bases["XL"]
    prefix = "conditioner.embedders.1.model."
    assert {f"{prefix}text_projection", f"{prefix}transformer.resblocks.0.attn.in_proj_weight"} <= set(load_file(file))
    pipe, wanted = load_base(str(file), base_config=str(folder)), load_base(str(folder))
    assert torch.equal(pipe.text_encoder_2.text_projection.weight, wanted.text_encoder_2.text_projection.weight)


def test_weights_of_the_configurations_folder_are_not_read(first):
    folder, file = first
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    load_base(str(file), base_config=str(folder))
    configs = base_configs(str(file), base_config=str(folder))
    assert set(configs) == {"unet", "vae", "text_encoder", "scheduler"}
    limits = limits_of(str(folder))
    assert limits.side == 32 and len(limits.tokenizers) == 1


def test_safety_checker_of_the_configuration_is_left_out(first):
    folder, file = first
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    parts["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    change_json(folder / "model_index.json", **parts, requires_safety_checker=True)
    pipe = load_base(str(file), base_config=str(folder))
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert set(base_configs(str(file), base_config=str(folder))) == {"unet", "vae", "text_encoder", "scheduler"}


PARTS = {
    "VAE": ("first_stage_model.", "the file holds no VAE"),
    "text encoder": ("cond_stage_model.", "the file holds no text encoder"),
    "U-Net": (UNET, "the file holds no U-Net of Stable Diffusion"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(first, part):
    folder, file = first
    prefix, told = PARTS[part]
    change(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)])
    assert told in refusal(file, base_config=str(folder)) and SUPPORTED in refusal(file)


def test_xl_without_its_second_text_encoder(bases, tmp_path):
    folder, file = bases["XL"]
    file = Path(shutil.copy(file, tmp_path))
    change(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".embedders.1." in name])
    assert "the file holds no text_encoder_2: give the whole checkpoint" in refusal(file, base_config=str(folder))


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_a_missing_folder_of_the_configuration_is_named(first, part):
    folder, file = first
    shutil.rmtree(folder / part)
    told = refusal(file, base_config=str(folder))
    assert str(folder / part) in told and ("is missing" in told or "does not exist" in told)


LOST = {
    f"{UNET}input_blocks.1.0.in_layers.2.weight": "unet of the file lacks the weights down_blocks.0.resnets.0.conv1",
    f"{UNET}out.0.bias": "unet of the file lacks the weights conv_norm_out.bias",
    "first_stage_model.decoder.mid.attn_1.q.weight": "vae of the file lacks the weights decoder.mid_block.attentions.0",
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias": "text_encoder of the file lacks the weigh",
}


@pytest.mark.parametrize("name", LOST)
def test_weights_that_are_not_the_configurations(first, name):
    folder, file = first
    whole = file.read_bytes()

    def spoilt(changed):
        file.write_bytes(whole)
        change(file, changed)
        return refusal(file, base_config=str(folder))

    assert LOST[name] in spoilt(lambda tensors: tensors.pop(name))
    assert "its config.json asks for" in spoilt(lambda tensors: tensors.update({name: torch.ones(3, 3)}))
    for value in (float("nan"), float("inf")):
        told = spoilt(lambda tensors, value=value: tensors[name].flatten()[2:3].fill_(value))
        assert "holds values that are infinite or no numbers" in told
    told = spoilt(lambda tensors: tensors.update({name: tensors[name].char()}))
    assert "holds int8, no weights: give a file that is not quantized" in told


EXTRA = {
    f"{UNET}label_emb.0.0.weight": "label_emb.0.0.weight: give `base_config` of this very base",
    f"{UNET}output_blocks.6.0.in_layers.0.weight": "up_blocks.2.resnets.0.norm1.weight",
    "first_stage_model.encoder.down.7.block.0.norm1.weight": "encoder.down.7.block.0.norm1.weight: give `base_config`",
    "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias": "encoder.layers.2.mlp.fc1.bias",
}


@pytest.mark.parametrize("name", EXTRA)
def test_weights_that_the_configuration_does_not_ask_for(first, name):
    folder, file = first
    change(file, lambda tensors: tensors.update({name: torch.ones(16)}))
    told = refusal(file, base_config=str(folder))
    assert "does not ask for" in told and EXTRA[name] in told


def test_configurations_of_another_base(bases, first):
    folder, file = first
    xl_folder, xl_file = bases["XL"]
    told = refusal(file, base_config=str(xl_folder))
    assert "the file is Stable Diffusion 1.x (text to picture)" in told and "text_encoder and text_encoder_2" in told
    assert "the file is Stable Diffusion XL" in refusal(xl_file, base_config=str(folder))
    change_json(folder / "unet" / "config.json", cross_attention_dim=32)
    assert "reads 24 numbers a token; the configuration has text_encoder, and a U-Net that reads 32" in refusal(
        file, base_config=str(folder)
    )
    change_json(folder / "unet" / "config.json", cross_attention_dim=24, layers_per_block="two")
    assert "unet/config.json describes no UNet2DConditionModel" in refusal(file, base_config=str(folder))
    change_json(folder / "unet" / "config.json", layers_per_block=10**9)
    assert "no network is that large" in refusal(file, base_config=str(folder))


@pytest.mark.parametrize(("mark", "setting"), [("v_pred", "prediction_type"), ("ztsnr", "rescale_betas_zero_snr")])
def test_files_that_are_marked_for_a_schedule(first, mark, setting):
    folder, file = first
    change(file, lambda tensors: tensors.update({mark: torch.ones(0)}))
    assert f"the file is marked for the scheduler's setting {setting}" in refusal(file, base_config=str(folder))
    value = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}[setting]
    change_json(folder / "scheduler" / "scheduler_config.json", **{setting: value})
    assert load_base(str(file), base_config=str(folder)).scheduler.config[setting] == value


def test_remarks_in_the_header(first):
    folder, file = first
    change(file, lambda _: None, {"modelspec.prediction_type": "v"})
    assert "setting prediction_type: v_prediction, the configuration's is epsilon" in refusal(
        file, base_config=str(folder)
    )
    change(file, lambda _: None, {"modelspec.prediction_type": "epsilon"})
    load_base(str(file), base_config=str(folder))
    change(file, lambda tensors: tensors.update({"edm_mean": torch.ones(4)}))
    assert "marked 'edm_mean', for EDM's noise levels" in refusal(file, base_config=str(folder))


def refiner():
    state = {name: tensor for name, tensor in ldm_state(second_pipe()).items() if "cond_stage" not in name}
    return state | {"conditioner.embedders.0.model.text_projection": torch.ones(2, 2)}


def read(channels):
    return ldm_state(build_pipe()) | {f"{UNET}input_blocks.0.0.weight": torch.ones(16, channels, 3, 3)}


OTHERS = {
    "LoRA of kohya": (lambda: {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2)}, "is a LoRA"),
    "LoRA of diffusers": (lambda: {"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2)}, "is a LoRA"),
    "LoHa": (lambda: {"x.hada_w1_a": torch.ones(2)}, "is a LoRA or the like"),
    "ControlNet": (lambda: ControlNetModel.from_unet(build_unet()).state_dict(), "is a ControlNet"),
    "ControlNet of LDM": (lambda: {"control_model.input_hint_block.0.weight": torch.ones(2)}, "is a ControlNet"),
    "U-Net": (lambda: build_unet().state_dict(), "is a lone U-Net"),
    "U-Net of LDM": (lambda: ldm_unet(build_unet()), "is a lone U-Net"),
    "VAE": (lambda: build_pipe().vae.state_dict(), "is a lone VAE"),
    "VAE of LDM": (lambda: ldm_vae(build_pipe().vae), "is a lone VAE"),
    "text encoder": (lambda: build_pipe().text_encoder.state_dict(), "is a lone text encoder"),
    "U-Net of a checkpoint": (
        lambda: {UNET + name: tensor for name, tensor in ldm_unet(build_unet()).items()},
        "holds no VAE and no text encoder",
    ),
    "transformer": (lambda: {f"{UNET}double_blocks.0.x": torch.ones(2)}, "is a diffusion transformer"),
    "textual inversion": (lambda: {"emb_params": torch.ones(2)}, "is a textual inversion"),
    "adapter": (lambda: BPSModel.from_unet(build_unet()).state_dict(), "is an adapter: give its folder"),
    "refiner": (refiner, "is XL's refiner"),
    "depth": (lambda: read(5), "U-Net reads 5 channels"),
    "two": (lambda: ldm_state(build_pipe()) | ldm_state(second_pipe()), "text encoders of Stable Diffusion 1.x and"),
    "something": (lambda: {"a": torch.ones(2)}, "no checkpoint of Stable Diffusion in LDM's names (its first tensor i"),
    "nothing": (dict, "it has no tensors"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_something_else(bases, tmp_path, kind):
    make, told = OTHERS[kind]
    tensors = {name: tensor.contiguous().clone() for name, tensor in make().items()}
    save_file(tensors, tmp_path / "v1-5-pruned.safetensors")
    for load in (load_base, base_configs):
        refused = refusal(tmp_path / "v1-5-pruned.safetensors", load, base_config=str(bases["1.x"][0]))
        assert told in refused and SUPPORTED in refused


def test_files_that_are_no_safetensors(first, tmp_path):
    folder, file = first
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "model.safetensors is truncated or no checkpoint" in refusal(file, base_config=str(folder))
    for name in ("model.ckpt", "model.safetensors"):  # by its content, whatever its name
        torch.save({"state_dict": ldm_state(build_pipe())}, tmp_path / name)
        assert "the file is a pickle (.ckpt), which could run code" in refusal(tmp_path / name, base_config=str(folder))
    file.write_bytes(b"GGUF" + bytes(50))
    assert "the file is GGUF" in refusal(file, base_config=str(folder))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n")
    assert "is a pointer of Git LFS" in refusal(file, base_config=str(folder))
    shutil.copy(save_ldm(build_pipe(), tmp_path / "whole"), tmp_path / "model.ckpt")
    load_base(str(tmp_path / "model.ckpt"), base_config=str(folder))


def test_arguments_that_are_for_other_bases(first, tmp_path):
    folder, file = first
    for option in ({"variant": "fp16"}, {"revision": "main"}):
        assert "are for folders and models of the Hub: it is one file" in refusal(
            file, base_config=str(folder), **option
        )
    assert "`base_config` is for a base in one file" in refusal(folder, base_config=str(folder))
    assert "`revision` is for a model of the Hub" in refusal(folder, revision="main")
    assert "there is no such file" in refusal(tmp_path / "none.safetensors")
    told = refusal(file, base_config=str(file))
    assert "its configuration" in told and "it is a file, not a folder in diffusers' layout" in told
    assert "cannot fetch" in refusal(file, base_config=str(tmp_path / "none"))
    assert "a folder with a model_index.json" in refusal(file, base_config=str(tmp_path))
