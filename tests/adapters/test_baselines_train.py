"""The very same loop trains every network: same batches, noise and prompts; what it saves loads again."""

import json
import shutil

import pytest
import torch

from conftest import build_pipe
from powersteer import BPSModel, PowersteerError
from powersteer.adapters.attach import attach
from powersteer.adapters.baselines import BASELINES
from powersteer.adapters.baselines.controlnet import WithoutLatents
from powersteer.adapters.bps.ablations import AddedOnce, ConditionalHalf, WithoutTime
from powersteer.adapters.load import load_network
from powersteer.adapters.registry import class_of, make_adapter
from powersteer.backbones.load import load_base
from powersteer.backbones.protocol import backbone_of
from powersteer.core.config import build_config
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs
from powersteer.denoising.heldout import HeldOut
from powersteer.training.config import TrainConfig
from powersteer.training.dry_run import dry_run
from powersteer.training.optimizer import make_optimizer
from powersteer.training.run import train


def rows_of(config):
    return [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_trains_saves_and_resumes(config, tmp_path, kind):
    change = {"network": kind, "weights": "head-heavy", "validation_steps": 8, "ema_decay": 0.9, "learning_rate": 2e-3}
    config = config.model_copy(update=change)
    result = train(config)
    rows = rows_of(config)
    assert rows[0]["steered"] == rows[0]["prior"]  # step 0 is the prior
    assert rows[-1]["steered"] < rows[0]["prior"] and result.best_step == 8
    pipe = load_base(config.pretrained_model_name_or_path)
    held_out = HeldOut(pipe, encode_pairs(pipe, Pairs(config.validation_data_dir, (32, 32)), config.cache_dir))
    kept = held_out.losses(load_network(config.output_dir)).mean().item()
    assert kept == pytest.approx(rows[-1]["steered"], rel=1e-5)
    # A run that goes on is the run that was never stopped.
    other = config.model_copy(update={"output_dir": tmp_path / "other"})
    shutil.copytree(config.output_dir / "checkpoint-4", other.output_dir / "checkpoint-4")
    train(other)
    resumed = load_network(other.output_dir / "checkpoint-8").state_dict()
    for name, tensor in load_network(config.output_dir / "checkpoint-8").state_dict().items():
        assert torch.equal(resumed[name], tensor)
    start = {"init_from": str(config.output_dir), "output_dir": tmp_path / "on", "max_train_steps": 1}
    train(config.model_copy(update=start))
    first = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])
    assert first["steered"] == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("kind", BASELINES)
def test_dry_run_counts_a_baseline(config, kind):
    plan = dry_run(config.model_copy(update={"network": kind, "weights": "head-heavy"}))
    network = make_adapter(build_pipe().unet, preset=kind, pixel_unshuffle=4)
    assert plan.facts["trainable_parameters"] == sum(p.numel() for p in network.parameters())
    assert plan.memory.rows["gradients"] == 4 * plan.facts["trainable_parameters"]
    assert plan.memory.rows["activations"] > 0 and "residuals" not in plan.facts


@pytest.mark.parametrize("ablation", ["no-time", "added-once", "conditional-half"])
def test_an_ablation_trains_and_loads_as_what_it_is(config, ablation):
    config = config.model_copy(update={"ablation": ablation, "max_train_steps": 2, "validation_steps": 2})
    train(config)
    assert type(load_network(config.output_dir)) is class_of("paper", ablation, build_pipe().unet)
    assert rows_of(config)[0]["steered"] == rows_of(config)[0]["prior"]


@pytest.mark.parametrize("network", ["paper", "controlnet", "t2i-adapter"])
def test_a_blind_network_learns_and_no_condition_moves_it(config, pipe, network):
    change = {"network": network, "weights": "head-heavy", "ablation": "blind", "ema_decay": None}
    config = config.model_copy(update={**change, "learning_rate": 2e-3, "max_train_steps": 4, "validation_steps": 4})
    train(config)
    last = rows_of(config)[-1]
    assert last["steered"] != last["prior"] and last["steered"] == last["shuffled"]
    kept = load_network(config.output_dir)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 6, 24)
    with torch.no_grad():
        guesses = []
        for condition in (torch.rand(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)):
            with attach(pipe.unet, kept, condition):
                guesses.append(pipe.unet(*inputs).sample)
        assert torch.equal(*guesses)


def test_controlnet_without_latents_learns_and_its_residuals_do_not_know_them(config, pipe):
    change = {"network": "controlnet", "weights": "head-heavy", "ablation": "no-latents", "ema_decay": None}
    config = config.model_copy(update={**change, "learning_rate": 2e-3, "max_train_steps": 4, "validation_steps": 4})
    train(config)
    rows = rows_of(config)
    assert rows[0]["steered"] == rows[0]["prior"] and rows[-1]["steered"] not in (
        rows[-1]["prior"],
        rows[-1]["shuffled"],
    )
    kept = load_network(config.output_dir)
    assert type(kept) is WithoutLatents
    added = []
    with torch.no_grad():
        for latents in torch.randn(2, 1, 4, 8, 8):
            with attach(pipe.unet, kept, torch.full((1, 1, 32, 32), 0.5)):
                catch = pipe.unet.register_forward_pre_hook(
                    lambda _, __, kwargs: added.append(kwargs["mid_block_additional_residual"]), with_kwargs=True
                )
                pipe.unet(latents, 500, torch.zeros(1, 6, 24))
                catch.remove()
    assert torch.equal(*added) and added[0].abs().max() > 0


@torch.no_grad()
def test_ablations_leave_out_what_they_say(pipe, model):
    condition, embedding = torch.rand(1, 1, 32, 32), torch.randn(1, 64)
    timeless = WithoutTime.from_config(model.config)
    timeless.load_state_dict(model.state_dict())
    for one, other in zip(timeless(condition, embedding).down, timeless(condition, -embedding).down, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(timeless(condition, embedding).mid, model(condition, 0 * embedding).mid)
    # Once a position, and last: transformers where there are some, and the middle block's second ResNet.
    unet, backbone = pipe.unet, backbone_of(pipe.unet)
    once = AddedOnce.from_config(model.config)
    last = list(once.sites(backbone))
    assert [position for position, _ in last] == sorted({position for position, _ in backbone.sites()})
    wanted = [*unet.down_blocks[0].resnets, *unet.down_blocks[1].attentions, unet.mid_block.resnets[1]]
    wanted += [*unet.up_blocks[0].attentions, *unet.up_blocks[1].resnets]
    assert [id(layer) for _, layer in last] == [id(layer) for layer in wanted]
    once.load_state_dict(model.state_dict())
    steering = model(condition, unet.time_embedding(unet.time_proj(torch.tensor([500]))))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 6, 24)
    with attach(unet, once, condition):
        found = unet(*inputs).sample
    residuals = [*steering.down, steering.mid, *steering.up]
    for layer, residual in zip(wanted, residuals, strict=True):
        layer.register_forward_hook(
            lambda _, __, out, r=residual: out + r if isinstance(out, torch.Tensor) else (out[0] + r,)
        )
    torch.testing.assert_close(unet(*inputs).sample, found)


@torch.no_grad()
def test_the_conditional_half_alone_is_steered_and_without_guidance_all_is(pipe, model):
    half = ConditionalHalf.from_config(model.config)
    half.load_state_dict(model.state_dict())
    conditions, timestep = torch.rand(2, 1, 32, 32), torch.tensor(500)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(4, 6, 24)
    prior = pipe.unet(sample, timestep, text[:2]).sample
    with attach(pipe.unet, model, conditions):
        steered = pipe.unet(sample, timestep, text[2:]).sample
    with attach(pipe.unet, half, conditions):
        guided = pipe.unet(sample.repeat(2, 1, 1, 1), timestep, text).sample
        alone = pipe.unet(sample, timestep, text[2:]).sample
    torch.testing.assert_close(guided, torch.cat([prior, steered]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone, steered)
    assert (steered - prior).abs().max() > 1e-2


def test_ports_have_rates_in_place_of_weights(config, pipe):
    config = config.model_copy(update={"port_learning_rates": "head-heavy", "learning_rate": 1e-3})
    network = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform")
    rates = {}
    for group in make_optimizer(config, network).param_groups:
        rates |= {id(parameter): (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in network.parameters())
    weights = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4).weights.tolist()  # head-heavy: 4, 4, 2, 2, 4, 1, …
    ports = [*network.down_outputs, network.mid_output, *network.up_outputs]
    for port, weight in zip(ports, weights, strict=True):
        assert rates[id(port.weight)] == rates[id(port.bias)] == pytest.approx((1e-3 * weight, 0.01 / weight))
    assert rates[id(network.conv_in.weight)] == (1e-3, 0.01)


def test_what_a_weight_of_sixteen_does_a_rate_of_sixteen_does_too(config, tmp_path):
    """One AdamW step from zero moves an output by rate × weight, whichever of the two holds the factor."""
    start = {
        "max_train_steps": 1,
        "validation_steps": 1,
        "ema_decay": None,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-4,
        "adam_epsilon": 1e-16,  # some gradients are as small as the usual one
    }
    heavy = config.model_copy(update={**start, "weights": "head-heavy", "output_dir": tmp_path / "heavy"})
    rates = config.model_copy(update={**start, "port_learning_rates": "head-heavy", "output_dir": tmp_path / "rates"})
    for run in (heavy, rates):
        train(run)
    one, other = (load_network(run.output_dir / "checkpoint-1") for run in (heavy, rates))
    for index in range(4):
        moved = one.weights[index] * one.down_outputs[index].weight
        torch.testing.assert_close(other.down_outputs[index].weight, moved, atol=1e-5, rtol=1e-3)


def test_bps_keys_are_refused_for_a_baseline(tmp_path):
    given = {"train_data_dir": "pairs", "output_dir": "run", "network": "controlnet"}
    for override in ("weights=uniform", "ablation=no-time", "trainable_weights=true", "hidden_channels=[8,8]"):
        name = override.partition("=")[0]
        with pytest.raises(PowersteerError, match=f"{name} is BPS's own: leave it out for network=controlnet"):
            build_config(dict(given), TrainConfig, [override])
    with pytest.raises(PowersteerError, match="no-latents is ControlNet's own: leave it out for network=lite"):
        build_config({**given, "network": "lite"}, TrainConfig, ["ablation=no-latents"])
    config = build_config({**given, "network": "lite"}, TrainConfig, ["up_channels=[8,16]", "trainable_weights=true"])
    assert config.up_channels == (8, 16)
