"""Equal to the tensors computed with the authors' implementation (float32, every weight random)."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open

from powersteer import BPSModel, steer

REFERENCE = Path(__file__).parents[1] / "fixtures" / "sketch_sd.safetensors"


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def reference():
    with safe_open(REFERENCE, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    return config, tensors, weights


@pytest.fixture(scope="module")
def unet(reference):
    config, _, weights = reference
    shape = config["unet"]
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=shape["in_channels"],
        out_channels=shape["out_channels"],
        block_out_channels=tuple(shape["model_channels"] * m for m in shape["channel_mult"]),
        layers_per_block=shape["num_res_blocks"],
        attention_head_dim=shape["num_heads"],
        cross_attention_dim=shape["context_dim"],
    )
    prefixed = {f"model.diffusion_model.{name}": t for name, t in weights.items() if "control_model" not in name}
    unet.load_state_dict(convert_ldm_unet_checkpoint(prefixed, dict(unet.config)))
    return unet.eval()


@pytest.fixture(scope="module")
def model(reference):
    config, _, weights = reference
    return BPSModel.from_original(weights, conditioning_channels=config["condition_channels"])


@torch.no_grad()
def test_every_residual_equals_the_reference(reference, unet, model):
    config, tensors, _ = reference
    time_embedding = unet.time_embedding(unet.time_proj(tensors["in.timestep"]))
    assert relative_error(time_embedding, tensors["out.time_embedding"]) < 1e-5
    steering = model(tensors["in.condition"], time_embedding)
    got = [*steering.down, steering.mid, *steering.up]
    positions = [i for i in range(25) if i not in config["residuals_none_at"]]
    assert len(got) == len(positions) == 21
    for residual, position in zip(got, positions, strict=True):
        assert relative_error(residual, tensors[f"out.residual.{position:02d}"]) < 1e-4, position


@torch.no_grad()
def test_steered_noise_prediction_equals_the_reference(reference, unet, model):
    _, tensors, _ = reference
    inputs = tensors["in.sample"], tensors["in.timestep"], tensors["in.encoder_hidden_states"]
    with steer(unet, model, tensors["in.condition"]):
        steered = unet(*inputs).sample
    assert relative_error(steered, tensors["out.eps"]) < 1e-4
    assert relative_error(unet(*inputs).sample, tensors["out.eps"]) > 0.1
