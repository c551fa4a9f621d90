"""Closed forms against brute force: joint Gaussian conditioning, Monte Carlo, and I-MMSE."""

import pytest
import torch

from powersteer.core.errors import PowersteerError
from powersteer.evaluation.gaussian import BLUR_PIXELS, gaussian_field, observation

SIDE = 5
KINDS = ("blur", "mask", "edges")


@pytest.fixture(scope="module")
def field():
    return gaussian_field(SIDE, length=2.0)


def conditional(joint, known, value):
    """Mean (d,) and covariance of the first coordinates, given the last ``known``: the Schur complement."""
    d = len(joint) - known
    across = joint[:d, d:] @ torch.linalg.inv(joint[d:, d:])
    return across @ value, joint[:d, :d] - across @ joint[d:, :d]


def test_the_field_is_stationary_and_its_samples_have_its_covariance(field):
    covariance = field.covariance
    assert torch.allclose(covariance.diagonal(), torch.ones(SIDE**2).double())
    grid = covariance.view(SIDE, SIDE, SIDE, SIDE)
    assert torch.allclose(grid[0, 0, 2, 1], grid[1, 3, 3, 4])  # two down, one right, wherever it starts
    assert torch.allclose(grid[0, 0, 2, 1], grid[2, 1, 0, 0])
    assert grid[0, 0, 0, 1] > grid[0, 0, 0, 2] > grid[0, 0, 0, 4] > 0
    samples = field.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    assert (samples.T @ samples / len(samples) - covariance).abs().max() < 0.05


def test_the_spectrum_is_the_stated_one():
    # Of a field wrapped whole around its torus, the variances are the spectrum; the window holds a quarter of it.
    field, side = gaussian_field(4, length=3.0, exponent=2.0), 8
    k = 2 * torch.pi * torch.fft.fftfreq(side).double()
    power = (1 / 9 + k[:, None] ** 2 + k**2) ** -2.0
    waves = torch.cos(torch.arange(4)[:, None].double() * k)  # (4, 8)
    expected = torch.einsum("kl,k,l->", power, waves[2], waves[3]) / power.sum()
    assert torch.isclose(field.covariance[0, 2 * 4 + 3], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.999, 0.5, 0.01])
def test_denoisers_are_gaussian_conditioning(field, kind, alpha):
    seen, d = observation(kind, SIDE, noise=0.3), SIDE**2
    alpha = torch.tensor(alpha).double()
    generator = torch.Generator().manual_seed(0)
    pictures = field.sample(2, generator)
    noise = torch.randn(pictures.shape, generator=generator).double()
    noisy, observed = alpha.sqrt() * pictures + (1 - alpha).sqrt() * noise, seen.observe(pictures, generator)
    # (ε, z, y) as one Gaussian: B maps (x, ε, n) onto it.
    a, k, one = seen.matrix, len(seen.matrix), torch.eye(d).double()
    b = torch.zeros(2 * d + k, 2 * d + k).double()
    b[:d, d : 2 * d] = one
    b[d : 2 * d, :d], b[d : 2 * d, d : 2 * d] = alpha.sqrt() * one, (1 - alpha).sqrt() * one
    b[2 * d :, :d], b[2 * d :, 2 * d :] = a, 0.3 * torch.eye(k)
    joint = b @ torch.block_diag(field.covariance, torch.eye(d + k).double()) @ b.T

    alphas = alpha.expand(2)
    prior, posterior = field.denoise(noisy, alphas), seen.posterior(field).denoise(noisy, alphas, observed)
    for i in range(2):
        mean, covariance = conditional(joint[: 2 * d, : 2 * d], d, noisy[i].flatten())
        assert torch.allclose(prior[i].flatten(), mean)
        assert torch.allclose(field.loss(alphas)[i], covariance.trace() / d)
        mean, covariance = conditional(joint, d + k, torch.cat([noisy[i].flatten(), observed[i].flatten()]))
        assert torch.allclose(posterior[i].flatten(), mean, atol=1e-7)
        assert torch.allclose(seen.posterior(field).around.loss(alphas)[i], covariance.trace() / d)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_what_monte_carlo_finds(field, kind):
    generator, count = torch.Generator().manual_seed(1), 4000
    seen = observation(kind, SIDE)
    posterior = seen.posterior(field)
    pictures = field.sample(count, generator)
    observed = seen.observe(pictures, generator)
    noise = torch.randn(pictures.shape, generator=generator).double()
    alpha = torch.full((count,), 0.7).double()
    noisy = 0.7**0.5 * pictures + 0.3**0.5 * noise
    for guess, expected in (
        (field.denoise(noisy, alpha), field.loss(alpha[:1])),
        (posterior.denoise(noisy, alpha, observed), posterior.around.loss(alpha[:1])),
    ):
        assert torch.isclose((guess - noise).square().mean(), expected[0], rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_over_all_noise_levels_is_the_mutual_information(field, kind):
    seen = observation(kind, SIDE)
    log_snr = torch.linspace(-30, 30, 4001).double()
    alpha = log_snr.sigmoid()
    gap = field.loss(alpha) - seen.posterior(field).around.loss(alpha)
    assert gap.min() > 0
    information = SIDE**2 / 2 * torch.trapezoid(gap, log_snr).item()
    assert information == pytest.approx(seen.information(field), rel=1e-6)
    singular = torch.linalg.eigvalsh(seen.matrix @ field.covariance @ seen.matrix.T) / 0.2**2
    assert seen.information(field) == pytest.approx(singular.log1p().sum().item() / 2)


def test_maps_do_what_their_names_say():
    picture = torch.arange(16).double().view(1, 1, 4, 4) ** 2
    still = {"side": 4, "noise": 0.0}
    assert torch.allclose(observation("blur", **still).observe(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4).double())
    impulse = torch.zeros(1, 1, 9, 9)
    impulse[..., 4, 4] = 1
    blurred = observation("blur", 9, 0.0).observe(impulse)[0, 0]
    distance = torch.arange(-4, 5).double()
    kernel = torch.exp(-(distance**2) / (2 * BLUR_PIXELS**2))
    assert torch.isclose(blurred[4, 6] / blurred[4, 4], kernel[6] / kernel[4], rtol=0.05)  # the rim is renormalised
    masked = observation("mask", **still).observe(picture)
    assert torch.equal(masked[..., :2], picture[..., :2]) and not masked[..., 2:].any()
    right, down = observation("edges", **still).observe(picture)[0]
    assert torch.equal(right[:, :3], picture[0, 0].diff(dim=1)) and not right[:, 3].any()
    assert torch.equal(down[:3], picture[0, 0].diff(dim=0)) and not down[3].any()
    with pytest.raises(PowersteerError, match="must be blur, mask, edges, not 'sketch'"):
        observation("sketch")


def test_spread_is_the_largest_deviation_observed(field):
    seen = observation("edges", SIDE)
    observed = seen.observe(field.sample(20_000, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(3))
    assert seen.spread(field) == pytest.approx(observed.std(0).max().item(), rel=0.02)
