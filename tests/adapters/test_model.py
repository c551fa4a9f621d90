import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from conftest import randomise
from powersteer import BPSModel
from powersteer.adapters.bps.model import LightBlock, SelfAttention, TimeResBlock
from powersteer.adapters.bps.presets import integration_weights


def test_untrained_network_adds_exactly_nothing(pipe):
    model = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4)
    steering = model(torch.rand(2, 1, 32, 32), torch.randn(2, 64))
    assert all(residual.abs().max() == 0 for residual in [*steering.down, steering.mid, *steering.up])


def test_residuals_have_the_shapes_of_the_unets_resnets(pipe, model):
    outputs = {}
    for name, layer in pipe.unet.named_modules():
        if type(layer).__name__ == "ResnetBlock2D":
            layer.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out.shape}))
    pipe.unet(torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 24))
    steering = model(torch.rand(2, 1, 32, 32), torch.randn(2, 64))
    for part, got in (("down_blocks", steering.down), ("up_blocks", steering.up)):
        assert [r.shape for r in got] == [s for n, s in outputs.items() if n.startswith(part)]
    assert steering.mid.shape == outputs["mid_block.resnets.0"]


@pytest.mark.parametrize(
    ("preset", "levels", "wanted"),
    [
        ("head-heavy", 4, ((16, 8, 4, 2), 16, 1)),
        ("head-heavy", 3, ((32, 16, 8), 32, 1)),
        ("uniform", 4, ((1, 1, 1, 1), 1, 1)),
    ],
)
def test_steering_table(preset, levels, wanted):
    assert integration_weights(preset, levels) == wanted


def test_integration_weights_scale_the_residuals(pipe):
    heavy = randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights=[6.0, 5.0, 4.0, 3.0]))
    plain = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform").eval()
    weights = {n: p for n, p in heavy.state_dict().items() if n != "weights"}
    plain.load_state_dict(weights, strict=False)
    inputs = torch.rand(1, 1, 32, 32), torch.randn(1, 64)
    got, unit = heavy(*inputs), plain(*inputs)
    for residual, base, weight in zip(
        [*got.down, got.mid, *got.up],
        [*unit.down, unit.mid, *unit.up],
        [6, 6, 5, 5, 4, *[3] * 6],
        strict=True,
    ):
        torch.testing.assert_close(residual, weight * base)


def test_parameter_count_at_stable_diffusion_shape_is_the_papers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        model = BPSModel.from_unet(unet)
    count = {
        "cp and in": [model.conv_in, model.down_blocks, model.downsamplers],
        "ep": [model.up_blocks, model.up_outputs, model.upsamplers],
        "tp": [model.mid_blocks],
    }
    millions = {part: sum(p.numel() for m in ms for p in m.parameters()) / 1e6 for part, ms in count.items()}
    assert millions["cp and in"] == pytest.approx(165.8, abs=0.05)
    assert millions["ep"] == pytest.approx(357.8, abs=0.05)
    assert millions["tp"] == pytest.approx(65.6, abs=0.05)
    # 692.4 M with the output convolutions that are never used: those of conv_in and of three stride-2 convs.
    unused = sum(9 * w * w + w for w in (320, 320, 640, 1280)) / 1e6
    assert sum(p.numel() for p in model.parameters()) / 1e6 + unused == pytest.approx(692.4, abs=0.05)


def test_time_block_matches_its_formula():
    torch.manual_seed(0)
    block = randomise(TimeResBlock(8, 16, 12, 4, 0.0))
    x, time = torch.randn(2, 8, 5, 5), torch.randn(2, 12)
    norm = torch.nn.functional.group_norm
    h = block.conv1(torch.nn.functional.silu(norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-5)))
    scale, shift = block.time_emb_proj(torch.nn.functional.silu(time)).split(16, 1)
    h = norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-5) * (1 + scale[..., None, None]) + shift[..., None, None]
    wanted = block.conv_shortcut(x) + block.conv2(torch.nn.functional.silu(h))
    torch.testing.assert_close(block(x, time), wanted)


def test_light_block_keeps_its_input_at_step_zero():
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(LightBlock(8, 8, 4, 0.0)(x), x)


def test_attention_equals_torchs_own():
    torch.manual_seed(0)
    attention = randomise(SelfAttention(16, 8, 4))
    peer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    # torch keeps q, k, v of all heads together; here each head keeps its own three.
    rows = torch.arange(48).view(2, 3, 8).transpose(0, 1).flatten()
    peer.in_proj_weight.data = attention.to_qkv.weight.data[rows, :, 0, 0]
    peer.in_proj_bias.data = attention.to_qkv.bias.data[rows]
    peer.out_proj.weight.data = attention.to_out.weight.data[:, :, 0, 0]
    peer.out_proj.bias.data = attention.to_out.bias.data
    x = torch.randn(2, 16, 3, 5)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    wanted = x + peer(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(attention(x), wanted, atol=1e-5, rtol=1e-5)


def test_odd_sizes_come_back_to_the_skips(pipe, model):
    steering = model(torch.rand(1, 1, 20, 28), torch.randn(1, 64))  # latents 5×7
    assert [tuple(r.shape[-2:]) for r in steering.down] == [(5, 7), (5, 7), (3, 4), (3, 4)]
    assert tuple(steering.up[-1].shape[-2:]) == (5, 7)


def test_save_and_load_give_the_same_network(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    loaded = BPSModel.from_pretrained(tmp_path)
    assert json.loads(loaded.to_json_string()) | {"_name_or_path": ""} == json.loads(model.to_json_string()) | {
        "_name_or_path": ""
    }
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    inputs = torch.rand(1, 1, 32, 32), torch.randn(1, 64)
    for a, b in zip(model(*inputs).up, loaded(*inputs).up, strict=True):
        torch.testing.assert_close(a, b)  # a kernel may round otherwise where tensors lie otherwise in memory


def test_integration_weights_are_trained_only_on_request(pipe):
    assert not BPSModel.from_unet(pipe.unet).weights.requires_grad
    assert BPSModel.from_unet(pipe.unet, trainable_weights=True).weights.requires_grad


def test_wrong_number_of_weights_is_refused(pipe):
    with pytest.raises(ValueError, match="3 numbers; 2 levels, TP and EP need 4"):
        BPSModel.from_unet(pipe.unet, weights=[1.0, 2.0, 3.0])
