"""The information figure, against Gaussians, where everything is known."""

import itertools
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from conftest import randomise, uniform_log_snr
from powersteer import PowersteerError
from powersteer.adapters.attach import attach
from powersteer.adapters.baselines import BASELINES
from powersteer.adapters.registry import make_adapter
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs
from powersteer.denoising.heldout import Gap, HeldOut
from powersteer.denoising.objective import FlowMatching, Objective, objective_of
from powersteer.evaluation.information import LogSnr, denoiser_errors, measure_information

D = 6
COSINE = objective_of(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
SD = objective_of(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
FLOW = FlowMatching()


class Gaussians:
    """x ~ N(0, Σ), c = A·x + τ·n, and the best denoisers without and with c."""

    def __init__(self, objective: Objective, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        spread = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.sigma = spread @ spread.T / D + 0.1 * torch.eye(D)
        self.map = torch.randn(3, D, generator=generator, dtype=torch.float64)
        self.tau = 0.5
        self.posterior = (self.sigma.inverse() + self.map.T @ self.map / self.tau**2).inverse()
        self.objective, self.count = objective, count
        generator.manual_seed(1000 + seed)
        self.x = torch.randn(count, D, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(self.sigma).T
        noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        self.c = self.x @ self.map.T + self.tau * noise

    def errors(self, kind: str, times: torch.Tensor, seed: int) -> torch.Tensor:
        epsilon = torch.randn(
            *times.shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )  # (draws, N, D)
        alpha = self.objective.signal(times)[..., None]
        z = alpha.sqrt() * self.x + (1 - alpha).sqrt() * epsilon
        covariance, mean = self.sigma, torch.zeros_like(self.x)
        if kind != "prior":
            c = self.c if kind == "steered" else self.c.roll(1, 0)
            covariance, mean = self.posterior, c @ self.map @ self.posterior.T / self.tau**2
        snr = (alpha / (1 - alpha))[..., None]
        gain = covariance @ (covariance + torch.eye(D) / snr).inverse()  # (draws, N, D, D)
        guess = mean + (gain @ (z / alpha.sqrt() - mean)[..., None])[..., 0]
        error = ((z - alpha.sqrt() * guess) / (1 - alpha).sqrt() - epsilon) ** 2
        return error.mean(-1)

    def known(self, snr: float) -> float:
        """I(z; c) at an SNR, in nats a dimension."""
        eye = torch.eye(D, dtype=torch.float64)
        return 0.5 * (torch.logdet(eye + snr * self.sigma) - torch.logdet(eye + snr * self.posterior)).item() / D

    @property
    def all(self) -> float:
        """I(x; c), in nats a dimension."""
        return 0.5 * (torch.logdet(self.sigma) - torch.logdet(self.posterior)).item() / D


def exact(gaussians: Gaussians, objective: Objective) -> float:
    snr = objective.log_snr(objective.times).exp().tolist()
    return gaussians.known(snr[0]) - gaussians.known(snr[-1])


@pytest.mark.parametrize("objective", [COSINE, SD, FLOW], ids=["cosine", "sd", "flow"])
def test_the_integral_is_the_mutual_information_of_the_schedules_ends(objective):
    gaussians = Gaussians(objective, 4000)
    found = measure_information(gaussians.errors, objective, 4000)
    assert found.steered.error < 0.01
    assert found.steered.mean == pytest.approx(exact(gaussians, objective), abs=3 * found.steered.error + 2e-3)
    assert sum(nats for *_, nats in found.bands) == pytest.approx(found.steered.mean)
    assert found.shuffled.mean < 0


@pytest.mark.parametrize("objective", [COSINE, FLOW], ids=["cosine", "flow"])
def test_a_schedule_from_noise_to_picture_leaves_next_to_nothing_out(objective):
    gaussians = Gaussians(objective, 2)
    assert exact(gaussians, objective) == pytest.approx(gaussians.all, abs=1e-3)


@pytest.mark.parametrize("objective", [COSINE, FLOW], ids=["cosine", "flow"])
def test_the_trapezoid_rule_over_the_schedule_is_exact_enough(objective):
    gaussians, schedule = Gaussians(objective, 2), LogSnr.of(objective)
    eye = torch.eye(D, dtype=torch.float64)
    total = 0.0
    for value, width in zip(schedule.values, schedule.widths, strict=True):
        snr = value.exp()
        mmse = [snr * torch.trace((s.inverse() + snr * eye).inverse()) for s in (gaussians.sigma, gaussians.posterior)]
        total += 0.5 * width.item() * (mmse[0] - mmse[1]).item() / D
    assert total == pytest.approx(exact(gaussians, objective), rel=1e-3)


def test_the_standard_error_is_calibrated():
    found = []
    for seed in range(200):
        gaussians = Gaussians(COSINE, 40, seed)
        found.append(measure_information(gaussians.errors, COSINE, 40, draws=4, seed=3 * seed).steered)
    means = torch.tensor([gap.mean for gap in found])
    errors = torch.tensor([gap.error for gap in found])
    assert means.std().item() / errors.mean().item() == pytest.approx(1, abs=0.15)
    assert means.mean().item() == pytest.approx(exact(gaussians, COSINE), abs=4 * means.std().item() / 200**0.5)


def test_draws_that_follow_the_gain_are_better_than_uniform_ones():
    def spread() -> float:
        gaussians = Gaussians(COSINE, 400)
        return measure_information(gaussians.errors, COSINE, 400, draws=1).steered.error

    informed = spread()
    with uniform_log_snr():
        assert informed < 0.8 * spread()


def test_equal_denoisers_have_gained_nothing():
    gaussians = Gaussians(COSINE, 10)
    found = measure_information(lambda _, times, seed: gaussians.errors("prior", times, seed), COSINE, 10)
    assert found.steered.mean == 0 and found.steered.error == 0


def test_zero_terminal_snr_is_left_out():
    betas = [1 - after / before for before, after in pairwise([1.0, 0.9, 0.5, 0.1, 0.0])]
    schedule = LogSnr.of(objective_of(DDPMScheduler(num_train_timesteps=4, trained_betas=betas)))
    assert schedule.times.tolist() == [0, 1, 2]
    assert schedule.widths.sum().item() == pytest.approx((schedule.values[0] - schedule.values[-1]).item())


def test_errors_of_a_real_base_are_the_held_out_losses(pipe, model, pairs_dir):
    pairs = encode_pairs(pipe, Pairs(pairs_dir, (32, 32)))
    times = torch.randint(1000, (2, 12), generator=torch.Generator().manual_seed(0))
    errors = denoiser_errors(pipe, model, pairs)
    held_out = HeldOut(pipe, pairs, draws=2, times=times)
    torch.testing.assert_close(errors("prior", times, 0), held_out.losses(None).double())
    torch.testing.assert_close(errors("shuffled", times, 0), held_out.losses(model, shuffled=True).double())
    found = measure_information(errors, objective_of(pipe.scheduler), 12, draws=2)
    assert found.steered.error > 0 and found.steered.mean != found.shuffled.mean
    assert found == measure_information(errors, objective_of(pipe.scheduler), 12, draws=2)
    assert found.as_json()["steered"] == {"mean": found.steered.mean, "error": found.steered.error}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["paper", "lite", *BASELINES])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_information_of_every_network_is_what_is_computed_by_hand(pipe, pairs_dir, kind, prediction):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    pairs = encode_pairs(pipe, Pairs(pairs_dir, (32, 32), limit=4))
    network = make_adapter(pipe.unet, preset=kind, pixel_unshuffle=4)
    objective, states = objective_of(pipe.scheduler), pairs.texts(["a fox"])["encoder_hidden_states"]
    untrained = measure_information(denoiser_errors(pipe, network, pairs), objective, 4, draws=2)
    assert untrained.steered == untrained.shuffled == Gap(0.0, 0.0)

    def by_hand(which, timesteps, seed):
        """One draw at a time, by the definition of ε̂."""
        errors = torch.zeros(timesteps.shape)
        noise = HeldOut(pipe, pairs, draws=len(timesteps), seed=seed).noise
        for (draw, place), t in zip(itertools.product(*map(range, timesteps.shape)), timesteps.flatten(), strict=True):
            x = pairs.latents([pairs[place, 0]])
            epsilon, alpha = noise(draw, place, tuple(x.shape[1:]))[None], pipe.scheduler.alphas_cumprod[t]
            z = alpha.sqrt() * x + (1 - alpha).sqrt() * epsilon
            whose = (place + 2) % 4 if which == "shuffled" else place  # half the folder away
            condition = pairs[whose, 0].condition[None].float() / 255
            with nullcontext() if which == "prior" else attach(pipe.unet, network, condition):
                guess = pipe.unet(z, t, states).sample
            if prediction == "v_prediction":
                guess = (1 - alpha).sqrt() * z + alpha.sqrt() * guess
            errors[draw, place] = (guess - epsilon).square().mean()
        return errors

    randomise(network)
    with uniform_log_snr():
        found = measure_information(denoiser_errors(pipe, network, pairs), objective, 4, draws=2)
        wanted = measure_information(by_hand, objective, 4, draws=2)
    assert found.steered.mean == pytest.approx(wanted.steered.mean, rel=1e-3) and abs(wanted.steered.mean) > 1e-3
    # Gains of both signs may cancel to next to nothing: what is left of single losses' rounding is absolute.
    assert found.shuffled.mean == pytest.approx(wanted.shuffled.mean, rel=1e-3, abs=2e-6)


def test_too_few_pairs_are_refused():
    with pytest.raises(PowersteerError, match="at least two pairs"):
        measure_information(Gaussians(COSINE, 1).errors, COSINE, 1)
