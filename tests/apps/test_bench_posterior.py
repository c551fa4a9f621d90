"""The exact posterior as a yardstick: what is measured against it adds up, and finished runs are kept."""

import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import randomise
from powersteer.adapters.attach import attach
from powersteer.adapters.registry import make_adapter
from powersteer.apps import cli
from powersteer.apps.bench.posterior import adapter as adapters
from powersteer.apps.bench.posterior import bench, learning, prior
from powersteer.apps.bench.posterior.adapter import Score, guesses, score, train_adapter
from powersteer.apps.bench.posterior.bench import bench_posterior
from powersteer.apps.bench.posterior.learning import Learner
from powersteer.apps.bench.posterior.world import World, make_unet, predict
from powersteer.core.errors import PowersteerError


@pytest.fixture(scope="module")
def world():
    return World("edges")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return make_unet().requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (adapters, prior, bench):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(adapters, "HELD_OUT_DRAWS", 16)
    monkeypatch.setattr(learning, "WARMUP_UPDATES", 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_conditions_are_the_observation_in_another_unit(world):
    observed = world.draw(500, generator()).observed
    picture = world.condition(observed)
    assert picture.shape == (500, 3, 16, 16) and world.condition_channels == 3
    assert picture.min() >= 0 and picture.max() <= 1 and (picture[:, 2] == 0.5).all()
    back = (picture[:, :2] - 0.5) * 2 * 4 * world.observation.spread(world.field)
    assert ((back - observed).abs() > 1e-5).double().mean() < 1e-4  # beyond four deviations
    blurred = World("blur")
    assert blurred.condition(blurred.draw(2, generator()).observed).shape == (2, 1, 16, 16)


def test_noise_is_the_schedules_and_timesteps_are_stratified(world):
    timesteps = world.stratified(300, 4, generator())
    assert timesteps.shape == (4, 300)
    assert [(row.min() // 250).item() for row in timesteps] == [(row.max() // 250).item() for row in timesteps]
    pairs = world.draw(300, generator(1))
    noisy = world.disturb(pairs, timesteps[2], generator(2))
    part = noisy.pictures - world.alphas[timesteps[2]].sqrt()[:, None, None, None] * pairs.pictures
    expected = (1 - world.alphas[timesteps[2]]).sqrt()[:, None, None, None] * noisy.noise
    assert torch.allclose(part, expected) and abs(noisy.noise.std() - 1) < 0.01


def test_the_excess_is_the_loss_beyond_the_least_possible(world, unet):
    torch.manual_seed(1)
    network = randomise(make_adapter(unet, preset="controlnet", conditioning_channels=3, pixel_unshuffle=1))
    scored = score(world, unet, network, 32, seed=3)
    same = generator(3)
    pairs = world.draw(32, same)
    for band, timesteps in enumerate(world.stratified(32, 4, same)):
        draws = world.disturb(pairs, timesteps, generator(4))
        least = world.posterior.around.loss(draws.alphas).mean().item()
        loss = sum((guess - noisy.noise).square().sum().item() for noisy, guess in guesses(world, unet, network, draws))
        assert loss / draws.noise.numel() - least == pytest.approx(scored.excess[band], rel=0.1)
        prior_loss = world.field.loss(draws.alphas).mean().item()
        assert scored.gap[band] == pytest.approx(prior_loss - least)


def test_shares_are_zero_at_the_prior_and_one_at_the_posterior():
    assert Score([0.2, 0.1], [0.2, 0.1]).share == 0
    assert Score([0.0, 0.0], [0.2, 0.1]).share == 1
    half = Score([0.2, 0.0], [0.2, 0.2])
    assert half.share == 0.5 and half.share_by_band == [0.0, 1.0]


def test_an_untrained_adapter_stands_where_the_prior_stands(world, unet):
    # E‖ε̂ − posterior‖² = E‖ε̂ − prior‖² + gap, for ε̂ knows nothing of y.
    network = make_adapter(unet, preset="paper", conditioning_channels=3, pixel_unshuffle=1).eval()
    scored = score(world, unet, network, 48, seed=5)
    excess = prior.prior_excess(unet, world, 48, seed=5)
    for whole, own, gap in zip(scored.excess, excess, scored.gap, strict=True):
        assert whole == pytest.approx(own + gap, rel=0.1)


@pytest.mark.parametrize("method", adapters.LEARNING_RATES)
def test_every_method_learns_and_keeps_nothing_worse_than_the_prior(world, unet, method, monkeypatch):
    monkeypatch.setattr(adapters, "VALIDATE_UPDATES", 2)
    pairs = world.draw(8, generator())
    if method == "controlnet-xs":
        with pytest.raises(PowersteerError, match="2 ResNets a level"):
            train_adapter(world, unet, method, pairs, 2, seed=0)
        return
    before = [p.clone() for p in unet.parameters()]
    trained = train_adapter(world, unet, method, pairs, 3, seed=0)
    assert trained.updates == 3 and len(trained.held_out) == 3  # before, after two, at the end
    best = min(range(3), key=trained.held_out.__getitem__)
    assert trained.best_update == (0, 2, 3)[best]
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    draws = world.disturb(pairs, torch.full((8,), 500), generator(1))
    with torch.no_grad(), attach(unet, trained.network, world.condition(pairs.observed)):
        steered = predict(unet, draws)
    with torch.no_grad():
        assert torch.allclose(steered, predict(unet, draws), atol=1e-6) == (trained.best_update == 0)


def test_patience_ends_a_run_and_the_best_weights_are_kept(world, unet, monkeypatch):
    monkeypatch.setattr(adapters, "VALIDATE_UPDATES", 1)
    monkeypatch.setattr(adapters, "PATIENCE", 2)
    monkeypatch.setattr(adapters, "LEARNING_RATES", {"lite": 1.0})  # nothing good comes of it for long
    pairs = world.draw(10, generator())
    trained = train_adapter(world, unet, "lite", pairs, 50, seed=0)
    curve = trained.held_out
    assert trained.updates == trained.best_update + 2 == len(curve) - 1 and curve[trained.best_update] == min(curve)
    draws = adapters.held_out_draws(world, pairs[:2], generator())  # a fifth, eight times each
    assert len(draws.pairs) == 16
    [(_, guess)] = guesses(world, unet, trained.network, draws)
    assert (guess - draws.noise).square().mean().item() == pytest.approx(min(curve), rel=1e-5)


def test_the_prior_learns_the_field(world, unet):
    learned, figures = prior.train_prior(12)
    assert figures["updates"] == 12 and not learned.training
    before, after = (sum(prior.prior_excess(u, world, 16, seed=1)) for u in (make_unet().eval(), learned))
    assert after < before


def test_learning_ends_at_its_updates_and_the_rate_falls():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    places = [1.0]
    for _ in Learner(layer, 0.1, 20).updates(lambda: layer.weight.sum()):
        places.append(layer.weight.item())
    steps = [a - b for a, b in pairwise(places)]
    assert len(steps) == 20
    # Under a constant gradient Adam moves by the rate itself: half a cosine.
    assert steps == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 20)) for i in range(20)], rel=1e-3)
    with pytest.raises(PowersteerError, match=r"the loss of Linear is nan at update 0"):
        next(Learner(layer, 0.1, 20).updates(lambda: layer.weight.sum() * math.nan))


@pytest.fixture
def run(tmp_path):
    said = []

    def run(**changed):
        given = {"pairs": [8], "methods": ["t2i-adapter"], "seeds": 2, "updates": 1, "evaluated_pairs": 4}
        given["prior_updates"] = 1
        said.clear()
        return bench_posterior(tmp_path, **{**given, **changed}, say=said.append), list(said)

    return run


def test_bench_sums_up_and_does_nothing_twice(run, tmp_path):
    first, said = run()
    assert len(said) == 2 and said[0].startswith("t2i-adapter, 8 pairs, seed 0:")
    runs = [json.loads((tmp_path / "runs" / f"edges-t2i-adapter-8-{seed}.json").read_text()) for seed in (0, 1)]
    row = first.rows[0]
    shares = [run["share"] for run in runs]
    assert (row.method, row.pairs, row.seeds) == ("t2i-adapter", 8, 2)
    assert row.share == pytest.approx(sum(shares) / 2)
    assert row.error == pytest.approx(abs(shares[0] - shares[1]) / 2)
    world = World("edges")
    assert sum(first.gap_by_band) / 4 == pytest.approx(
        (world.field.loss(world.alphas) - world.posterior.around.loss(world.alphas)).mean().item()
    )
    assert first.bands == ["0-249", "250-499", "500-749", "750-999"]
    written = json.loads((tmp_path / "edges.json").read_text())
    assert written["prior_share"] == pytest.approx(-sum(first.prior_excess_by_band) / sum(first.gap_by_band))
    assert (tmp_path / "edges.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "runs" / "edges-t2i-adapter-8-1.json").unlink()
    again, said = run()
    assert len(said) == 1 and "t2i-adapter, 8 pairs, seed 1" in said[0]
    assert [row.share for row in again.rows] == [row.share for row in first.rows]


def test_bench_refuses_in_words(run, tmp_path, monkeypatch):
    run(seeds=1)
    for changed, message in (
        ({"updates": 2}, "edges-t2i-adapter-8-0.json was made with updates 1, not 2: give another --out"),
        ({"observation": "sketch"}, "must be blur, mask, edges, not 'sketch'"),
        ({"methods": ["lora"]}, "the method must be paper, uniform, lite, .* not 'lora'"),
        ({"pairs": [40, 3]}, "3 pairs are too few"),
    ):
        with pytest.raises(PowersteerError, match=message):
            run(**changed)
    (tmp_path / "runs" / "edges-t2i-adapter-8-0.json").write_text("{")
    with pytest.raises(PowersteerError, match=r"edges-t2i-adapter-8-0\.json is no finished run: delete it"):
        run()
    (tmp_path / "prior" / "config.json").write_text("{")
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(PowersteerError, match="cannot keep the prior in"):
        run()
    (tmp_path / "file").write_text("")
    with pytest.raises(PowersteerError, match="cannot keep the prior in"):
        bench_posterior(tmp_path / "file", pairs=[8], updates=1, prior_updates=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PowersteerError, match=r"pip install 'powersteer\[plots\]'"):
        run()


def test_bench_posterior_command(tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["powersteer", "bench", "posterior", "--out", str(tmp_path), *args])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr()

    monkeypatch.setattr(bench_posterior, "__kwdefaults__", {**bench_posterior.__kwdefaults__, "evaluated_pairs": 4})
    args = ("--pairs", "8", "--methods", "t2i-adapter", "--updates", "1", "--prior-updates", "1")
    code, printed = run(*args, "--observation", "mask")
    assert code == 0 and "t2i-adapter" in printed.out and "prior U-Net" in printed.out
    code, printed = run(*args, "--observation", "mask", "--json")
    assert code == 0 and json.loads(printed.out)["rows"][0]["pairs"] == 8
    code, printed = run(*args, "--methods", "lora")
    assert code == 2 and "not 'lora'" in printed.err and printed.err.count("\n") == 1
