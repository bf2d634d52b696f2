"""PFGM++'s noise against the laws of its paper in scipy, and what is built on it: priors, densities, Bayes' rule."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from warm_jax.diffusion import noise, oracle, process

SMALL = (2, 2, 3)  # N = 12


def flat_noise(key, dims, n, shape=SMALL):
    draw = jax.jit(lambda key: noise.student(dims).draw(key, (n, *shape)))
    return np.asarray(draw(key), np.float64).reshape(n, -1)


@pytest.mark.parametrize("dims", [0.5, 2048.0])
def test_radius_and_direction_are_those_of_pfgmpp(key, dims):
    """|ε|² / D = b / (1 - b), b ~ Beta(N/2, D/2) (Xu et al. 2023, section 3.1); the direction uniform on the sphere."""
    x = flat_noise(key, dims, 8000)
    odds = np.sum(x**2, 1) / dims
    assert scipy.stats.kstest(odds / (1 + odds), "beta", args=(6, dims / 2)).pvalue > 1e-3
    u = x / np.sqrt(np.sum(x**2, 1, keepdims=True))
    for j in (0, 5, 11):  # one coordinate of a uniform direction: u² ~ Beta(1/2, (N - 1)/2), either sign
        assert scipy.stats.kstest(u[:, j] ** 2, "beta", args=(0.5, 5.5)).pvalue > 1e-3
        assert scipy.stats.binomtest(int(np.sum(u[:, j] > 0)), len(u)).pvalue > 1e-3
    np.testing.assert_allclose(u.T @ u / len(u), np.eye(12) / 12, atol=6 * np.sqrt(1 / 12 / 14 / len(u)))
    assert scipy.stats.spearmanr(odds, u[:, 0] ** 2).pvalue > 1e-3


@pytest.mark.parametrize("dims", [2048.0, 1e7])
def test_many_dimensions_are_gaussian(key, dims):
    """E ε² = D / (D - 2); as D → ∞ the norm follows the chi law. (At D = 2048 and N = 12 KS cannot tell, n = 8000.)"""
    x = flat_noise(key, dims, 8000)
    np.testing.assert_allclose(np.mean(x**2), dims / (dims - 2), rtol=5 * np.sqrt(2 / x.size))
    np.testing.assert_allclose(np.mean(x**4), 3, rtol=6 * np.sqrt(96 / 9 / x.size))
    assert scipy.stats.kstest(np.linalg.norm(x, axis=1), "chi", args=(12,)).pvalue > 1e-3


def test_the_largest_images_keep_the_law(key):
    # N = 196,608: 1 - b is near 10⁻³ there, where a Beta variable of float32 has few digits left, or none.
    x = flat_noise(key, 128.0, 24, (256, 256, 3))
    assert np.all(np.isfinite(x))
    odds = np.sum(x**2, 1) / 128
    assert scipy.stats.kstest(1 / (1 + odds), "beta", args=(64, 98304)).pvalue > 1e-3


@pytest.mark.parametrize("dims", [3.0, 128.0, 1e7])
def test_student_density_is_scipys(dims):
    x = np.random.RandomState(0).randn(4, 12) * np.array([[0.1], [1], [3], [30]])
    scale = 0.7
    law = scipy.stats.multivariate_t(np.zeros(12), scale**2 * np.eye(12), df=dims)
    distance = jnp.asarray(np.sum(x**2, 1), jnp.float32)
    density = noise.student(dims).log_density(distance, jnp.full(4, scale), 12)
    np.testing.assert_allclose(density, law.logpdf(x), rtol=2e-6, atol=2e-5)


def test_gaussian_density_is_scipys():
    x, scale = np.random.RandomState(0).randn(4, 12), 0.7
    density = noise.GAUSSIAN.log_density(jnp.asarray(np.sum(x**2, 1), jnp.float32), jnp.full(4, scale), 12)
    np.testing.assert_allclose(density, scipy.stats.multivariate_normal(np.zeros(12), scale**2).logpdf(x), rtol=2e-6)


def test_student_density_of_many_dimensions_in_float32():
    # The log-gammas are near 10⁸ at D = 10⁷. Their difference without them: lnΓ(x + m) - lnΓ(x) = Σ_{i<m} ln(x + i).
    dims, n, distance = 1e7, 3072, 3000.0
    expected = np.sum(np.log(dims / 2 + np.arange(n // 2))) - n / 2 * np.log(np.pi * dims)
    expected -= (dims + n) / 2 * np.log1p(distance / dims)
    density = noise.student(dims).log_density(jnp.float32(distance), jnp.float32(1), n)
    np.testing.assert_allclose(density, expected, atol=2e-3)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_dimensions_are_named(bad):
    with pytest.raises(ValueError, match=f"above 0 and finite, not {bad}"):
        noise.student(bad)


def test_prior_and_corruption_carry_the_scale(key):
    """R = r √(b / (1 - b)) with r = σ √D: at σ_max for the prior, at each image's own σ in training."""
    p, n = process.pfgmpp(SMALL, 8.0, beta_max=50.0), 4000
    x0, t = np.random.RandomState(0).rand(n, *SMALL).astype(np.float32), np.linspace(0.1, 3.0, n, dtype=np.float32)
    run = jax.jit(lambda key, x0, t: (p.prior(key, (n, *SMALL)), p.corrupt(jax.random.fold_in(key, 1), x0, t)))
    prior, (x, blurred, residual) = jax.tree.map(np.asarray, run(key, x0, t))
    odds = np.sum(np.square(prior), (1, 2, 3)) / (50.0**2 * 8)
    assert scipy.stats.kstest(odds / (1 + odds), "beta", args=(6, 4)).pvalue > 1e-3
    odds = np.sum(np.square(x - x0), (1, 2, 3)) / (np.square(t) * 8)
    assert scipy.stats.kstest(odds / (1 + odds), "beta", args=(6, 4)).pvalue > 1e-3
    np.testing.assert_allclose(blurred, x0, atol=1e-6)
    np.testing.assert_allclose(residual, 0, atol=1e-6)


@pytest.mark.parametrize("dims", [2.0, 2048.0])
def test_empirical_oracle_is_bayes_rule_under_heavy_tails(dims):
    data = np.random.RandomState(0).uniform(-1, 1, (4, 48))
    x, sigma = 0.5 * np.random.RandomState(1).randn(3, 48), np.array([0.3, 0.6, 4.0])
    laws = [[scipy.stats.multivariate_t(y, s**2 * np.eye(48), df=dims) for y in data] for s in sigma]
    log_likelihood = np.array([[law.logpdf(x[i]) for law in row] for i, row in enumerate(laws)])
    images = data.reshape(4, *dense.SHAPE).astype(np.float32)
    p = process.pfgmpp(dense.SHAPE, dims)
    state = jnp.asarray(x.reshape(3, *dense.SHAPE), jnp.float32), jnp.asarray(sigma, jnp.float32)
    prediction = jax.jit(oracle.empirical(p, images))(*state)
    clean = scipy.special.softmax(log_likelihood, 1) @ data
    np.testing.assert_allclose(np.reshape(prediction.blurred, (3, -1)), clean, atol=2e-4)
    np.testing.assert_allclose(prediction.residual, 0, atol=1e-6)
    density = scipy.special.logsumexp(log_likelihood, 1) - np.log(4)
    np.testing.assert_allclose(jax.jit(oracle.log_density(p, images))(*state), density, rtol=1e-5, atol=1e-4)
