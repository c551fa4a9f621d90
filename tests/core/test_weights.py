"""Weights of others: damaged, forged, of another network or not finite. Whatever the file, it is loaded or refused."""

import json
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from authors import authors_names, network
from conftest import build_pipe, randomise
from powersteer import BPSModel, PowersteerError, load_adapter
from powersteer.adapters.bps.convert import convert
from powersteer.adapters.load import load_network
from powersteer.adapters.registry import make_adapter
from powersteer.conditions.extractors import hed
from powersteer.core.weights import check_finite, filled, find_weights, read_tensors, unpickle

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    randomise(BPSModel.from_unet(build_pipe().unet, pixel_unshuffle=4, weights="uniform")).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(adapter, tmp_path):
    """A folder that may be spoilt."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def change_weights(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refusal(load, *args) -> str:
    with pytest.raises(PowersteerError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_that_lacks_a_weight_names_it(copied):
    change_weights(copied, lambda tensors: tensors.pop("down_blocks.0.conv1.weight"))
    for load in (load_adapter, load_network):
        told = refusal(load, str(copied))
        assert WEIGHTS in told and "lacks the weights down_blocks.0.conv1.weight" in told
    assert "lacks the weights down_blocks.0.conv1.weight" in refusal(BPSModel.from_pretrained, copied)


def test_weights_of_another_shape_or_left_over_are_named(copied, adapter):
    change_weights(copied, lambda tensors: tensors.update({"conv_in.bias": torch.ones(3)}))
    told = refusal(load_adapter, str(copied))
    assert "conv_in.bias has the shape 3, its config.json asks for 16" in told
    shutil.copy(adapter / WEIGHTS, copied)
    change_weights(copied, lambda tensors: tensors.update({"conv_in.wings": torch.ones(3)}))
    assert "holds weights that its config.json does not ask for, conv_in.wings" in refusal(load_adapter, str(copied))
    shutil.copy(adapter / WEIGHTS, copied)
    change_config(copied, layers_per_block=[2, 3])
    assert "lacks the weights" in refusal(load_adapter, str(copied))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_wherever_they_come_in(copied, tmp_path, pipe, value):
    change_weights(copied, lambda tensors: tensors["up_outputs.1.bias"].fill_(value))
    for load in (load_adapter, load_network, BPSModel.from_pretrained):
        assert "up_outputs.1.bias holds values that are infinite or no numbers" in refusal(load, str(copied))
    for kind in ("controlnet", "controlnet-xs", "t2i-adapter"):
        baseline = make_adapter(pipe.unet, preset=kind, pixel_unshuffle=4)
        name, parameter = list(baseline.named_parameters())[5]
        parameter.data.flatten()[0] = value
        baseline.save_pretrained(tmp_path / kind)
        assert f"{name} holds values that are infinite" in refusal(load_network, tmp_path / kind)
    state = authors_names(network("sketch"))
    state["zero_blocks.1.bias"] = torch.full_like(state["zero_blocks.1.bias"], value)
    torch.save({"state_dict": state}, tmp_path / "bps.ckpt")
    assert "zero_blocks.1.bias holds values that are" in refusal(convert, tmp_path / "bps.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PowersteerError, match="here: x holds values that are infinite"):
        check_finite({"ids": torch.tensor([1]), "x": torch.tensor([1.0, value], dtype=torch.bfloat16)}, "here")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"conditioning_channels": 10**9}, "'conditioning_channels': Input should be less than or equal to"),
        ({"conditioning_channels": -1}, "'conditioning_channels': Input should be greater than or equal to 1"),
        ({"conditioning_channels": 10**400}, "config.json"),
        ({"block_out_channels": [10**7, 10**7]}, "is no BPSModel (its config.json asks for more memory than there is)"),
        ({"block_out_channels": [16, 64]}, "has the shape"),
        ({"block_out_channels": [16] * 1000}, "'block_out_channels': Tuple should have at most 16 items"),
        ({"block_out_channels": []}, "'block_out_channels': Tuple should have at least 1 item"),
        ({"layers_per_block": [10**9, 2]}, "'layers_per_block.0': Input should be less than or equal to 64"),
        ({"layers_per_block": [2]}, "zip()"),
        ({"layers_per_block": "two"}, "'layers_per_block'"),
        ({"time_embed_dim": 0}, "'time_embed_dim'"),
        ({"attention_head_dim": 3}, "attention_head_dim=3 does not divide the width 16"),
        ({"output_kernel_size": 2}, "'output_kernel_size': Input should be 1, 3, 5 or 7"),
        ({"pixel_unshuffle": 10**6}, "'pixel_unshuffle'"),
        ({"down_weights": "heavy"}, "'down_weights'"),
        ({"dropout": 7}, "'dropout'"),
        ({"conditioning": 5}, "'conditioning'"),
        ({"conditioning": {"kind": ["sketch"]}}, "'conditioning.kind'"),
        ({"conditioning": {"range": [0]}}, "'conditioning.range"),
        ({"base": [1]}, "'base'"),
        ({"base": {"family": "x"}}, "'base.block_out_channels': Field required"),
        ({"base": {"block_out_channels": "wide"}}, "'base.block_out_channels'"),
        ({"_class_name": ["BPSModel"]}, "its config.json is not an adapter's"),
        ({"_class_name": 5}, "its config.json is not an adapter's"),
        ({"_class_name": None}, "its config.json is not an adapter's"),
        ({"_class_name": "DDPMPipeline"}, "is of the class DDPMPipeline, not a BPS network"),
        ({"feathers": 3}, "newer powersteer, with the setting 'feathers'"),
    ],
)
def test_absurd_configs_are_refused_in_a_line_before_anything_is_built(copied, changes, told):
    change_config(copied, **changes)
    for load in (load_adapter, load_network):
        assert told in refusal(load, str(copied))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "", "{", "[]", "5", "\ud800", '{"a": NaN}', "\0"]
)
def test_a_config_that_is_none(copied, content):
    (copied / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    for load in (load_adapter, load_network):
        assert "its config.json is not an adapter's" in refusal(load, str(copied))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_out_channels": [10**9, 10**9]}, "'block_out_channels' is 1000000000, no network is that large"),
        ({"layers_per_block": 10**9}, "'layers_per_block' is 1000000000, no network is that large"),
        ({"block_out_channels": [16, 64]}, "has the shape"),
        ({"norm_num_groups": 0}, "is no ControlNetModel"),
        ({"down_block_types": 7}, "is no ControlNetModel"),
        ({"_powersteer": 5}, "config.json, _powersteer: Input should be a valid dictionary"),
        ({"_powersteer": {"conditioning": 5}}, "'conditioning'"),
        ({"_powersteer": {"base": {"block_out_channels": [-1]}}}, "'base.block_out_channels.0'"),
        ({"wings": 2}, "newer diffusers, with the setting 'wings'"),
    ],
)
def test_absurd_configs_of_a_baseline(pipe, tmp_path, changes, told):
    make_adapter(pipe.unet, preset="controlnet", pixel_unshuffle=4).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    assert told in refusal(load_network, tmp_path)


def test_what_is_no_folder_of_an_adapter(copied, tmp_path):
    assert "is a file: give the folder" in refusal(load_adapter, str(copied / WEIGHTS))
    assert "cannot fetch" in refusal(load_adapter, "a\0b") and "cannot fetch" in refusal(load_network, "x" * 5000)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot fetch" in refusal(load_adapter, str(tmp_path / "loop"))
    (copied / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n")
    assert "is a pointer of Git LFS, not the weights: run `git lfs pull`" in refusal(load_adapter, str(copied))
    (copied / WEIGHTS).unlink()
    assert f"lacks {WEIGHTS}" in refusal(load_adapter, str(copied))


def test_shards_and_the_half_precision_variant_load_as_the_whole(copied):
    model = load_adapter(str(copied))
    (copied / WEIGHTS).unlink()
    model.save_pretrained(copied, max_shard_size="100KB")
    shards = sorted(copied.glob("*-of-*.safetensors"))
    assert len(shards) > 2 and len(find_weights(copied, "diffusion_pytorch_model").files) == len(shards)
    for name, tensor in load_adapter(str(copied)).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    kept = load_file(shards[1])
    lacking = next(iter(kept))
    save_file({k: v for k, v in kept.items() if k != lacking}, shards[1], metadata={"format": "pt"})
    assert f"lacks the weights {lacking}" in refusal(load_adapter, str(copied))
    shards[1].unlink()
    assert f"lacks {shards[1].name}" in refusal(load_adapter, str(copied))
    index = copied / f"{WEIGHTS}.index.json"
    for away in ("../other.safetensors", "/etc/passwd", "a/b"):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": away}}))
        assert f"names a file outside its folder, '{away}'" in refusal(load_adapter, str(copied))
    for nothing in ({}, {"weight_map": 5}, {"weight_map": {}}, {"weight_map": {"a": 5}}):
        index.write_text(json.dumps(nothing))
        assert "names no files of weights" in refusal(load_adapter, str(copied))
    for file in (*copied.glob("*.safetensors"), index):
        file.unlink()
    half = BPSModel.from_config(dict(model.config))
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(copied, variant="fp16")
    loaded = load_adapter(str(copied))
    assert loaded.dtype == torch.float32 and torch.equal(loaded.conv_in.weight, model.conv_in.weight.half().float())


def forged(change):
    """The authors' network after a change."""
    state = authors_names(network("sketch"))
    change(state)
    return state


WIDTH, WIDTHS = "input_blocks.1.in_layers.2.weight", torch.ones(10**9, 0, 3, 3)


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": 5},
        {"state_dict": None},
        {"state_dict": [torch.ones(1)]},
        {"state_dict": {"a": 5}},
        {5: torch.ones(1)},
        forged(lambda state: state.update({"res_weights.1": torch.ones(3)})),
        forged(lambda state: state.update({"res_weights.1": torch.ones(())[None][:0]})),
        forged(lambda state: state.update({"res_weights.99999999999999999999": torch.ones(())})),
        forged(lambda state: state.update({"input_blocks.999999999.op.weight": torch.ones(3)})),
        forged(lambda state: state.update({f"zero_blocks.{'9' * 6000}.weight": torch.ones(3)})),
        forged(lambda state: state.update({"output_blocks.x.0.weight": torch.ones(3)})),
        forged(lambda state: state.update({"input_blocks.7": torch.ones(3)})),
        forged(lambda state: state.update({"middle_block": torch.ones(3)})),
        forged(lambda state: state.update({WIDTH: WIDTHS})),
        forged(lambda state: state.update({WIDTH: torch.ones(1).expand(10**6, 32, 3, 3)})),
        forged(lambda state: state.update({WIDTH: torch.ones(3)})),
        forged(lambda state: state.update({WIDTH: state[WIDTH].to_sparse()})),
        forged(lambda state: state.update({WIDTH: state[WIDTH].to(torch.complex64)})),
        forged(lambda state: state.update({WIDTH: state[WIDTH].to(torch.int64)})),
        forged(lambda state: state.update({WIDTH: state[WIDTH].to("meta")})),
        forged(lambda state: state.update({"input_blocks.0.weight": torch.ones(())})),
        forged(lambda state: state.update({"output_blocks.0.2.conv.weight": torch.ones(7)})),
        forged(lambda state: state.update({"output_blocks.0.3.conv.weight\n": torch.ones(7)})),
        forged(lambda state: state.update({"input_blocks.0.0.weight": state["input_blocks.0.weight"]})),
        forged(
            lambda state: state.update(
                {"middle_block.2.in_layers.2.weight": state["middle_block.1.in_layers.2.weight"]}
            )
        ),
    ],
)
def test_forged_checkpoints_are_refused_in_a_line(tmp_path, state):
    torch.save(state, tmp_path / "forged.ckpt")
    told = refusal(convert, tmp_path / "forged.ckpt", tmp_path / "out")
    assert "forged.ckpt" in told or "the checkpoint" in told
    assert not (tmp_path / "out").exists()


def test_names_of_a_checkpoint_are_shown_in_one_line_and_the_adapter_is_for_all_to_read(tmp_path, caplog):
    """What the method does not use may have any name."""
    others = {
        "time_embed.\u00b2.x": torch.ones(2),
        f"time_embed.{'9' * 6000}.x": torch.ones(2),
        "a\x1b[31m\n.x": torch.ones(2),
    }
    state = forged(lambda state: state.update(others | {"output_blocks.0.3.conv.weight": torch.ones(7)}))
    torch.save(state, tmp_path / "bps.ckpt")
    folder = convert(tmp_path / "bps.ckpt", tmp_path / "out", norm_num_groups=16)
    told = caplog.records[-1].getMessage()
    assert "dropped" in told and "output_blocks.0" in told and told.isprintable()
    config, weights = (folder / name for name in ("config.json", WEIGHTS))
    assert config.stat().st_mode == weights.stat().st_mode
    assert load_adapter(str(folder)).config["down_weights"] == [16.0, 8.0]


@pytest.mark.parametrize("key", ["conditioning_channels", "unshuffle", "attention_head_dim", "norm_num_groups"])
@pytest.mark.parametrize("value", [0, -1, 10**30])
def test_numbers_that_convert_cannot_mean(tmp_path, key, value):
    torch.save(authors_names(network("sketch")), tmp_path / "bps.ckpt")
    told = refusal(lambda: convert(tmp_path / "bps.ckpt", tmp_path / "out", **{key: value}))
    assert f"the checkpoint's shape: '{key}': " in told


def test_places_that_convert_cannot_read_or_write(tmp_path, monkeypatch):
    source = tmp_path / "bps.ckpt"
    torch.save(authors_names(network("sketch")), source)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path, tmp_path / "none", Path("a\0b"), Path("x" * 5000), tmp_path / "loop"):
        assert "is no file: give a .ckpt, .pt or .safetensors" in refusal(convert, place, tmp_path / "out")
    for place in (source, source / "in", Path("a\0b"), tmp_path / ("x" * 300), tmp_path / "loop" / "in"):
        told = refusal(lambda place=place: convert(source, place, norm_num_groups=16))
        assert told.startswith(f"cannot write to {place}")
    # A disk that is full when the weights are written, which safetensors tells with an error of its own.
    monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", _full)
    assert "No space left" in refusal(lambda: convert(source, tmp_path / "full", norm_num_groups=16))
    assert not (tmp_path / "full" / "config.json").exists()
    monkeypatch.undo()
    convert(source, tmp_path / "full", norm_num_groups=16)  # what was left there does not pass for an adapter
    assert load_adapter(str(tmp_path / "full")).config["norm_num_groups"] == 16


def _full(*_, **__):
    raise Exception("I/O error: No space left on device (os error 28)")


def spoilt(content: bytes, count: int, seed: int):
    """Copies of a file with bytes changed, most of them near its beginning or its end, or cut short."""
    chance = random.Random(seed)
    for i in range(count):
        copy = bytearray(content)
        if i % 4 == 0:
            del copy[chance.randrange(len(copy)) :]
        else:
            for _ in range(chance.choice((1, 1, 2, 8, 64))):
                near = min(len(copy), chance.choice((16, 256, 4096, len(copy))))
                place = chance.randrange(near)
                copy[place if i % 3 else len(copy) - 1 - place] = chance.randrange(256)
        yield bytes(copy)


def outcomes(file: Path, load, count: int, seed: int) -> dict[str, int]:
    """How often a spoilt copy of a file is loaded and how often refused; any other end is an error."""
    content, ends = file.read_bytes(), {"loaded": 0, "refused": 0}
    for copy in spoilt(content, count, seed):
        file.write_bytes(copy)
        try:
            loaded = load()
            assert all(bool(tensor.isfinite().all()) for tensor in loaded.state_dict().values())
            ends["loaded"] += 1
        except PowersteerError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            ends["refused"] += 1
    file.write_bytes(content)
    return ends


def small_network() -> BPSModel:
    shape = {"block_out_channels": (8, 16), "layers_per_block": (1, 1), "down_weights": (2.0, 1.0)}
    return randomise(BPSModel(1, 2, time_embed_dim=8, norm_num_groups=4, **shape))


def test_200_spoilt_weights_of_an_adapter(tmp_path):
    small_network().save_pretrained(tmp_path)
    ends = outcomes(tmp_path / WEIGHTS, lambda: load_adapter(str(tmp_path)), 200, seed=0)
    assert ends["refused"] > 100 and ends["loaded"] > 10, ends  # a byte of a number is no fault that one can see


def test_200_spoilt_configs_of_an_adapter(copied):
    ends = outcomes(copied / "config.json", lambda: load_network(str(copied)), 200, seed=1)
    assert ends["refused"] > 100, ends


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_200_spoilt_checkpoints_of_the_authors(tmp_path, suffix):
    file = tmp_path / f"bps{suffix}"
    state = {name: tensor.clone().contiguous() for name, tensor in authors_names(small_network()).items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    shape = {"conditioning_channels": 1, "unshuffle": 2, "norm_num_groups": 4}
    ends = outcomes(file, lambda: BPSModel.from_original(file, **shape), 200, seed=2)
    assert ends["refused"] > 100, ends


@pytest.fixture
def small_hed(monkeypatch, tmp_path):
    """HED of a few channels, in Keras's format."""
    monkeypatch.setattr(hed, "BLOCKS", ((4, 2), (4, 2), (8, 3), (8, 3), (8, 3)))
    with h5py.File(tmp_path / "hed.weights.h5", "w") as file:
        for name, (out, read, side) in hed_layers().items():
            file[f"{name}/vars/0"] = np.full((side, side, read, out), 0.1, dtype=np.float32)
            file[f"{name}/vars/1"] = np.zeros(out, dtype=np.float32)
    return tmp_path / "hed.weights.h5"


def hed_layers():
    layers, read = {"fuse": (1, 5, 1)}, 3
    for i, (width, depth) in enumerate(hed.BLOCKS, 1):
        layers[f"dsn{i}"] = (1, width, 1)
        for j in range(depth):
            layers[f"block{i}/layers/conv2d{f'_{j}' if j else ''}"] = (width, read, 3)
            read = width
    return layers


def test_200_spoilt_weights_of_hed(small_hed):
    assert hed.HEDNetwork.from_keras(small_hed).fuse.weight.flatten().tolist() == pytest.approx([0.1] * 5)
    ends = outcomes(small_hed, lambda: hed.HEDNetwork.from_keras(small_hed), 200, seed=3)
    assert ends["refused"] > 20, ends


def test_immense_foreign_or_broken_datasets_of_hed(small_hed, tmp_path):
    def immense(file):
        file.create_dataset("fuse/vars/0", shape=(10**9, 10**9), dtype="f4", chunks=(1024, 1024))

    def immense_kind(file):
        file.create_dataset("fuse/vars/0", shape=(1, 1, 5, 1), dtype="S1000000")

    def group(file):
        file.create_group("fuse/vars/0")

    def elsewhere(file):
        file["fuse/vars/0"] = h5py.ExternalLink("/etc/hostname", "/x")

    def not_finite(file):
        file["fuse/vars/0"] = np.full((1, 1, 5, 1), np.nan, dtype=np.float32)

    def nothing(_):
        pass

    for change in (immense, immense_kind, group, elsewhere, not_finite, nothing):
        copy = Path(shutil.copy(small_hed, tmp_path / "copy.h5"))
        with h5py.File(copy, "a") as file:
            del file["fuse/vars/0"]
            change(file)
        told = refusal(hed.HEDNetwork.from_keras, copy)
        assert "copy.h5 does not hold HED's weights" in told or "fuse.weight holds values that are" in told
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path, Path("a\0b"), tmp_path / "loop"):
        assert "does not hold HED's weights" in refusal(hed.HEDNetwork.from_keras, place)


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2))


def test_files_of_tensors_are_read_or_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    for dtype, told in ((torch.int32, "a holds int32, no weights"), (torch.complex64, "a holds complex64, no weights")):
        state = {"a": torch.ones(2, dtype=dtype)}
        assert told in refusal(lambda state=state: filled(Named, state, "here"))
    assert filled(Named, {"a": torch.ones(2)}, "here").a.tolist() == [1, 1]
    torch.save({"a": 1}, tmp_path / "a.pt")
    assert unpickle(tmp_path / "a.pt") == {"a": 1}
    for place in (tmp_path, tmp_path / "none.pt", Path("a\0b.pt")):
        assert "is truncated or no checkpoint" in refusal(unpickle, place)


def test_a_narrow_unet_of_xl_gets_heads_that_fit(pipe):
    unet = ControlNetModel(  # any network of diffusers that has what BPS reads of a U-Net
        block_out_channels=(32, 48), down_block_types=("DownBlock2D",) * 2, norm_num_groups=16
    )
    unet.register_to_config(addition_embed_type="text_time")
    model = BPSModel.from_unet(unet)
    assert model.config["attention_head_dim"] == 16
    steering = model(torch.rand(1, 1, 64, 64), torch.randn(1, model.config["time_embed_dim"]))
    assert steering.mid.shape == (1, 48, 4, 4)
