"""What is asked of the denoiser, and what chance decides."""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from powersteer import PowersteerError
from powersteer.data.encode import Sample
from powersteer.denoising.objective import LOWEST_LOG_SNR, Diffusion, FlowMatching, objective_of
from powersteer.training.config import TrainConfig
from powersteer.training.draws import draw, noise, prompt_of

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def schedule(kind):
    return DDPMScheduler(**SD, prediction_type=kind)


def objective(kind):
    return FlowMatching() if kind == "flow_prediction" else objective_of(schedule(kind))


def times_of(one, count=5):
    return one.at(torch.linspace(0.001, 0.999, count, dtype=torch.float64))


def test_the_scheduler_says_which_objective_a_base_has(tmp_path):
    for kind in KINDS[:3]:
        for scheduler in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler):
            found = objective_of(scheduler(**SD, prediction_type=kind))
            assert isinstance(found, Diffusion) and found.prediction_type == kind
            assert found.levels == schedule(kind).alphas_cumprod.numpy().tobytes()  # however it samples
    found = objective_of(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0))
    assert isinstance(found, FlowMatching) and found.prediction_type == "flow_prediction"
    assert (found.num_train_timesteps, found.shift) == (500, 3.0)
    assert objective_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)).shift == 1.0
    assert len({objective_of(FlowMatchEulerDiscreteScheduler(shift=shift)).levels for shift in (1.0, 3.0)}) == 2
    for scheduler in (schedule("v_prediction"), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        scheduler.save_pretrained(tmp_path)
        read = objective_of(json.loads((tmp_path / "scheduler_config.json").read_text()))
        assert type(read) is type(objective_of(scheduler)) and read.levels == objective_of(scheduler).levels
    with pytest.raises(PowersteerError, match="the base predicts 'noise': only epsilon, v_prediction and sample can"):
        objective_of(DDPMScheduler(prediction_type="noise"))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_diffusion_is_that_of_diffusers_schedulers(kind):
    one, scheduler, timesteps = objective(kind), schedule(kind), torch.tensor([0, 3, 500, 999])
    latents, epsilon = torch.randn(2, 4, 4, 8, 8).unbind()
    noisy = one.corrupt(latents, epsilon, timesteps)
    assert torch.equal(noisy, scheduler.add_noise(latents, epsilon, timesteps))
    target = one.target(latents, epsilon, timesteps)
    wanted = {"epsilon": epsilon, "v_prediction": scheduler.get_velocity(latents, epsilon, timesteps)}
    torch.testing.assert_close(target, wanted.get(kind, latents))
    assert torch.equal(one.model_times(timesteps), timesteps)
    torch.testing.assert_close(
        one.log_snr(timesteps).exp().float(), compute_snr(scheduler, timesteps), rtol=1e-3, atol=0
    )
    # The picture that the scheduler itself takes a prediction for.
    sampler, guess = DDIMScheduler(**SD, prediction_type=kind, clip_sample=False), torch.randn(4, 4, 8, 8)
    sampler.set_timesteps(1000)
    for row, timestep in enumerate(timesteps):
        given = guess[row : row + 1], noisy[row : row + 1], timesteps[row : row + 1]
        step = sampler.step(guess[row], timestep.item(), noisy[row])
        torch.testing.assert_close(one.to_latents(*given)[0], step.pred_original_sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_that_of_diffusers_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    one, rows = objective_of(scheduler), torch.tensor([1, 200, 700, 999])
    times, latents, epsilon = scheduler.sigmas[rows], *torch.randn(2, 4, 4, 8, 8).unbind()
    noisy = one.corrupt(latents, epsilon, times)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, scheduler.timesteps[rows], epsilon))
    torch.testing.assert_close(one.model_times(times), scheduler.timesteps[rows])
    target = one.target(latents, epsilon, times)
    assert torch.equal(target, epsilon - latents)
    # One Euler step from t to 0 along the target arrives at the picture.
    for row in range(4):
        scheduler.sigmas = torch.tensor([times[row], 0.0])
        scheduler._step_index = 0
        arrived = scheduler.step(target[row], scheduler.timesteps[rows[row]], noisy[row]).prev_sample
        torch.testing.assert_close(arrived, latents[row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.log_snr(times), 2 * ((1 - times.double()) / times.double()).log())
    assert (one.times.min() >= scheduler.sigma_min - 1e-6) and one.times.max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_stands_for_one_picture_and_its_noise(kind):
    """A guess of the picture, turned into the target and back; and its errors in the three units."""
    one = objective(kind)
    times = times_of(one)
    latents, guess, epsilon = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64).unbind()
    noisy = one.corrupt(latents, epsilon, times)
    a = one.signal(times) if kind != "flow_prediction" else (1 - times) ** 2
    s = 1 - one.signal(times) if kind != "flow_prediction" else times**2
    a, s = (square.sqrt()[:, None, None, None] for square in (a, s))
    torch.testing.assert_close(noisy, a * latents + s * epsilon, rtol=1e-6, atol=1e-6)
    guessed = (noisy - a * guess) / s
    prediction = one.target(guess, guessed, times)
    torch.testing.assert_close(one.to_latents(prediction, noisy, times), guess, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.to_noise(prediction, noisy, times), guessed, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.log_snr(times), 2 * (a / s).log().flatten(), rtol=1e-6, atol=1e-6)
    loss = (prediction - one.target(latents, epsilon, times)).square().mean((1, 2, 3))
    of_noise, of_latents = ((x - y).square().mean((1, 2, 3)) for x, y in ((guessed, epsilon), (guess, latents)))
    torch.testing.assert_close(loss * one.noise_error_of_loss(times), of_noise, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_latents * one.loss_of_latents(times), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_script(kind):
    scheduler, timesteps = schedule(kind), torch.tensor([0, 10, 300, 700, 999])
    snr = compute_snr(scheduler, timesteps)
    wanted = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    wanted = wanted / snr if kind == "epsilon" else wanted / (snr + 1)  # examples/text_to_image/train_text_to_image.py
    torch.testing.assert_close(objective(kind).min_snr_weights(timesteps, 5.0), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_all_predictions_as_one_error_of_the_picture(kind):
    """Whatever is predicted, a squared error of z counts as min(SNR, γ)."""
    one = objective(kind)
    times = times_of(one)
    weighted = one.min_snr_weights(times, 5.0).double() * one.loss_of_latents(times)
    torch.testing.assert_close(weighted, one.log_snr(times).exp().clamp(max=5.0), rtol=1e-5, atol=0)


def test_every_span_of_times_has_a_name():
    assert [objective("epsilon").span(part, 4) for part in range(4)] == ["0-249", "250-499", "500-749", "750-999"]
    assert [FlowMatching().span(part, 4) for part in range(4)] == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    for kind in KINDS:
        one = objective(kind)
        assert (one.log_snr(one.times).diff() < 0).all() and len(one.times) == 1000
        assert (one.log_snr(times_of(one, 50)).diff() < 0).all()


def test_flow_matching_draws_uniform_or_logit_normal_times_shifted():
    generator = torch.Generator().manual_seed(0)
    for scheme in ("none", "logit_normal"):
        for shift in (1.0, 3.0):
            drawn = FlowMatching(shift=shift).sampler(0.0, scheme)(20_000, generator)
            density = {"weighting_scheme": scheme, "batch_size": 20_000, "logit_mean": 0.0, "logit_std": 1.0}
            wanted = compute_density_for_timestep_sampling(**density, generator=generator)
            wanted = shift * wanted / (1 + (shift - 1) * wanted)
            levels = torch.linspace(0.05, 0.95, 10)
            torch.testing.assert_close(drawn.quantile(levels), wanted.quantile(levels), atol=0.02, rtol=0)
            assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() < 1
    # Stratified: one from each of 8 equally probable parts, in any order.
    parts = FlowMatching().sampler()(8, generator)
    assert (parts.sort().values * 8).long().tolist() == list(range(8)) and not torch.equal(parts, parts.sort().values)


def test_flow_matching_draws_a_share_of_its_times_even_in_log_snr():
    one, generator = FlowMatching(), torch.Generator().manual_seed(0)
    highest = one.log_snr(one.times)[0].item()
    log_snr = one.log_snr(one.sampler(1.0)(10_000, generator))
    wanted = torch.linspace(LOWEST_LOG_SNR, highest, 11, dtype=torch.float64)
    torch.testing.assert_close(log_snr.quantile(torch.linspace(0, 1, 11).double()), wanted, atol=0.02, rtol=0)
    mixed = one.sampler(0.4)(10_000, generator)
    rare = one.log_snr(mixed) > 8  # of uniform times, hardly any
    share = 0.4 * (highest - 8) / (highest - LOWEST_LOG_SNR)
    assert rare.double().mean().item() == pytest.approx(share + 0.6 * (1 / (1 + 2.718281828**4) - 0.001), abs=2e-3)


def test_logit_normal_times_are_for_flow_matching():
    with pytest.raises(PowersteerError, match="weighting_scheme=logit_normal is for flow matching, and the base predi"):
        objective("epsilon").sampler(0.0, "logit_normal")


EVEN = torch.full((1000,), 1e-3, dtype=torch.float64)
SAMPLER = objective("epsilon").sampler()


def config(**given):
    return TrainConfig(train_data_dir="pairs", output_dir="run", **given)


def test_draws_depend_on_seed_step_and_place_alone():
    one = draw(config(), 7, 16, SAMPLER)
    assert torch.equal(one.times, draw(config(), 7, 16, SAMPLER).times)
    assert not torch.equal(one.times, draw(config(), 8, 16, SAMPLER).times)
    assert not torch.equal(one.times, draw(config(seed=1), 7, 16, SAMPLER).times)
    whole = noise(0, 7, range(8), (4, 2, 2))
    assert torch.equal(torch.cat([noise(0, 7, range(3), (4, 2, 2)), noise(0, 7, range(3, 8), (4, 2, 2))]), whole)
    assert len({float(sample.sum()) for step in range(20) for sample in noise(0, step, range(8), (4, 2, 2))}) == 160


def test_noise_is_normal_and_timesteps_uniform():
    values = torch.cat([noise(0, step, range(16), (4, 8, 8)).flatten() for step in range(40)])
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    steps = torch.cat([draw(config(), step, 64, SAMPLER).times for step in range(100)]).float()
    assert steps.min() < 5 and steps.max() > 994 and abs(steps.mean() - 499.5) < 12


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_share_of_the_timesteps_is_even_in_log_snr(zero_terminal_snr):
    one = objective_of(DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=zero_terminal_snr))
    log_snr = one.log_snr(one.times)
    torch.testing.assert_close(one.probabilities(0.0), EVEN)
    chances = one.probabilities(1.0)
    assert chances.sum() == pytest.approx(1)
    edges = torch.linspace(LOWEST_LOG_SNR, log_snr[0].item(), 6).double()
    inside = torch.stack([chances[(log_snr > a) & (log_snr <= b)].sum() for a, b in pairwise(edges)])
    torch.testing.assert_close(inside, torch.full((5,), 0.2).double(), atol=0.02, rtol=0)
    assert chances[log_snr < LOWEST_LOG_SNR - 0.1].sum() == 0
    mixed = one.probabilities(0.4)
    torch.testing.assert_close(mixed, 0.4 * chances + 0.6 * EVEN)


def test_uneven_timesteps_come_one_from_each_equally_probable_part():
    one = objective("epsilon")
    mixed, sampler = one.probabilities(0.4), one.sampler(0.4)
    drawn = torch.stack([draw(config(), step, 8, sampler).times for step in range(2000)])
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
        draws = draw(settings, step, 32, SAMPLER)
        drawn += [prompt_of(sample, chance, settings) for chance in draws.prompt]
        blank += draws.blank.tolist()
    assert drawn.count("") / len(drawn) == pytest.approx(0.2, abs=0.02)
    assert sum(blank) / len(blank) == pytest.approx(0.3, abs=0.02)
    for prompt, share in shares.items():
        assert drawn.count(prompt) / (len(drawn) - drawn.count("")) == pytest.approx(share, abs=0.025), prompt
    plain = config(proportion_empty_prompts=0)
    assert {prompt_of(sample, chance, plain) for chance in draws.prompt} == {"own", "other"}
