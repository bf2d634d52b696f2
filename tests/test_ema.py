"""Power-function averages against EDM2's numbers, scipy's integrals, and averages tracked directly in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from warm_jax.diffusion import ema
from warm_jax.diffusion.ema import Profile


def weights(gamma, t):
    """What an average at step t gives to the parameters of steps 1 to t: the integral of its profile over each."""
    edges = (np.arange(t + 1) / t) ** (gamma + 1)
    return np.diff(edges)


def density(profile):
    return lambda tau: (profile.gamma + 1) * tau**profile.gamma / profile.step ** (profile.gamma + 1)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_published_exponents(sigma_rel, gamma):
    """Karras et al. 2024, §3.1."""
    assert ema.gamma(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("gamma", [0, 0.5, 3, 6.94, 16.97, 200, 990])
def test_relative_length_is_the_spread_of_the_profile(gamma):
    """On [0, 1] the profile is the Beta distribution of γ + 1 and 1."""
    expected = scipy.stats.beta(gamma + 1, 1).std()
    assert ema.sigma_rel(gamma) == pytest.approx(expected, rel=1e-9)
    assert ema.gamma(expected * (1 - 1e-12)) == pytest.approx(gamma, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("value", [0, -0.1, 0.289, 0.5, 1, float("nan"), "0.1", None, 1e-4])
def test_lengths_that_no_average_has(value):
    with pytest.raises(ValueError, match=r"--ema is .*; a relative length σ_rel is from 0.001 to 0.2887"):
        ema.check_sigma_rel(value, "--ema")


PROFILES = [Profile(*pair) for pair in ((100, 16.97), (100, 6.94), (37, 16.97), (60.5, 0.3), (250, 40.0), (3, 0))]


def test_inner_products_are_integrals():
    found = ema.inner_products(PROFILES, PROFILES)
    for i, one in enumerate(PROFILES):
        for j, other in enumerate(PROFILES):
            f, g = density(one), density(other)
            expected, _ = scipy.integrate.quad(lambda x, f=f, g=g: f(x) * g(x), 0, min(one.step, other.step))
            assert found[i, j] == pytest.approx(expected, rel=1e-7)
    late = ema.inner_products([Profile(2_000_000, 16.97)], [Profile(1_900_000, 996.0)])[0, 0]
    assert 0 < late < 1  # of powers that float64 does not have


def test_the_error_of_a_fit_is_that_of_its_profile():
    stored = [Profile(step, gamma) for step in (20, 45, 70, 100) for gamma in (16.97, 6.94)]
    for wanted in (Profile(100, ema.gamma(0.07)), Profile(100, ema.gamma(0.2))):
        x, error = ema.fit(stored, wanted)

        def off(tau, x=x, wanted=wanted):
            made = sum(c * density(p)(tau) for c, p in zip(x, stored, strict=True) if tau <= p.step)
            return (made - density(wanted)(tau)) ** 2

        squared, _ = scipy.integrate.quad(off, 0, 100, points=[20, 45, 70], limit=400)
        norm, _ = scipy.integrate.quad(lambda tau, wanted=wanted: density(wanted)(tau) ** 2, 0, 100)
        assert error == pytest.approx(np.sqrt(squared / norm), rel=1e-4)
        assert x.sum() == pytest.approx(1, abs=1e-12)
        # And no other sum of weight 1 comes closer.
        rng = np.random.default_rng(0)
        for _ in range(20):
            move = rng.normal(size=len(x)) * 0.01
            other = x + move - move.mean()
            distance = other @ ema.inner_products(stored, stored) @ other
            distance -= 2 * ema.inner_products(stored, [wanted])[:, 0] @ other
            assert np.sqrt((distance + norm) / norm) > error


def test_a_tracked_average_is_itself():
    stored = [Profile(step, gamma) for step in (20, 45, 70, 100) for gamma in (16.97, 6.94)]
    x, error = ema.fit(stored, stored[-1])
    np.testing.assert_allclose(x, np.eye(8)[-1], atol=1e-9)
    assert error < 1e-6


@pytest.mark.parametrize("lengths", [(0.05, 0.1, 0.15, 0.2, 0.25), (0.1, 0.1001), (0.05, 0.1)])
def test_the_error_of_a_fit_is_true_where_the_profiles_are_alike(lengths):
    """Of 40 snapshots: what is made of averages rounded as float32 rounds them is as far off as the fit says."""
    stored = [Profile(step, ema.gamma(length)) for step in range(50, 2001, 50) for length in lengths]
    grid = (np.arange(20_000) + 0.5) / 10  # to step 2000
    rows = np.stack([np.where(grid <= p.step, density(p)(grid), 0) for p in stored])
    rounded = rows * (1 + np.random.default_rng(0).uniform(-6e-8, 6e-8, (len(stored), 1)))
    for length in (0.08, 0.15, lengths[-1]):
        wanted = Profile(2000, ema.gamma(length))
        x, error = ema.fit(stored, wanted)
        off = np.linalg.norm(x @ rounded - density(wanted)(grid)) / np.linalg.norm(density(wanted)(grid))
        assert x.sum() == pytest.approx(1, abs=1e-7) and np.abs(x).sum() < 1000
        assert off == pytest.approx(error, rel=0.02, abs=1e-5) and error < 0.02
        assert length != lengths[-1] or (error == 0 and np.abs(x).sum() == 1)


def trajectory(steps):
    """θ(1), …, θ(steps): a walk that settles, in float64."""
    rng = np.random.default_rng(0)
    decay = np.exp(-3 * np.arange(steps) / steps)[:, None]
    return np.cumsum(rng.normal(size=(steps, 50)) * decay * 0.1, axis=0) + 3


def test_an_untracked_average_is_the_one_that_is_tracked_directly():
    """2,000 steps, 40 snapshots of σ_rel 0.05 and 0.10. Within the bound that the profile's error gives; of lengths
    between and near the tracked ones within 0.1 % of the distance between those two, and of further ones within 1 %."""
    t, tracked = 2000, [ema.gamma(s) for s in (0.05, 0.10)]
    theta, times = trajectory(t), range(50, t + 1, 50)
    stored = [Profile(step, gamma) for step in times for gamma in tracked]
    snapshots = np.stack([weights(p.gamma, p.step) @ theta[: p.step] for p in stored])
    apart = np.linalg.norm(snapshots[-1] - snapshots[-2])
    for sigma_rel in (0.02, 0.03, 0.06, 0.08, 0.12, 0.2, 0.25):
        wanted = Profile(t, ema.gamma(sigma_rel))
        direct = weights(wanted.gamma, t) @ theta
        x, error = ema.fit(stored, wanted)
        off = np.linalg.norm(x @ snapshots - direct)
        # Cauchy and Schwarz, of θ less its last value: the coefficients sum to 1, so a constant is no error.
        norm = np.sqrt(ema.inner_products([wanted], [wanted])[0, 0])
        assert off <= error * norm * np.linalg.norm(theta - theta[-1])
        if sigma_rel <= 0.2:
            assert off < (1e-3 if 0.06 <= sigma_rel <= 0.12 else 1e-2) * apart, sigma_rel


def test_the_step_by_step_update_is_the_weighted_sum():
    theta, average = trajectory(200), {"w": jnp.full(50, jnp.nan)}
    average = {"w": jnp.zeros(50)}
    for gamma in (16.97, 0.0):
        for step in range(1, 201):
            average = ema.update(average, {"w": jnp.asarray(theta[step - 1])}, gamma, jnp.asarray(step))
        np.testing.assert_allclose(average["w"], weights(gamma, 200) @ theta, rtol=2e-6)


@pytest.mark.parametrize("step", [1, 2, 1000, 390_625, 10_000_000])
def test_the_share_of_a_late_step(step):
    """1 - (1 - 1/t)^(γ+1) in float64, and what float32 has left of it; computed from β it would be off by percents."""
    share = ema.update(jnp.zeros(()), jnp.ones(()), 16.97, jnp.asarray(step))
    expected = -np.expm1(17.97 * np.log1p(-1 / step)) if step > 1 else 1
    np.testing.assert_allclose(share, expected, rtol=2e-6)
    still = ema.update(jnp.full((), 0.3), jnp.full((), 0.3), 16.97, jnp.asarray(step))
    assert float(still) == np.float32(0.3)
