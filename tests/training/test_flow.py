"""A base of flow matching, from its own training to an adapter's, resumed, measured and sampled."""

import json
import os
import signal

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from conftest import build_pipe, draw_pairs
from powersteer import BPSModel, PowersteerError, load_base
from powersteer.backbones.protocol import base_of
from powersteer.core.config import build_config
from powersteer.data.encode import conditions_of, encode_pairs
from powersteer.data.pairs import Pairs
from powersteer.denoising.heldout import HeldOut
from powersteer.denoising.objective import objective_of
from powersteer.denoising.sampling.sample import make_scheduler, steered_pictures
from powersteer.denoising.step import Batch, denoiser, predict, squared_errors
from powersteer.evaluation.information import denoiser_errors, measure_information
from powersteer.training import loop
from powersteer.training.config import TrainConfig
from powersteer.training.dry_run import dry_run
from powersteer.training.run import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flow_dir(tmp_path_factory):
    """A tiny base that learned its prior by flow matching."""
    folder = tmp_path_factory.mktemp("flow")
    pipe = build_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pairs = encode_pairs(pipe, Pairs(draw_pairs(folder / "pairs", 16), (32, 32)))
    samples = [pairs[i, 0] for i in range(16)]
    latents, texts = pairs.latents(samples), pairs.texts([sample.texts[0] for sample in samples])
    objective, unet = objective_of(pipe.scheduler), pipe.unet
    sampler, generator = objective.sampler(0.0, "logit_normal"), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    before = HeldOut(pipe, pairs).losses(None).mean()
    for _ in range(40):
        noise = torch.randn(latents.shape, generator=generator)
        batch = Batch.of(base_of(pipe), latents, noise, sampler(len(latents), generator), texts)
        prediction = predict(denoiser(unet), objective, batch, unet.device, unet.dtype)
        squared_errors(objective, prediction, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert HeldOut(pipe, pairs).losses(None).mean() < 0.8 * before
    pipe.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture
def flow(config, flow_dir):
    return config.model_copy(update={"pretrained_model_name_or_path": str(flow_dir), "ema_decay": 0.9})


def log_of(config):
    rows = [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(folder):
    return BPSModel.from_pretrained(folder).state_dict()


def test_an_adapter_learns_by_flow_matching_and_the_bases_scheduler_samples_it(flow):
    more = {
        "max_train_steps": 60,
        "validation_steps": 20,
        "num_validation_images": 1,
        "weighting_scheme": "logit_normal",
    }
    flow = flow.model_copy(update=more)
    plan = dry_run(flow)
    assert plan.facts["optimizer_updates"] == 60 and plan.config["weighting_scheme"] == "logit_normal"
    result = train(flow)
    rows = log_of(flow)
    assert rows[0]["steered"] == rows[0]["prior"] and result.best_step > 0
    assert min(row["steered"] for row in rows) < 0.97 * rows[0]["prior"]
    assert list(rows[0]["bands"]) == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    assert len(list((flow.output_dir / "validation").iterdir())) == 2
    network = BPSModel.from_pretrained(flow.output_dir)
    assert network.config["base"]["prediction_type"] == "flow_prediction"
    pipe = load_base(flow.pretrained_model_name_or_path)
    pairs = encode_pairs(pipe, Pairs(flow.validation_data_dir, (32, 32)))
    condition = conditions_of([pairs[0, 0]])
    given = {"seeds": [0], "num_inference_steps": 4, "output_type": "pt"}
    prior, steered = (steered_pictures(pipe, model, ["a fox"], condition, **given) for model in (None, network))
    assert steered.isfinite().all() and not torch.equal(prior, steered)
    found = measure_information(denoiser_errors(pipe, network, pairs), objective_of(pipe.scheduler), 6, draws=4)
    assert found.steered.mean > 0 and found.bands[0][0] < -6 and found.bands[-1][1] > 6


@torch.no_grad()
def test_the_held_out_loss_of_flow_matching_is_what_is_computed_by_hand(flow_dir, pairs_dir):
    pipe = load_base(str(flow_dir))
    pairs = encode_pairs(pipe, Pairs(pairs_dir, (32, 32), limit=4))
    held_out = HeldOut(pipe, pairs, draws=4)
    band, place = 2, 3
    t, latents = held_out.times[band, place], pairs.latents([pairs[place, 0]])[0]
    assert 0.5 <= t < 0.75
    epsilon = held_out.noise(band, place, tuple(latents.shape))
    noisy = (1 - t) * latents + t * epsilon
    velocity = pipe.unet(noisy[None], 1000 * t, pairs.texts(["a fox"])["encoder_hidden_states"]).sample
    wanted = (velocity - (epsilon - latents)).square().mean()
    torch.testing.assert_close(held_out.losses(None)[band, place], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [{}, {"weighting_scheme": "logit_normal", "log_snr_share": 0.4, "snr_gamma": 5.0}])
def test_a_resumed_run_of_flow_matching_equals_the_uninterrupted_one(flow, tmp_path, monkeypatch, change):
    flow = flow.model_copy(update={"dropout": 0.1, **change})
    train(flow)
    other = flow.model_copy(update={"output_dir": tmp_path / "other"})
    real, calls = loop.squared_errors, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop, "squared_errors", interrupting)
    assert train(other).step == 6
    monkeypatch.undo()
    assert train(other).step == 8
    for folder in (".", "checkpoint-8"):
        wanted, got = weights(flow.output_dir / folder), weights(other.output_dir / folder)
        assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())
    assert log_of(flow) == log_of(other)


def test_how_times_are_drawn_and_the_shift_belong_to_a_run(flow, tmp_path):
    flow = flow.model_copy(update={"max_train_steps": 2})
    train(flow)
    with pytest.raises(PowersteerError, match="weighting_scheme was none, now logit_normal"):
        train(flow.model_copy(update={"weighting_scheme": "logit_normal", "max_train_steps": 4}))
    pipe = load_base(flow.pretrained_model_name_or_path)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.save_pretrained(tmp_path / "unshifted")
    with pytest.raises(PowersteerError, match=r"pretrained_model_name_or_path was .*, now .*unshifted"):
        train(flow.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / "unshifted")}))


def test_what_is_flow_matchings_alone_is_refused_elsewhere(config, flow_dir):
    config = config.model_copy(update={"weighting_scheme": "logit_normal"})
    for refused in (train, dry_run):
        with pytest.raises(PowersteerError, match="weighting_scheme=logit_normal is for flow matching") as fault:
            refused(config)
        assert "\n" not in str(fault.value)
    with pytest.raises(PowersteerError, match="scheduler=ddim samples from epsilon, and the base predicts flow_predic"):
        make_scheduler("ddim", load_base(str(flow_dir)).scheduler)


def test_a_key_that_is_not_given_is_not_written():
    given = {"train_data_dir": "pairs", "output_dir": "run"}
    plain, other = (build_config({**given, **more}, TrainConfig) for more in ({}, {"weighting_scheme": "logit_normal"}))
    assert "weighting_scheme" not in plain.model_dump(mode="json") and "weighting_scheme" not in plain.model_dump_json()
    assert list(other.model_dump()) != list(plain.model_dump()) and other.model_dump()["weighting_scheme"]
    assert build_config(other.model_dump(mode="json"), TrainConfig) == other
