"""The corruption's moments in closed form, and the levels against a transcription of EDM's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.stats

from warm_jax.diffusion import bnr, process

SHAPE = (6, 4, 2)


def test_corruption_has_the_closed_form_moments(key):
    # Given x0, x_t has mean B_α x0 and covariance β² I; scipy's DCT makes the mean.
    p, beta, n = process.warm(SHAPE, bnr.constant(0.5)), 0.8, 20000
    x0 = np.random.RandomState(0).uniform(-1, 1, SHAPE).astype(np.float32)
    x, blurred, residual = p.corrupt(key, jnp.broadcast_to(x0, (n, *SHAPE)), jnp.full(n, beta))
    k, j = np.arange(6) / 6, np.arange(4) / 4
    factor = np.exp(-((0.5 * beta) ** 2) / 2 * np.pi**2 * (k[:, None] ** 2 + j**2))[..., None]
    mean = scipy.fft.idctn(factor * scipy.fft.dctn(x0, axes=(0, 1), norm="ortho"), axes=(0, 1), norm="ortho")
    np.testing.assert_allclose(blurred[0], mean, atol=1e-5)
    np.testing.assert_allclose(residual[-1], x0 - mean, atol=1e-5)
    np.testing.assert_allclose(np.mean(x, 0), mean, atol=5 * beta / np.sqrt(n))
    covariance = np.cov(np.asarray(x).reshape(n, -1).T)
    np.testing.assert_allclose(covariance, beta**2 * np.eye(48), atol=6 * beta**2 / np.sqrt(n))


def test_each_image_has_its_own_level(key):
    p = process.warm(SHAPE, bnr.constant(2.0))
    x0 = jax.random.normal(key, (2, *SHAPE))
    _, blurred, _ = p.corrupt(key, x0, jnp.asarray([1e-3, 100.0]))
    np.testing.assert_allclose(blurred[0], x0[0], atol=1e-4)
    np.testing.assert_allclose(blurred[1], jnp.broadcast_to(jnp.mean(x0[1], (0, 1)), SHAPE), atol=1e-5)


def test_hot_is_noise_alone(key):
    p = process.hot(SHAPE)
    x0 = jax.random.normal(key, (5, *SHAPE))
    x, blurred, residual = p.corrupt(key, x0, jnp.full(5, 2.0))
    np.testing.assert_allclose(blurred, x0, atol=2e-6)
    np.testing.assert_allclose(residual, 0, atol=2e-6)
    np.testing.assert_allclose(x - blurred, 2 * jax.random.normal(key, x0.shape), atol=2e-6)
    assert not p.blurs and process.warm(SHAPE, bnr.constant(0.5)).blurs


def test_training_levels_are_log_normal(key):
    t = process.hot(SHAPE).draw_levels(key, 20000)
    assert scipy.stats.kstest((np.log(t) + 1.2) / 1.2, "norm").pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 18, 256])
def test_grid_is_edms(n):
    levels = process.hot(SHAPE).levels(n)
    assert levels.dtype == np.float64 and levels.shape == (n + 1,)
    for i in range(n):
        a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
        np.testing.assert_allclose(levels[i], (a + i / max(n - 1, 1) * (b - a)) ** 7, rtol=1e-12)
    assert levels[-1] == 0


def test_prior_is_noise_of_the_highest_level(key):
    x = process.warm(SHAPE, bnr.constant(0.5)).prior(key, (2000, *SHAPE))
    assert scipy.stats.kstest(np.ravel(x) / 80, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_min": 0.0}, "0 < beta_min < beta_max"),
        ({"beta_max": 1e-3}, "0 < beta_min < beta_max"),
        ({"rho": -1.0}, "rho must be"),
        ({"P_std": float("nan")}, "P_std must be"),
    ],
)
def test_bad_levels_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        process.hot(SHAPE, **change)


def test_bad_shapes_and_counts_are_named():
    with pytest.raises(ValueError, match="height, width, channels"):
        process.hot((0, 8, 3))
    with pytest.raises(ValueError, match="at least 1 step"):
        process.hot(SHAPE).levels(0)
