"""The loss at the optimum, and the oracles, against closed forms and dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.special

from warm_jax.diffusion import bnr, dct, loss, oracle, process
from warm_jax.models import denoiser

H, W = 6, 8
LAM = np.pi**2 * ((np.arange(H) / H)[:, None] ** 2 + (np.arange(W) / W) ** 2)
POWER = 0.3 / (LAM + 0.3)


def gaussian_images(key, n):
    return dct.idct2(jnp.sqrt(jnp.asarray(POWER, jnp.float32))[..., None] * jax.random.normal(key, (n, H, W, 1)))


def dense_blur(alpha):
    """B_α as a matrix over the H·W pixels, from scipy's DCT of the identity."""
    q = np.kron(*(scipy.fft.dct(np.eye(n), axis=0, norm="ortho") for n in (H, W)))
    return q.T @ np.diag(np.exp(-(alpha**2) * LAM / 2).ravel()) @ q, q


@pytest.mark.parametrize(("ratio", "beta"), [(0.0, 0.3), (0.5, 0.3), (0.5, 4.0), (2.0, 1.0)])
def test_gaussian_oracle_is_dense_conditioning(key, ratio, beta):
    """E[x0 | x] = Σ Bᵀ (B Σ Bᵀ + β² I)⁻¹ x, with matrices over pixels in float64."""
    p = process.warm((H, W, 1), bnr.constant(ratio))
    b, q = dense_blur(ratio * beta)
    covariance = q.T @ np.diag(POWER.ravel()) @ q
    x = np.random.RandomState(0).randn(3, H * W)
    clean = np.linalg.solve(b @ covariance @ b.T + beta**2 * np.eye(H * W), x.T).T @ (covariance @ b.T).T
    prediction = oracle.gaussian(p, POWER)(jnp.asarray(x.reshape(3, H, W, 1), jnp.float32), jnp.full(3, beta))
    np.testing.assert_allclose(np.reshape(prediction.blurred, (3, -1)), clean @ b.T, atol=2e-5)
    np.testing.assert_allclose(np.reshape(prediction.residual, (3, -1)), clean - clean @ b.T, atol=2e-5)


@pytest.mark.parametrize(("ratio", "beta"), [(0.0, 0.5), (0.5, 0.2), (0.5, 2.0), (3.0, 0.7)])
def test_empirical_oracle_is_bayes_rule(key, ratio, beta):
    p = process.warm((H, W, 1), bnr.constant(ratio))
    data = np.random.RandomState(0).uniform(-1, 1, (5, H * W))
    b, _ = dense_blur(ratio * beta)
    x = data[:2] @ b.T + beta * np.random.RandomState(1).randn(2, H * W)
    kernel = -np.sum((x[:, None] - data @ b.T) ** 2, -1) / (2 * beta**2)
    weights = scipy.special.softmax(kernel, 1)
    args = jnp.asarray(x.reshape(2, H, W, 1), jnp.float32), jnp.full(2, beta)
    images = data.reshape(5, H, W, 1).astype(np.float32)
    prediction = oracle.empirical(p, images)(*args)
    np.testing.assert_allclose(np.reshape(prediction.blurred, (2, -1)), weights @ data @ b.T, atol=1e-4)
    np.testing.assert_allclose(np.reshape(prediction.residual, (2, -1)), weights @ (data - data @ b.T), atol=1e-4)
    density = scipy.special.logsumexp(kernel, 1) - np.log(5) - H * W / 2 * np.log(2 * np.pi * beta**2)
    np.testing.assert_allclose(oracle.log_density(p, images)(*args), density, rtol=1e-5)


def test_score_is_the_gradient_of_the_density():
    """Tweedie: ∇ log p = (D̂ - x) / β². The left side by automatic differentiation of the density."""
    p = process.warm((H, W, 1), bnr.constant(0.5))
    images = np.random.RandomState(0).uniform(-1, 1, (5, H, W, 1))
    x, t = np.random.RandomState(1).randn(1, H, W, 1), jnp.ones(1)
    with jax.enable_x64(True):
        x, t = jnp.asarray(x), jnp.full(1, 0.9)
        score = jax.grad(lambda x: oracle.log_density(p, images)(x, t)[0])(x)
        expected = (oracle.empirical(p, images)(x, t).blurred - x) / 0.9**2
    np.testing.assert_allclose(score, expected, rtol=1e-8)


@pytest.mark.parametrize(("ratio", "beta"), [(0.0, 0.5), (0.5, 0.5), (2.0, 1.5)])
def test_loss_of_the_optimal_heads_is_its_analytic_value(key, ratio, beta):
    """Per frequency the posterior variance is P s² / (P a² + s²); the heads see a² and (1 - a)² of it."""
    p, n = process.warm((H, W, 1), bnr.constant(ratio)), 8000
    x, blurred, residual = p.corrupt(key, gaussian_images(jax.random.key(1), n), jnp.full(n, beta))
    example = loss.Example(x, jnp.full(n, beta), blurred, residual)
    weight = denoiser.edm(p).weight
    value, errors = loss.two_head(oracle.gaussian(p, POWER), example, weight, residual_weight=3.0)
    a = np.exp(-((ratio * beta) ** 2) * LAM / 2)
    variance = POWER * beta**2 / (POWER * a**2 + beta**2)
    scale = (beta**2 + 0.25) / (beta * 0.5) ** 2
    noise = 5 * np.sqrt(2 / n)  # of a mean of n sums of squares
    np.testing.assert_allclose(np.mean(errors.blurred), scale * np.sum(a**2 * variance), rtol=noise)
    np.testing.assert_allclose(np.mean(errors.residual), scale * np.sum((1 - a) ** 2 * variance), rtol=noise, atol=1e-9)
    np.testing.assert_allclose(value, scale * np.sum((a**2 + 3 * (1 - a) ** 2) * variance), rtol=noise)


def test_draw_is_the_process_at_its_own_levels(key):
    p = process.warm((H, W, 1), bnr.constant(0.5))
    x0 = gaussian_images(key, 4)
    example = loss.draw(p, key, x0)
    np.testing.assert_allclose(example.blurred + example.residual, x0, atol=1e-6)
    noise = (example.x - example.blurred) / example.t[:, None, None, None]
    np.testing.assert_allclose(np.std(noise), 1, atol=0.25)
    assert len(np.unique(example.t)) == 4
    assert not np.array_equal(loss.draw(p, jax.random.key(5), x0).t, example.t)
