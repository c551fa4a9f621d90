"""The authors' checkpoints in every form they come in: names, prefixes, files, variants, and what is none of them."""

import json
import logging
import pickle

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from authors import VARIANTS, authors_names, network
from powersteer import BPSModel, PowersteerError
from powersteer.apps.cli import app


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back(variant):
    model = network(variant)
    arguments = {
        "conditioning_channels": model.config["conditioning_channels"],
        "unshuffle": model.config["pixel_unshuffle"],
        "attention_head_dim": 16,
        "norm_num_groups": 16,
    }
    got = BPSModel.from_original(authors_names(model), **arguments)
    assert {k: v for k, v in got.config.items() if not k.startswith("_")} == {
        k: list(v) if isinstance(v, tuple) and k not in got.config else v
        for k, v in model.config.items()
        if not k.startswith("_")
    }
    side = 8 * model.config["pixel_unshuffle"]
    condition, time_embedding = torch.rand(2, model.config["conditioning_channels"], side, side), torch.randn(2, 48)
    wanted, steering = model(condition, time_embedding), got(condition, time_embedding)
    for ours, theirs in zip(
        [*steering.down, steering.mid, *steering.up], [*wanted.down, wanted.mid, *wanted.up], strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "control_model.", "model.diffusion_model.control_model.", "my.own."])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_files_under_any_prefix_whole_or_alone(tmp_path, prefix, suffix, caplog):
    model = network("sketch")
    state = {prefix + name: tensor.contiguous() for name, tensor in authors_names(model).items()}
    state["first_stage_model.decoder.weight"] = torch.ones(3)
    path = tmp_path / f"bps{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 16, "hyper_parameters": {"lr": 1e-5}}, path)
    with caplog.at_level(logging.WARNING):
        got = BPSModel.from_original(path, conditioning_channels=1, norm_num_groups=16)
    assert got.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert len(caplog.records) == 1 and "zero_blocks.0, zero_blocks.3" in caplog.text


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def refused(source, match, **arguments):
    with pytest.raises(PowersteerError, match=match) as error:
        BPSModel.from_original(source, **({"conditioning_channels": 1} | arguments))
    assert "\n" not in str(error.value)


def test_a_pickle_with_code_is_not_opened(tmp_path, capsys):
    torch.save({"state_dict": authors_names(network("sketch")), "hook": Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path / "evil.ckpt", "code that would run on loading")
    refused(tmp_path / "bare.pt", "code that would run on loading|no checkpoint")
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"short{suffix}"
    state = {name: tensor.clone().contiguous() for name, tensor in authors_names(network("sketch")).items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    for share in (0.0, 0.3, 0.95):
        path.write_bytes(content[: int(share * len(content))])
        refused(path, r"short\.\w+ is truncated or no checkpoint|short\.\w+ is no checkpoint")


def test_what_is_no_bps_network(tmp_path):
    state = authors_names(network("sketch"))
    controlnet = ControlNetModel(block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, norm_num_groups=16)
    refused({f"zero_convs.{k}": v for k, v in controlnet.state_dict().items()}, "this is a ControlNet")
    refused({"a.weight": torch.ones(2)}, "holds no BPS network")
    refused(tmp_path / "nothing.ckpt", "is no file")
    (tmp_path / "text.ckpt").write_text("hello")
    refused(tmp_path / "text.ckpt", "no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds a list, not a state dict")
    refused(state, "3 conditioning channels unshuffled by 8 are 192", conditioning_channels=3)
    refused({"a." + k: v for k, v in state.items()} | state, "several BPS networks")
    refused({k: v for k, v in state.items() if not k.startswith("middle_block")}, r"has no middle_block\.\*")
    refused({k: v for k, v in state.items() if k != "output_blocks.0.0.out_layers.3.weight"}, "not those of one BPS")


def test_convert_writes_an_adapter(tmp_path):
    model = network("layout, uniform weights")
    torch.save({"state_dict": authors_names(model)}, tmp_path / "bps.ckpt")
    arguments = ["convert", str(tmp_path / "bps.ckpt"), str(tmp_path / "out"), "--conditioning-channels", "3"]
    result = CliRunner().invoke(app, [*arguments, "--norm-num-groups", "16", "--kind", "layout"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["conditioning"]["kind"] == "layout" and config["down_weights"] == [1.0, 1.0]
    got = BPSModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(got.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(CliRunner().invoke(app, arguments).exception, PowersteerError)  # an adapter is there already
