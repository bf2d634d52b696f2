"""Blur against scipy: its DCT in float64, its Gaussian filter, and the algebra of the heat equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage

from warm_jax.diffusion import dct

SHAPES = [(1, 1), (8, 8), (7, 12), (32, 20), (64, 64)]


def images(shape, seed=0, n=3, c=2):
    return np.random.RandomState(seed).randn(n, *shape, c)


def filtered(x, factor):
    return scipy.fft.idctn(factor * scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho")


@pytest.mark.parametrize("shape", SHAPES)
def test_dct_equals_scipy(shape):
    x = images(shape)
    expected = scipy.fft.dctn(x, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(dct.dct2(jnp.asarray(x, jnp.float32)), expected, atol=2e-5)
    np.testing.assert_allclose(dct.idct2(jnp.asarray(expected, jnp.float32)), x, atol=2e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(dct.dct2(jnp.asarray(x)), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 31, 128])
def test_matrix_is_orthonormal(n):
    q = dct.matrix(n)
    np.testing.assert_allclose(q.T @ q, np.eye(n), atol=1e-13)


@pytest.mark.parametrize("shape", [(64, 64), (64, 48)])
@pytest.mark.parametrize("alpha", [2.0, 3.5, 6.0])
def test_blur_equals_gaussian_filter(shape, alpha):
    # Below α = 2 a sampled Gaussian and the heat equation differ by aliasing; "reflect" is half-sample symmetry.
    x = images(shape)
    expected = scipy.ndimage.gaussian_filter(x, (0, alpha, alpha, 0), mode="reflect", truncate=8)
    np.testing.assert_allclose(dct.blur(jnp.asarray(x, jnp.float32), alpha), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_equals_scipy_attenuation(shape):
    x, alpha = images(shape), np.array([0.0, 0.7, 9.0])
    k, j = np.arange(shape[0]) / shape[0], np.arange(shape[1]) / shape[1]
    factor = np.exp(-(alpha[:, None, None, None] ** 2) / 2 * np.pi**2 * (k[:, None] ** 2 + j**2)[None, ..., None])
    expected = scipy.fft.idctn(factor * scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(
        dct.blur(jnp.asarray(x, jnp.float32), jnp.asarray(alpha, jnp.float32)), expected, atol=2e-5
    )


def test_blurs_add_in_variance_and_keep_the_mean():
    x = jnp.asarray(images((16, 24)), jnp.float32)
    np.testing.assert_allclose(dct.blur(dct.blur(x, 1.5), 2.0), dct.blur(x, 2.5), atol=1e-5)
    np.testing.assert_allclose(dct.blur(x, 0.0), x, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(dct.blur(x, 7.0), (1, 2)), jnp.mean(x, (1, 2)), atol=1e-6)


def test_one_trace_for_every_alpha_and_one_alpha_an_image():
    traces = []

    @jax.jit
    def blur(x, alpha):
        traces.append(alpha.shape)
        return dct.blur(x, alpha)

    x, alphas = jnp.asarray(images((8, 8)), jnp.float32), jnp.asarray([0.5, 1.0, 3.0])
    each = [blur(x, alpha)[i] for i, alpha in enumerate(alphas)]
    assert traces == [()]
    np.testing.assert_allclose(blur(x, alphas), jnp.stack(each), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(dct.blur)(x, alphas), jnp.stack(each), atol=1e-6)


def test_gradient_in_alpha_is_the_heat_equation():
    # d/dα of exp(-α² λ / 2) is -α λ times it: the gradient of <w, B_α x> against scipy in float64.
    x, w = images((8, 6), 1, n=1), images((8, 6), 2, n=1)
    factor = lambda a: np.exp(-(a**2) / 2 * lam) * -a * lam  # noqa: E731
    lam = np.pi**2 * ((np.arange(8) / 8)[:, None] ** 2 + (np.arange(6) / 6) ** 2)[None, ..., None]
    expected = np.sum(
        w * scipy.fft.idctn(factor(1.3) * scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), axes=(1, 2), norm="ortho")
    )
    with jax.enable_x64(True):
        gradient = jax.grad(lambda a: jnp.sum(jnp.asarray(w) * dct.blur(jnp.asarray(x), a)))(1.3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


def test_power_of_white_noise_is_flat_and_parseval_holds():
    x = images((8, 8), n=4000, c=1)
    power = dct.power(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(power, 1, atol=6 * np.sqrt(2 / 4000))
    np.testing.assert_allclose(jnp.sum(power), np.mean(np.sum(x**2, (1, 2, 3))), rtol=1e-5)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\)"):
        dct.blur(jnp.zeros((3, 8, 8, 1)), jnp.zeros(2))
    with pytest.raises(ValueError, match="at least 1 sample"):
        dct.matrix(0)
