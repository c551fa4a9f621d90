"""The loop: what it trains on, what it keeps, and that every way to divide the work gives the same result."""

import json
import os
import shutil
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from conftest import build_pipe, draw_pairs, randomise
from powersteer import BPSModel, PowersteerError, steer
from powersteer.adapters.load import load_adapter
from powersteer.backbones.unet import UNetBackbone
from powersteer.core.errors import NonFiniteError
from powersteer.data.encode import encode_pairs
from powersteer.data.order import batches
from powersteer.data.pairs import Pairs
from powersteer.denoising.heldout import Gap, HeldOut
from powersteer.training import loop
from powersteer.training.checkpoint import list_checkpoints
from powersteer.training.run import train

STEADY = 1e-5
"""An ε of AdamW, whose step is g / (|g| + ε), above what rounding does to a gradient. Convolutions round latents by
2e-8, otherwise for 4 pictures than for 16; gradients near the usual ε of 1e-8 would turn that into steps of 1e-5."""


def weights(folder):
    return BPSModel.from_pretrained(folder).state_dict()


def log_of(config):
    return [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]


def same(one, other, tolerance=0.0):
    return all((tensor - other[name]).abs().max() <= tolerance for name, tensor in one.items())


def test_training_lowers_the_held_out_loss_and_keeps_the_best(config):
    config = config.model_copy(update={"max_train_steps": 60, "validation_steps": 20, "ema_decay": 0.9})
    result = train(config)
    rows = log_of(config)
    assert [row["step"] for row in rows] == [0, 20, 40, 60] and result.step == 60
    assert rows[0]["steered"] == rows[0]["prior"]  # step 0 is the prior
    assert min(row["steered"] for row in rows) < rows[0]["prior"]
    assert result.best_step == min(rows, key=lambda row: row["steered"])["step"] > 0
    # The kept weights are those that were measured.
    pipe = build_pipe()
    held_out = HeldOut(pipe, encode_pairs(pipe, Pairs(config.validation_data_dir, (32, 32))))
    kept = held_out.losses(BPSModel.from_pretrained(config.output_dir)).mean().item()
    best = rows[result.best_step // 20]
    assert kept == pytest.approx(best["steered"], rel=1e-4)
    # The row says what it is made of, to the rounding of losses about 1 in float32.
    assert best["gain"] == pytest.approx(best["prior"] - best["steered"], abs=1e-6)
    assert best["control"] == pytest.approx(best["shuffled"] - best["steered"], abs=1e-6)
    assert np.mean([band["steered"] for band in best["bands"].values()]) == pytest.approx(best["steered"], rel=1e-4)
    assert list(best["bands"]) == ["0-249", "250-499", "500-749", "750-999"]


def test_resumed_run_equals_the_uninterrupted_one(config, tmp_path, monkeypatch):
    train(config)
    other = config.model_copy(update={"output_dir": tmp_path / "other"})
    real, calls = loop.squared_errors, []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the sixth step
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "squared_errors", interrupting)
    first = train(other)
    assert first.interrupted and first.step == 6
    monkeypatch.undo()
    second = train(other)
    assert second.step == 8 and not second.interrupted and second.best_step == 8
    wanted, got = (
        torch.load(run.output_dir / "checkpoint-8" / "training.pt", weights_only=True) for run in (config, other)
    )
    for part in ("exp_avg", "exp_avg_sq"):
        for name, tensor in wanted["optimizer"]["state"].items():
            assert torch.equal(tensor[part], got["optimizer"]["state"][name][part])
    for a, b in zip(wanted["average"]["shadow_params"], got["average"]["shadow_params"], strict=True):
        assert torch.equal(a, b)
    assert same(weights(config.output_dir / "checkpoint-8"), weights(other.output_dir / "checkpoint-8"))
    assert same(weights(config.output_dir), weights(other.output_dir))
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in log_of(run)] for run in (config, other)]
    assert timeless[0] == timeless[1]


def test_a_signal_in_the_last_update_keeps_what_comes_after_from_beginning(config, monkeypatch):
    held_out = {"validation_data_dir": None, "validation_split": 0.3, "refit": True, "max_train_steps": 4}
    config = config.model_copy(update=held_out)
    real, calls = loop.squared_errors, []

    def interrupting(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "squared_errors", interrupting)
    first = train(config)
    assert first.interrupted and first.step == 4 and not (config.output_dir / "refit").exists()
    best = weights(config.output_dir)
    second = train(config)
    assert not second.interrupted and sum(calls) == 4 + second.best_step  # the refit alone is left to do
    assert not same(best, weights(config.output_dir))


def test_accumulated_steps_are_the_whole_batch(config, tmp_path):
    config = config.model_copy(update={"adam_epsilon": STEADY})
    train(config)
    divided = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "output_dir": tmp_path / "divided"}
    train(config.model_copy(update=divided))
    assert same(weights(config.output_dir), weights(tmp_path / "divided"), 1e-5)
    states = [
        json.loads((run / "checkpoint-8" / "state.json").read_text())
        for run in (config.output_dir, tmp_path / "divided")
    ]
    assert states[0]["order"] != "" and states[0]["order"] == states[1]["order"]


@pytest.mark.parametrize(
    "change", [{"dataloader_num_workers": 2}, {"gradient_checkpointing": True}, {"cache_latents": False}]
)
def test_neither_workers_checkpointing_nor_the_cache_change_the_result(config, tmp_path, change):
    config = config.model_copy(update={"max_train_steps": 3, "adam_epsilon": STEADY})
    train(config)
    train(config.model_copy(update={**change, "output_dir": tmp_path / "other"}))
    start = weights(config.output_dir / "checkpoint-3")
    assert same(start, weights(tmp_path / "other" / "checkpoint-3"), 1e-6)
    assert start["mid_output.weight"].abs().max() > 1e-3


def test_a_cached_epoch_touches_neither_vae_nor_text_encoder(config, monkeypatch):
    train(config.model_copy(update={"max_train_steps": 1}))

    def touched(*_, **__):
        raise AssertionError("the encoder was used")

    monkeypatch.setattr(UNetBackbone, "latents", touched)
    monkeypatch.setattr(UNetBackbone, "texts", touched)
    other = {"proportion_empty_prompts": 0.5, "output_dir": config.output_dir / "other"}  # of the same cache
    assert train(config.model_copy(update=other)).step == 8
    with pytest.raises(AssertionError, match="the encoder was used"):
        train(config.model_copy(update={"cache_latents": False, "max_train_steps": 12}))


def test_non_finite_loss_names_step_and_samples_and_saves_nothing(config, monkeypatch):
    wild = config.model_copy(
        update={"learning_rate": 1e30, "max_grad_norm": 1e30, "output_dir": config.cache_dir / "x"}
    )
    with pytest.raises(PowersteerError, match=r"non-finite loss at step \d, samples train\[\d+\].*no checkpoint yet"):
        train(wild)
    train(config)
    before = weights(config.output_dir), [folder.name for folder in list_checkpoints(config.output_dir)]
    real = loop.squared_errors
    monkeypatch.setattr(loop, "squared_errors", lambda *args: real(*args) * torch.inf)
    wanted = (
        r"non-finite loss at step 8, samples train\[\d+\].*last good: checkpoint-8.*init_from=.*checkpoint-8 begins"
    )
    with pytest.raises(PowersteerError, match=wanted):
        train(config.model_copy(update={"max_train_steps": 40}))
    assert same(before[0], weights(config.output_dir))
    assert [folder.name for folder in list_checkpoints(config.output_dir)] == before[1]


def test_non_finite_gradient_stops_before_the_update(config, monkeypatch):
    real = Accelerator.clip_grad_norm_
    calls = []

    def poisoned(self, parameters, max_norm):
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad[:] = torch.inf
        return real(self, parameters, max_norm)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", poisoned)
    with pytest.raises(
        PowersteerError, match=r"non-finite gradient at step 2, samples train\[\d+\].*no checkpoint yet"
    ):
        train(config)


def test_step_zero_is_exactly_the_prior_and_shuffling_pairs_conditions(pipe, model, pairs_dir):
    pairs = encode_pairs(pipe, Pairs(pairs_dir, (32, 32)))
    held_out = HeldOut(pipe, pairs, draws=2)
    untrained = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4)
    assert torch.equal(held_out.losses(None), held_out.losses(untrained))
    assert not torch.equal(held_out.losses(model), held_out.losses(model, shuffled=True))


@torch.no_grad()
def test_held_out_loss_is_the_denoising_loss(pipe, model, pairs_dir):
    pairs = encode_pairs(pipe, Pairs(pairs_dir, (32, 32)))
    held_out = HeldOut(pipe, pairs, draws=4)
    assert all(((held_out.times[band] // 250) == band).all() for band in range(4))
    band, place = 1, 5
    t, latents = held_out.times[band, place], pairs.latents([pairs[place, 0]])[0]
    epsilon = held_out.noise(band, place, tuple(latents.shape))
    alpha = pipe.scheduler.alphas_cumprod[t]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * epsilon
    states = pairs.texts(["a fox"])["encoder_hidden_states"]
    for shift, shuffled in ((0, False), (6, True)):
        condition = pairs[(place + shift) % 12, 0].condition[None].float() / 255
        with steer(pipe.unet, model, condition):
            guess = pipe.unet(noisy[None], t, states).sample
        wanted = (guess - epsilon).square().mean()
        found = held_out.losses(model, shuffled=shuffled)[band, place]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_gap_is_the_mean_and_its_standard_error_over_pairs():
    difference = torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]])  # by pair: 2, 4, 6
    gap = Gap.of(difference)
    assert gap.mean == pytest.approx(4) and gap.error == pytest.approx(2 / 3**0.5) and gap.certain
    assert not Gap.of(torch.tensor([[1.0, -1.0, 2.0]])).certain
    alone = Gap.of(torch.tensor([[2.0, torch.nan]]))
    assert alone.mean == 2 and not alone.certain


def test_training_changes_no_weight_of_the_base(config, base_dir):
    before = build_pipe().unet.state_dict()
    train(config)
    after = type(build_pipe().unet).from_pretrained(base_dir / "unet").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_of_one_process_have_their_own_precision(config, tmp_path):
    losses = {}
    for precision in ("bf16", "no"):
        change = {"output_dir": tmp_path / precision, "mixed_precision": precision, "max_train_steps": 1}
        run = config.model_copy(update=change)
        train(run)
        losses[precision] = log_of(run)[-1]["loss"]
        kept = weights(run.output_dir)
        assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert losses["bf16"] != losses["no"] and losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


def test_time_limit_stops_with_a_checkpoint(config):
    result = train(config.model_copy(update={"max_train_minutes": 1e-4, "max_train_steps": 1000}))
    assert 0 < result.step < 1000 and not result.interrupted
    assert list_checkpoints(config.output_dir)[-1].name == f"checkpoint-{result.step}"
    assert log_of(config)[-1]["step"] == result.step  # measured at the end, whenever that is


def test_init_from_starts_at_the_adapter_and_at_step_one(config, tmp_path, pipe):
    randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform")).save_pretrained(tmp_path / "start")
    tiny = config.model_copy(update={"init_from": str(tmp_path / "start"), "max_train_steps": 1, "learning_rate": 1e-9})
    train(tiny)
    assert same(weights(tmp_path / "start"), weights(config.output_dir / "checkpoint-1"), 1e-6)
    assert log_of(tiny)[0]["steered"] != log_of(tiny)[0]["prior"]


def test_patience_stops_and_warns_of_over_fitting(config, capsys):
    config = config.model_copy(
        update={
            "max_train_steps": 400,
            "validation_steps": 3,
            "patience": 8,  # validations: the warning wants one with less loss on training pairs than the best step had
            "learning_rate": 3e-3,
            "ema_decay": None,
            "lr_warmup_steps": 0,
            "max_train_samples": 4,
        }
    )
    result = train(config)
    assert result.step == result.best_step + 24 < 400
    assert log_of(config)[-1]["step"] == result.step
    assert "over-fitting; the weights of step" in capsys.readouterr().err.replace("\n", " ")


def test_a_share_is_held_out_and_used_in_the_end(config, tmp_path):
    few = config.model_copy(
        update={
            "validation_data_dir": None,
            "validation_split": 0.25,
            "refit": True,
            "max_train_steps": 24,
            "validation_steps": 8,
            "random_flip": True,
        }
    )
    result = train(few)
    assert 0 < result.best_step <= 24
    state = json.loads((few.output_dir / "refit" / f"checkpoint-{result.best_step}" / "state.json").read_text())
    assert state["step"] == result.best_step
    assert same(weights(few.output_dir), weights(few.output_dir / "refit"))
    assert not same(weights(few.output_dir), weights(few.output_dir / "checkpoint-24"), 1e-4)
    before = weights(few.output_dir)
    assert train(few).step == result.step  # the same command again changes nothing
    assert same(before, weights(few.output_dir))


def test_what_never_beats_the_prior_is_not_kept(config, tmp_path):
    pipe = build_pipe()
    pipe.unet.conv_out.weight.data.zero_()
    pipe.unet.conv_out.bias.data.zero_()  # nothing can be steered
    pipe.save_pretrained(tmp_path / "deaf")
    result = train(config.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / "deaf")}))
    assert result.best_step == 0 and result.control_step is None
    assert load_adapter(str(config.output_dir)).mid_output.weight.abs().max() == 0
    assert weights(config.output_dir / "checkpoint-8")["mid_blocks.0.conv1.weight"].abs().max() > 0


def test_pictures_of_the_run(config):
    config = config.model_copy(update={"num_validation_images": 2, "validation_image_steps": 8})
    train(config)
    files = sorted((config.output_dir / "validation").iterdir())
    assert [file.name for file in files] == ["step-000000.png", "step-000008.png"]
    first, last = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files)
    assert first.shape == (18 + 2 * 128 + 2, 3 * 128 + 4, 3)
    thirds = [slice(130 * i, 130 * i + 128) for i in range(3)]
    assert np.array_equal(first[:, thirds[0]], last[:, thirds[0]]) and np.array_equal(
        first[:, thirds[2]], last[:, thirds[2]]
    )
    assert not np.array_equal(first[18:, thirds[1]], last[18:, thirds[1]])


def test_tensorboard_holds_the_curves_and_pictures(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        config.model_copy(update={"report_to": "tensorboard", "num_validation_images": 1, "validation_image_steps": 8})
    )
    events = EventAccumulator(str(config.output_dir / "logs" / "powersteer")).Reload()
    steered = [(event.step, event.value) for event in events.Scalars("steered")]
    assert steered == [(row["step"], pytest.approx(row["steered"])) for row in log_of(config)]
    assert "t 0-249/steered" in events.Tags()["scalars"] and events.Tags()["images"]


def test_order_sees_every_pair_once_a_round_and_one_size_a_batch():
    sizes = [(32, 32)] * 5 + [(32, 64)] * 3
    order = list(islice(batches(sizes, 2, 4, seed=3), 60))
    assert order == list(islice(batches(sizes, 2, 4, seed=3), 60)) != list(islice(batches(sizes, 2, 4, seed=4), 60))
    assert order[20:] == list(islice(batches(sizes, 2, 4, seed=3), 20, 60))
    assert all(len({sizes[i] for i, _ in batch}) == 1 for batch in order)
    square = [i for batch in order for i, _ in batch if sizes[i] == (32, 32)]
    assert all(sorted(square[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, len(square) - 5, 5))
    assert 0.35 < len(square) / 240 < 0.85  # 5 of 8 expected
    views = [view for batch in order for _, view in batch]
    assert 0.4 < np.mean(views) < 0.6


def test_pairs_of_several_sizes_train_in_buckets(config, tmp_path):
    folder = draw_pairs(tmp_path / "wide", 8)
    for i in range(4):
        for kind in ("images", "drawings"):
            file = folder / kind / f"{i}.png"
            Image.open(file).resize((64, 32)).save(file)
    held_out = shutil.copytree(folder, tmp_path / "held-out")
    change = {"train_data_dir": str(folder), "validation_data_dir": held_out, "aspect_ratio_buckets": True}
    result = train(config.model_copy(update=change))
    assert result.step == 8
    pairs = Pairs(folder, (32, 32), buckets=[(24, 40), (32, 32)])
    assert pairs.sizes == [(24, 40)] * 4 + [(32, 32)] * 4


def test_pictures_that_are_not_finite_are_said_and_the_run_goes_on(config, monkeypatch, capsys):
    def broken(*_, **__):
        raise NonFiniteError("the pictures are not finite numbers")

    monkeypatch.setattr("powersteer.training.monitor.steered_pictures", broken)
    result = train(config.model_copy(update={"num_validation_images": 2, "max_train_steps": 2}))
    assert result.step == 2 and not (config.output_dir / "validation").exists()
    assert "step 0: no pictures, the pictures are not finite numbers" in " ".join(capsys.readouterr().err.split())
