"""What is asked of the denoiser, and what chance decides."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from powersteer.data.encode import Sample
from powersteer.denoising.objective import LOWEST_LOG_SNR, denoising_target, min_snr_weights, timestep_probabilities
from powersteer.training.config import TrainConfig
from powersteer.training.draws import draw, noise, prompt_of


def schedule(kind):
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_script(kind):
    scheduler, timesteps = schedule(kind), torch.tensor([0, 10, 300, 700, 999])
    snr = compute_snr(scheduler, timesteps)
    wanted = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    wanted = wanted / snr if kind == "epsilon" else wanted / (snr + 1)  # examples/text_to_image/train_text_to_image.py
    torch.testing.assert_close(min_snr_weights(scheduler, timesteps, 5.0), wanted, rtol=1e-4, atol=0)


def test_min_snr_weighs_all_predictions_as_one_error_of_the_picture():
    """A denoiser with error e in z has e·√ᾱ/√(1−ᾱ) in ε and e/√(1−ᾱ) in v: the weighted losses agree."""
    timesteps = torch.tensor([5, 400, 950])
    weighted = []
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = schedule(kind)
        alpha = scheduler.alphas_cumprod[timesteps].double()
        error = {"epsilon": (alpha / (1 - alpha)).sqrt(), "v_prediction": (1 - alpha).rsqrt(), "sample": alpha**0}[kind]
        weighted.append(min_snr_weights(scheduler, timesteps, 5.0).double() * error**2)
    torch.testing.assert_close(weighted[0], weighted[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(weighted[0], weighted[2], rtol=1e-3, atol=0)


def test_velocity_target_is_that_of_the_scheduler():
    scheduler, timesteps = schedule("v_prediction"), torch.tensor([3, 500])
    latents, epsilon = torch.randn(2, 2, 4, 8, 8).unbind()
    wanted = scheduler.get_velocity(latents, epsilon, timesteps)
    torch.testing.assert_close(denoising_target(scheduler, latents, epsilon, timesteps), wanted)


EVEN = torch.full((1000,), 1e-3, dtype=torch.float64)


def config(**given):
    return TrainConfig(train_data_dir="pairs", output_dir="run", **given)


def test_draws_depend_on_seed_step_and_place_alone():
    one = draw(config(), 7, 16, EVEN)
    assert torch.equal(one.timesteps, draw(config(), 7, 16, EVEN).timesteps)
    assert not torch.equal(one.timesteps, draw(config(), 8, 16, EVEN).timesteps)
    assert not torch.equal(one.timesteps, draw(config(seed=1), 7, 16, EVEN).timesteps)
    whole = noise(0, 7, range(8), (4, 2, 2))
    assert torch.equal(torch.cat([noise(0, 7, range(3), (4, 2, 2)), noise(0, 7, range(3, 8), (4, 2, 2))]), whole)
    assert len({float(sample.sum()) for step in range(20) for sample in noise(0, step, range(8), (4, 2, 2))}) == 160


def test_noise_is_normal_and_timesteps_uniform():
    values = torch.cat([noise(0, step, range(16), (4, 8, 8)).flatten() for step in range(40)])
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    steps = torch.cat([draw(config(), step, 64, EVEN).timesteps for step in range(100)]).float()
    assert steps.min() < 5 and steps.max() > 994 and abs(steps.mean() - 499.5) < 12


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_share_of_the_timesteps_is_even_in_log_snr(zero_terminal_snr):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=zero_terminal_snr)
    log_snr = scheduler.alphas_cumprod.double().logit()
    torch.testing.assert_close(timestep_probabilities(scheduler, 0.0), EVEN)
    chances = timestep_probabilities(scheduler, 1.0)
    assert chances.sum() == pytest.approx(1)
    edges = torch.linspace(LOWEST_LOG_SNR, log_snr[0].item(), 6).double()
    inside = torch.stack([chances[(log_snr > a) & (log_snr <= b)].sum() for a, b in pairwise(edges)])
    torch.testing.assert_close(inside, torch.full((5,), 0.2).double(), atol=0.02, rtol=0)
    assert chances[log_snr < LOWEST_LOG_SNR - 0.1].sum() == 0
    mixed = timestep_probabilities(scheduler, 0.4)
    torch.testing.assert_close(mixed, 0.4 * chances + 0.6 * EVEN)


def test_uneven_timesteps_come_one_from_each_equally_probable_part():
    mixed, settings = timestep_probabilities(schedule("epsilon"), 0.4), config(log_snr_share=0.4)
    drawn = torch.stack([draw(settings, step, 8, mixed).timesteps for step in range(2000)])
    ends = mixed.cumsum(0)
    ordered, parts = drawn.sort(1).values, torch.arange(8) / 8
    assert (ends[ordered] > parts - 1e-9).all() and (ends[ordered] - mixed[ordered] < parts + 1 / 8 + 1e-9).all()
    torch.testing.assert_close(ends[drawn].mean(0), torch.full((8,), 0.5).double(), atol=0.03, rtol=0)  # in any order
    shares = torch.bincount(drawn.flatten(), minlength=1000).double() / drawn.numel()
    assert (shares[:20].sum() - mixed[:20].sum()).abs() < 0.01 and mixed[:20].sum() > 0.1


@pytest.mark.parametrize(
    ("generated", "shares"),
    [
        ("generated", {"fixed": 1 / 3, "generated": 1 / 3, "own": 1 / 6, "other": 1 / 6}),
        (None, {"fixed": 1 / 2, "own": 1 / 4, "other": 1 / 4}),
    ],
)
def test_prompt_mix_has_the_methods_shares(generated, shares):
    settings = config(
        prompt_mix=True, fixed_prompt="fixed", proportion_empty_prompts=0.2, proportion_empty_conditions=0.3
    )
    sample = Sample("pairs[0]", torch.zeros(1), torch.zeros(1), ("own", "other"), generated)
    drawn, blank = [], []
    for step in range(200):
        draws = draw(settings, step, 32, EVEN)
        drawn += [prompt_of(sample, chance, settings) for chance in draws.prompt]
        blank += draws.blank.tolist()
    assert drawn.count("") / len(drawn) == pytest.approx(0.2, abs=0.02)
    assert sum(blank) / len(blank) == pytest.approx(0.3, abs=0.02)
    for prompt, share in shares.items():
        assert drawn.count(prompt) / (len(drawn) - drawn.count("")) == pytest.approx(share, abs=0.025), prompt
    plain = config(proportion_empty_prompts=0)
    assert {prompt_of(sample, chance, plain) for chance in draws.prompt} == {"own", "other"}
