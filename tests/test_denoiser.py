"""Preconditioning against EDM's equations in numpy, and unit variance of what the network is asked for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_jax.diffusion import bnr, dct, process
from warm_jax.models import denoiser

SHAPE = (8, 12, 1)
LAM = np.pi**2 * ((np.arange(8) / 8)[:, None] ** 2 + (np.arange(12) / 12) ** 2)
POWER = 0.3 / (LAM + 0.05)
T = jnp.asarray([0.002, 0.1, 0.7, 5.0, 80.0])


class Network(nn.Module):
    """A stand-in whose answer is a known function of what it is given."""

    heads: int

    @nn.compact
    def __call__(self, x, condition, second=None, class_labels=None, augment_labels=None, train=False):
        gain = self.param("gain", nn.initializers.ones, ())
        raw = gain * jnp.tanh(x) + condition[:, None, None, None]
        if second is not None:
            raw = jnp.concatenate([raw, second[:, None, None, None] * x], -1)
        return raw


def test_no_blur_is_edm(key):
    """Karras et al. 2022, table 1 and equation 8, transcribed in float64."""
    p = process.hot(SHAPE)
    model = denoiser.Denoiser(Network(1), p, denoiser.edm)
    params = model.init(key)
    x = np.random.RandomState(0).randn(5, *SHAPE) * (1 + np.asarray(T))[:, None, None, None]
    prediction = model.predict(params, jnp.asarray(x, jnp.float32), T)
    sigma = np.asarray(T, np.float64)[:, None, None, None]
    c_skip = 0.5**2 / (sigma**2 + 0.5**2)
    c_out = sigma * 0.5 / np.sqrt(0.5**2 + sigma**2)
    c_in = 1 / np.sqrt(0.5**2 + sigma**2)
    expected = c_skip * x + c_out * (np.tanh(c_in * x) + np.log(sigma) / 4)
    np.testing.assert_allclose(prediction.blurred, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(prediction.residual, 0)
    np.testing.assert_allclose(denoiser.edm(p).weight(T), np.ravel(1 / c_out**2), rtol=1e-5)


def test_blur_reaches_the_network_and_the_second_head(key):
    p = process.warm(SHAPE, bnr.constant(0.5))
    model = denoiser.Denoiser(Network(2), p, functools.partial(denoiser.edm, sigma_data=0.25))
    x = jnp.ones((5, *SHAPE))
    residual = model.predict(model.init(key), x, T).residual
    t = np.asarray(T, np.float64)[:, None, None, None]
    total = t**2 + 0.25**2
    expected = t * 0.25 / np.sqrt(total) * np.log1p(0.5 * t / 0.01) / 4 / np.sqrt(total) * np.ones(SHAPE)
    np.testing.assert_allclose(residual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_spectral_targets_have_unit_variance(key, ratio, beta):
    """For Gaussian data of that spectrum what is left for F_D, and for F_R, and the input, have mean square one."""
    p, n = process.warm(SHAPE, bnr.constant(ratio)), 3000
    precondition, t = denoiser.spectral(p, POWER), jnp.full(n, beta)
    noise = jax.random.normal(key, (n, *SHAPE))
    x0 = dct.idct2(jnp.sqrt(jnp.asarray(POWER, jnp.float32))[..., None] * noise)
    x, blurred, residual = p.corrupt(jax.random.key(1), x0, t)
    zero, one = jnp.zeros_like(x), jnp.ones_like(x)
    linear, shifted = precondition.combine(x, t, zero, zero), precondition.combine(x, t, one, one)
    tolerance = 6 * np.sqrt(2 / n)
    for target, base, moved in zip((blurred, residual), linear, shifted, strict=True):
        scale = np.mean(moved - base)
        if ratio or target is blurred:
            np.testing.assert_allclose(np.mean(np.square((target - base) / scale)), 1, rtol=tolerance)
    np.testing.assert_allclose(np.mean(np.square(precondition.scale(t)[:, None, None, None] * x)), 1, rtol=tolerance)
    remaining = POWER * np.exp(-((ratio * beta) ** 2) * LAM)
    c2 = np.mean(remaining * beta**2 / (remaining + beta**2))
    np.testing.assert_allclose(precondition.weight(t)[0], 1 / c2, rtol=1e-4)


def test_spectral_with_a_flat_spectrum_and_no_blur_is_edm(key):
    p = process.hot(SHAPE)
    x, raw = jax.random.normal(key, (5, *SHAPE)), jax.random.normal(jax.random.key(1), (5, *SHAPE))
    ours, edm = denoiser.spectral(p, np.full((8, 12), 0.25)), denoiser.edm(p)
    np.testing.assert_allclose(ours.combine(x, T, raw).blurred, edm.combine(x, T, raw).blurred, atol=1e-5)
    np.testing.assert_allclose(ours.scale(T), edm.scale(T), rtol=1e-5)
    np.testing.assert_allclose(ours.weight(T), edm.weight(T), rtol=1e-5)


def test_bad_settings_are_named():
    p = process.hot(SHAPE)
    with pytest.raises(ValueError, match="sigma_data must be finite and above 0, not 0"):
        denoiser.edm(p, 0.0)
    with pytest.raises(ValueError, match=r"the spectrum is \(4, 4\)"):
        denoiser.spectral(p, np.ones((4, 4)))
