"""Every control network behind one protocol: what `steer` promises holds for the baselines too."""

import json

import pytest
import torch
from diffusers import ControlNetModel, ControlNetXSAdapter, UNet2DConditionModel, UNetControlNetXSModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import logging

from conftest import build_pipe, randomise
from powersteer import PowersteerError, load_base
from powersteer.adapters.attach import attach, check_fits
from powersteer.adapters.baselines import BASELINES
from powersteer.adapters.baselines._baseline import conditioning_widths
from powersteer.adapters.load import load_network
from powersteer.adapters.registry import make_adapter

KINDS = ("paper", "lite", *BASELINES)


@pytest.fixture(params=KINDS)
def network(request, pipe):
    torch.manual_seed(1)
    return make_adapter(pipe.unet, preset=request.param, pixel_unshuffle=4)


def unet_inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.tensor(500), torch.randn(batch, 6, 24, generator=generator)


def hooks_of(unet):
    return [m for m in unet.modules() if m._forward_hooks or m._forward_pre_hooks]


@torch.no_grad()
def test_untrained_is_exactly_the_prior(pipe, network):
    inputs = unet_inputs()
    before = pipe.unet(*inputs).sample
    with attach(pipe.unet, network, torch.rand(2, 1, 32, 32)):
        assert torch.equal(pipe.unet(*inputs).sample, before)


@torch.no_grad()
def test_on_off_on_and_no_trace(pipe, network):
    inputs, condition = unet_inputs(), torch.rand(2, 1, 32, 32)
    randomise(network)
    before, layout = pipe.unet(*inputs).sample, repr(pipe.unet)
    with attach(pipe.unet, network, condition):
        first = pipe.unet(*inputs).sample
        assert not hooks_of(pipe.unet)  # they are there for the length of a call only
    off = pipe.unet(*inputs).sample
    with attach(pipe.unet, network, condition):
        again = pipe.unet(*inputs).sample
    with attach(pipe.unet, network, 1 - condition):
        other = pipe.unet(*inputs).sample
    assert torch.equal(before, off) and torch.equal(first, again)
    assert (first - before).abs().max() > 1e-2 and (first - other).abs().max() > 1e-4
    assert repr(pipe.unet) == layout and not hooks_of(pipe.unet)
    with pytest.raises(RuntimeError), attach(pipe.unet, network, condition):
        raise RuntimeError
    assert not hooks_of(pipe.unet)


@torch.no_grad()
def test_a_batch_equals_one_by_one_and_guidance_repeats_the_conditions(pipe, network):
    randomise(network)
    sample, timestep, text = unet_inputs(2)
    conditions = torch.rand(2, 1, 32, 32)
    with attach(pipe.unet, network, conditions):
        together = pipe.unet(sample, timestep, text).sample
        halves = pipe.unet(sample.repeat(2, 1, 1, 1), timestep, text.repeat(2, 1, 1)).sample
        by_name = pipe.unet(sample=sample, timestep=timestep, encoder_hidden_states=text).sample
    torch.testing.assert_close(halves, together.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_name, together)
    for i in range(2):
        with attach(pipe.unet, network, conditions[i : i + 1]):
            alone = pipe.unet(sample[i : i + 1], timestep, text[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def gradients(pipe, network):
    pipe.unet.requires_grad_(False)
    network.zero_grad()
    with attach(pipe.unet, network, torch.ones(2, 1, 32, 32).tril()):
        pipe.unet(*unet_inputs()).sample.square().mean().backward()
    assert all(p.grad is None for p in pipe.unet.parameters())
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def test_gradients_reach_the_adapter_and_only_it(pipe, network):
    found = gradients(pipe, randomise(network))
    assert not [name for name, gradient in found.items() if gradient is None or gradient.norm() == 0]


def test_gradient_checkpointing_changes_no_gradient(pipe, network):
    wanted = gradients(pipe, randomise(network))
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    for name, gradient in gradients(pipe, network).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(pipe, network, tmp_path):
    randomise(network).save_pretrained(tmp_path)
    inputs, condition = unet_inputs(), torch.rand(2, 1, 32, 32)
    loaded = load_network(tmp_path)
    assert type(loaded) is type(network) and not loaded.training
    outputs = []
    for one in (network, loaded):
        with attach(pipe.unet, one, condition):
            outputs.append(pipe.unet(*inputs).sample)
    torch.testing.assert_close(*outputs)


@torch.no_grad()
def test_controlnet_is_what_diffusers_makes_of_it(pipe):
    network = randomise(make_adapter(pipe.unet, preset="controlnet", pixel_unshuffle=4))
    (sample, timestep, text), condition = unet_inputs(), torch.rand(2, 3, 32, 32)
    down, mid = network(sample, timestep, text, condition, return_dict=False)
    wanted = pipe.unet(
        sample, timestep, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    with attach(pipe.unet, network, condition):
        torch.testing.assert_close(pipe.unet(sample, timestep, text).sample, wanted)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["conftest", "four levels"])
def test_controlnet_xs_is_diffusers_fused_model(pipe, shape):
    unet = pipe.unet
    if shape == "four levels":  # with transformers from the head on, and a tail without
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=24, attention_head_dim=2
        ).eval()
    adapter = randomise(make_adapter(unet, preset="controlnet-xs", pixel_unshuffle=4))
    fused = UNetControlNetXSModel.from_unet(unet, adapter).eval()
    for name, layer in fused.named_modules():
        if isinstance(layer, ResnetBlock2D) and ("base_" in name or "up_blocks" in name):
            layer.norm1.eps = layer.norm2.eps = 1e-5  # the fused copies forget the U-Net's ε, and the adapter's groups
    for mine, theirs in zip(adapter.down_blocks, fused.down_blocks, strict=True):
        theirs.ctrl_resnets = mine.resnets
        theirs.ctrl_attentions = mine.attentions if mine.attentions is not None else theirs.ctrl_attentions
    (sample, timestep, text), condition = unet_inputs(), torch.rand(2, 3, 32, 32)
    wanted = fused(sample, timestep, text, controlnet_cond=condition).sample
    with attach(unet, adapter, condition):
        found = unet(sample, timestep, text).sample
    assert (wanted - unet(sample, timestep, text).sample).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_t2i_adapter_is_diffusers_own_where_every_level_has_transformers(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=24, attention_head_dim=2
    ).eval()
    network = randomise(make_adapter(unet, preset="t2i-adapter", pixel_unshuffle=4))
    (sample, timestep, text), condition = unet_inputs(), torch.rand(2, 1, 32, 32)
    wanted = unet(sample, timestep, text, down_intrablock_additional_residuals=network(condition)).sample
    with attach(unet, network, condition):
        torch.testing.assert_close(unet(sample, timestep, text).sample, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", BASELINES)
def test_the_embedded_base_whose_time_embedding_holds_the_text(kind):
    unet = load_base().unet
    network = make_adapter(unet, preset=kind, pixel_unshuffle=4)
    sample, text, condition = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 192), torch.rand(2, 1, 64, 64)
    prior = unet(sample, 500, text).sample
    with attach(unet, network, condition):
        assert torch.equal(unet(sample, 500, text).sample, prior)
    with attach(unet, randomise(network), condition):
        assert (unet(sample, 500, text).sample - prior).abs().max() > 1e-3
    if kind == "controlnet":  # the text is pooled as the base pools it
        fresh = make_adapter(unet, preset=kind, pixel_unshuffle=4)
        torch.testing.assert_close(fresh.add_embedding(text), unet.add_embedding(text))


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.rand(3, 1, 32, 32), "3 conditions for a U-Net batch of 4: give 1, 4, or half as many"),
        (torch.rand(1, 1, 16, 16), "the condition is 16×16 pixels, the picture 32×32: resize"),
        (torch.rand(1, 2, 32, 32), r"must have shape \(N, [13], H, W\)"),
        (torch.rand(1, 1, 32, 32) * 255, "did you forget to divide by 255"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(pipe, kind, condition, message):
    network = make_adapter(pipe.unet, preset=kind, pixel_unshuffle=4)
    with pytest.raises(PowersteerError, match=message), attach(pipe.unet, network, condition):
        pipe.unet(*unet_inputs(4))
    assert not hooks_of(pipe.unet)


def test_another_base_is_refused(pipe, tmp_path):
    other = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=24,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    for kind in BASELINES:
        network = make_adapter(pipe.unet, preset=kind, pixel_unshuffle=4)
        message = r"made for a U-Net \(widths 16-32, .*\); this is a U-Net \(widths 8-16, .*\): load the base"
        with pytest.raises(PowersteerError, match=message), attach(other, network, torch.rand(1, 1, 32, 32)):
            pass
    other.register_to_config(layers_per_block=3)
    with pytest.raises(PowersteerError, match="U-Nets of 2 ResNets a level; this has 3"):
        make_adapter(other, preset="controlnet-xs", pixel_unshuffle=4)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_remembers_what_it_was_trained_on(pipe, tmp_path, kind, caplog):
    record = {"kind": "sketch", "channels": 1}
    made = make_adapter(pipe.unet, preset=kind, pixel_unshuffle=4, prediction_type="epsilon", conditioning=record)
    made.save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        network = load_network(tmp_path)
    finally:
        logging.disable_propagation()
    assert "_powersteer" not in caplog.text  # of which diffusers does not warn
    assert network.spec.conditioning == record and network.spec.channels == 1
    check_fits(network, pipe)
    check_fits(network, pipe.unet)  # whose prediction type is not known
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(PowersteerError, match=r"24, epsilon\); this is .* 24, v_prediction\): load that base"):
        check_fits(network, pipe)
    nameless = type(network).from_config({k: v for k, v in network.config.items() if not k.startswith("_")})
    check_fits(nameless, pipe)
    assert nameless.spec.channels == (1 if kind == "t2i-adapter" else 3)


def test_a_damaged_folder_is_refused(pipe, tmp_path):
    make_adapter(pipe.unet, preset="t2i-adapter", pixel_unshuffle=4).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PowersteerError, match=r"cannot load the network in .*a"):
        load_network(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(PowersteerError, match=r"cannot load the network in .*a"):
        load_network(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(PowersteerError, match="is of the class AutoencoderKL, not a BPS network"):
        load_network(tmp_path / "a")


def test_widths_of_the_condition_embedding_follow_the_vae():
    assert conditioning_widths(8) == (16, 32, 96, 256) and conditioning_widths(4) == (16, 32, 96)
    assert isinstance(make_adapter(build_pipe().unet, preset="controlnet"), ControlNetModel)
    assert isinstance(make_adapter(build_pipe().unet, preset="controlnet-xs"), ControlNetXSAdapter)
