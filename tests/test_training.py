import json
import os
import shutil
import signal

import pytest
import torch

from conftest import build_pipe, draw_pairs
from powersteer import BPSModel, PowersteerError, steer
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs
from powersteer.training import loop
from powersteer.training.checkpoint import list_checkpoints
from powersteer.training.config import TrainConfig
from powersteer.training.heldout import HeldOut
from powersteer.training.loop import train


@pytest.fixture
def config(tmp_path, base_dir):
    return TrainConfig(
        pretrained_model_name_or_path=str(base_dir),
        train_data_dir=draw_pairs(tmp_path / "train", 16),
        validation_data_dir=draw_pairs(tmp_path / "validation", 6, seed=1),
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        train_batch_size=4,
        max_train_steps=8,
        validation_steps=4,
        checkpointing_steps=4,
        lr_warmup_steps=2,
        mixed_precision="no",
        weights="uniform",
        learning_rate=1e-3,
    )


def weights(folder):
    return BPSModel.from_pretrained(folder).state_dict()


def test_training_lowers_the_held_out_loss_and_keeps_the_best(config):
    config = config.model_copy(update={"max_train_steps": 60, "validation_steps": 20, "ema_decay": 0.9})
    result = train(config)
    rows = [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60] and result.step == 60
    assert min(row["steered"] for row in rows) < rows[0]["prior"]
    assert result.best_step == min(rows, key=lambda row: row["steered"])["step"]
    # The kept weights are those that were measured.
    pipe = build_pipe()
    held_out = HeldOut(pipe, encode_pairs(pipe, Pairs(config.validation_data_dir, (32, 32))))
    kept = held_out.losses(BPSModel.from_pretrained(config.output_dir)).mean().item()
    assert kept == pytest.approx(min(row["steered"] for row in rows), rel=1e-4)


def test_resumed_run_equals_the_uninterrupted_one(config, tmp_path, monkeypatch):
    train(config)
    other = config.model_copy(update={"output_dir": tmp_path / "other"})
    real, calls = loop.F.mse_loss, []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the sixth step
        return real(*args, **kwargs)

    monkeypatch.setattr(loop.F, "mse_loss", interrupting)
    first = train(other.model_copy(update={"validation_data_dir": None}))
    assert first.interrupted and first.step == 6
    monkeypatch.undo()
    second = train(other)
    assert second.step == 8 and not second.interrupted
    wanted = torch.load(config.output_dir / "checkpoint-8" / "optimizer.pt", weights_only=True)
    got = torch.load(other.output_dir / "checkpoint-8" / "optimizer.pt", weights_only=True)
    for a, b in zip(wanted["ema"]["shadow_params"], got["ema"]["shadow_params"], strict=True):
        assert torch.equal(a, b)
    for name, tensor in weights(config.output_dir / "checkpoint-8").items():
        assert torch.equal(tensor, weights(other.output_dir / "checkpoint-8")[name]), name


def test_old_checkpoints_go_and_partial_ones_are_never_seen(config):
    config = config.model_copy(update={"checkpointing_steps": 2, "checkpoints_total_limit": 2})
    train(config)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-6", "checkpoint-8"]
    (config.output_dir / "checkpoint-10").mkdir()  # no state.json: not whole
    assert list_checkpoints(config.output_dir)[-1].name == "checkpoint-8"


def test_damaged_checkpoint_is_one_clear_error(config):
    train(config)
    damaged = config.output_dir / "checkpoint-8" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(PowersteerError, match="checkpoint-8 is damaged"):
        train(config.model_copy(update={"max_train_steps": 10}))
    shutil.rmtree(config.output_dir / "checkpoint-8")
    assert train(config).step == 8


def test_non_finite_loss_stops_and_saves_nothing(config):
    train(config)
    before = weights(config.output_dir)
    with pytest.raises(PowersteerError, match=r"the loss is .* at step"):
        train(config.model_copy(update={"max_train_steps": 40, "learning_rate": 1e30, "max_grad_norm": 1e30}))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(config.output_dir).items())


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
    steps = held_out.timesteps.view(4, 12)
    assert all(((steps[band] >= 250 * band) & (steps[band] < 250 * (band + 1))).all() for band in range(4))
    i = 17
    row, t = int(held_out.rows[i]), held_out.timesteps[i]
    alpha = pipe.scheduler.alphas_cumprod[t]
    noisy = alpha.sqrt() * pairs.latents[row] + (1 - alpha).sqrt() * held_out.noise[i]
    with steer(pipe.unet, model, pairs.condition(torch.tensor([row]))):
        guess = pipe.unet(noisy[None], t, pairs.text_states[pairs.text_rows[row]][None]).sample
    wanted = (guess - held_out.noise[i]).square().mean()
    torch.testing.assert_close(held_out.losses(model)[i], wanted, atol=1e-5, rtol=1e-4)


def test_training_changes_no_weight_of_the_base(config, base_dir):
    before = build_pipe().unet.state_dict()
    train(config)
    after = type(build_pipe().unet).from_pretrained(base_dir / "unet").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_of_one_process_have_their_own_precision(config, tmp_path):
    losses = {}
    for precision in ("bf16", "no"):
        change = {"output_dir": tmp_path / precision, "mixed_precision": precision, "max_train_steps": 1}
        train(config.model_copy(update=change))
        losses[precision] = json.loads((tmp_path / precision / "log.jsonl").read_text())["loss"]
    assert losses["bf16"] != losses["no"] and losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


def test_time_limit_stops_with_a_checkpoint(config):
    result = train(config.model_copy(update={"max_train_minutes": 1e-4, "max_train_steps": 1000}))
    assert 0 < result.step < 1000
    assert list_checkpoints(config.output_dir)[-1].name == f"checkpoint-{result.step}"
