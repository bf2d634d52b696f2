"""What networks are asked for: the raw output that is right gives the true targets, and what an error in it costs."""

import functools

import dense
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_systems import ALL, IMAGES

from warm_jax.diffusion import bnr, dct, loss, process, systems
from warm_jax.models import denoiser

SHAPE = dense.SHAPE
RNG = np.random.RandomState(0)
X0, EPS = RNG.uniform(-1, 1, (4, *SHAPE)), RNG.randn(4, *SHAPE)
ERRORS = 0.1 * RNG.randn(2, 4, *SHAPE)  # made in the raw outputs of two heads
SIGMA = np.array([0.002, 0.3, 1.0, 80.0])  # of EDM's family
SIGMA_DATA = 0.4
C_SKIP = (SIGMA_DATA**2 / (SIGMA**2 + SIGMA_DATA**2))[:, None, None, None]
C_OUT = (SIGMA * SIGMA_DATA / np.sqrt(SIGMA**2 + SIGMA_DATA**2))[:, None, None, None]
S = SIGMA[:, None, None, None]
WARM, RATIO = process.warm(SHAPE, bnr.constant(0.5)), 0.5


def each(x, factors):
    """Images with each its own factor on frequencies."""
    return np.stack([dense.filtered(*pair) for pair in zip(x, factors, strict=True)])


def total(x):
    return np.sum(x, (1, 2, 3))


def combined(around, x, t, raw):
    """(prediction, λ, c_in) of a preconditioning in float64."""
    with jax.enable_x64(True):
        args = jnp.asarray(x), jnp.asarray(t), [jnp.asarray(r) for r in raw]
        run = jax.jit(lambda x, t, raw: (around.combine(x, t, *raw), around.weight(t), around.scale(t)))
        return jax.tree.map(np.asarray, run(*args))


def priced(prediction, t, blurred, residual, weight, errors):
    with jax.enable_x64(True):
        example = loss.Example(*(jnp.asarray(v) for v in (blurred, t, blurred, residual)))  # of x nothing is asked
        return errors(process.Prediction(*map(jnp.asarray, prediction)), example, lambda t: jnp.asarray(weight))


def wrong(raw):
    return [r + e for r, e in zip(raw, ERRORS, strict=False)]


FAMILY = {  # the right raw outputs, λ, and λ |D̂ - D|², λ |R̂ - R|² for raw errors e: EDM's table 1 and each one's name
    "edm": (
        lambda x, d, r: [(d - C_SKIP * x) / C_OUT, r / C_OUT],
        1 / C_OUT**2,
        lambda e, f, blur: (e**2, f**2),
    ),
    "clean": (
        lambda x, d, r: [(d + r - C_SKIP * x) / C_OUT],
        1 / C_OUT**2,
        lambda e, f, blur: (blur(e) ** 2, (e - blur(e)) ** 2),
    ),
    "clean_residual": (
        lambda x, d, r: [(d + r - C_SKIP * x) / C_OUT, r / C_OUT],
        1 / C_OUT**2,
        lambda e, f, blur: ((e - f) ** 2, f**2),
    ),
    "noise_residual": (
        lambda x, d, r: [(x - d) / S, r / S],
        1 / S**2,
        lambda e, f, blur: (e**2, f**2),
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_heads_of_edms_family(name):
    solve, weight, cost = FAMILY[name]
    around = getattr(denoiser, name)(WARM, SIGMA_DATA)
    factors = [dense.gauss(RATIO * s) for s in SIGMA]
    d = each(X0, factors)
    x, r = d + S * EPS, X0 - d
    raw = solve(x, d, r)
    assert around.heads == len(raw)
    (blurred, residual), lam, c_in = combined(around, x, SIGMA, raw)
    np.testing.assert_allclose(blurred, d, atol=1e-12)
    np.testing.assert_allclose(residual, r, atol=1e-12)
    np.testing.assert_allclose(lam, weight.ravel(), rtol=1e-12)
    np.testing.assert_allclose(c_in, 1 / np.sqrt(SIGMA**2 + SIGMA_DATA**2), rtol=1e-12)
    if name == "noise_residual":
        np.testing.assert_allclose(raw[0], EPS, atol=1e-9)  # the first head is asked for ε itself
    errors = priced(combined(around, x, SIGMA, wrong(raw))[0], SIGMA, d, r, lam, loss.squared)
    expected = cost(*ERRORS, lambda e: each(e, factors))
    np.testing.assert_allclose(errors.blurred, total(expected[0]), rtol=1e-7)
    np.testing.assert_allclose(errors.residual, total(expected[1]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["clean", "clean_residual"])
def test_without_blur_a_clean_head_is_edms(name):
    around = getattr(denoiser, name)(ALL["hot"], SIGMA_DATA)
    x, raw = (X0 + S * EPS).astype(np.float32), EPS[::-1].astype(np.float32)
    t = jnp.asarray(SIGMA, jnp.float32)
    blurred, residual = jax.jit(around.combine)(x, t, raw)
    np.testing.assert_allclose(blurred, C_SKIP * x + C_OUT * raw, atol=3e-6)
    np.testing.assert_allclose(residual, 0, atol=3e-6)
    np.testing.assert_allclose(around.weight(t), 1 / C_OUT.ravel() ** 2, rtol=1e-5)
    assert around.heads == 1 and len(around.conditions(t)) == 1


def scaled(name):
    """(t, a at each, s at each as `[4, 1, 1, 1]`) of a variance-preserving system, from its paper."""
    t = np.array([0.001, 0.1, 0.5, 1.0])
    if name == "blurring":
        a, s = zip(*map(dense.blurring_schedule, t), strict=True)
    else:
        alpha_bar = dense.linear_alpha_bar()[[1, 100, 500, 1000]] if name == "ddpm" else dense.cosine_alpha_bar(t)
        a, s = [np.full((6, 8), np.sqrt(v)) for v in alpha_bar], np.sqrt(1 - alpha_bar)
    return t, a, np.reshape(s, (4, 1, 1, 1))


@pytest.mark.parametrize("name", ["ddpm", "cosine", "blurring"])
def test_edms_heads_of_a_scaled_process(name):
    """y = x / a_0 is EDM's state with noise σ = s / a_0; its targets are D / a_0 and x0 - D / a_0.

    Errors e, f of the heads cost a_0² e² in D̂ and (f + (1 - a_0) e)² in R̂: λ = 1 / c_out² does not undo the scale.
    """
    t, a, s = scaled(name)
    a_0, d = np.array([v[0, 0] for v in a]).reshape(4, 1, 1, 1), each(X0, a)
    x, sigma = d + s * EPS, s / a_0
    c_out = sigma * SIGMA_DATA / np.sqrt(sigma**2 + SIGMA_DATA**2)
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    raw = [(d / a_0 - c_skip * x / a_0) / c_out, (X0 - d / a_0) / c_out]
    around = denoiser.edm(ALL[name], SIGMA_DATA)
    raw = raw[: around.heads]
    assert around.heads == (2 if name == "blurring" else 1)
    (blurred, residual), lam, c_in = combined(around, x, t, raw)
    np.testing.assert_allclose(blurred, d, atol=1e-11)
    np.testing.assert_allclose(residual, X0 - d, atol=1e-10)
    np.testing.assert_allclose(lam, 1 / c_out.ravel() ** 2, rtol=1e-9)
    np.testing.assert_allclose(c_in, np.ravel(1 / np.sqrt(sigma**2 + SIGMA_DATA**2) / a_0), rtol=1e-9)
    errors = priced(combined(around, x, t, wrong(raw))[0], t, d, X0 - d, lam, loss.squared)
    e, f = ERRORS if name == "blurring" else (ERRORS[0], 0)
    np.testing.assert_allclose(errors.blurred, total((a_0 * e) ** 2), rtol=1e-6)
    np.testing.assert_allclose(errors.residual, total((f + (1 - a_0) * e) ** 2), rtol=1e-6)
    told = around.conditions(jnp.asarray(t, jnp.float32))[0]
    np.testing.assert_allclose(told, np.log(sigma.ravel()) / 4, atol=2e-5)


@pytest.mark.parametrize("name", ["ddpm", "cosine", "blurring"])
def test_one_head_for_the_noise(name):
    """λ |D̂ - D|² = |F - ε|², the unweighted loss of both papers; x̂0 = (x - s F) / a recovers x0."""
    p, (t, a, s) = ALL[name], scaled(name)
    d = each(X0, a)
    x = d + s * EPS
    around = denoiser.noise(p)
    (blurred, residual), lam, c_in = combined(around, x, t, [EPS])
    np.testing.assert_allclose(blurred, d, atol=1e-11)
    np.testing.assert_allclose(blurred + residual, X0, atol=1e-7)  # a ≥ 7e-6 costs digits
    np.testing.assert_array_equal(c_in, 1)
    assert around.heads == 1
    errors = priced(combined(around, x, t, wrong([EPS]))[0], t, d, X0 - d, lam, loss.squared_blurred)
    np.testing.assert_allclose(errors.blurred, total(ERRORS[0] ** 2), rtol=1e-7)
    np.testing.assert_array_equal(errors.residual, 0)
    # The level as the network hears it, ln(s / a_0) / 4, is EDM's ln(σ) / 4 of the same signal-to-noise ratio.
    (told,) = around.conditions(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(told, [np.log(v / u[0, 0]) / 4 for v, u in zip(s.ravel(), a, strict=True)], atol=2e-5)


def test_one_head_for_the_step_back():
    """IHDM: u + F = B_{k-1} x0, the loss the plain sum of squares over pixels."""
    p, k = ALL["ihdm"], np.array([1.0, 2.0, 11.0, 20.0])
    sigma = np.append(0, 0.5 * 48 ** (np.arange(20) / 19))
    before = each(X0, [dense.gauss(sigma[int(i) - 1]) for i in k])
    x = each(X0, [dense.gauss(sigma[int(i)]) for i in k]) + 0.02 * EPS
    around = denoiser.one_step(p)
    prediction, lam, c_in = combined(around, x, k, [before - x])
    np.testing.assert_allclose(prediction.blurred, before, atol=1e-12)
    np.testing.assert_array_equal([lam, c_in], np.ones((2, 4)))
    errors = priced(combined(around, x, k, wrong([before - x]))[0], k, before, X0 - before, lam, loss.squared_blurred)
    np.testing.assert_allclose(errors.blurred, total(ERRORS[0] ** 2), rtol=1e-9)
    np.testing.assert_array_equal(errors.residual, 0)
    (told,) = around.conditions(jnp.asarray(k, jnp.float32))
    np.testing.assert_allclose(told, np.log1p(sigma[k.astype(int)] / 0.01) / 4, rtol=1e-5)


def test_one_head_for_the_image():
    """Cold diffusion: F = x0, the loss the plain sum of absolute errors."""
    p, k = ALL["cold"], np.array([1.0, 2.0, 30.0, 50.0])
    blurs = systems.cold_blurs(0.35 + np.arange(50) / 100, 11)
    d = each(X0, [dense.gauss(blurs[int(i)]) for i in k])
    around = denoiser.direct(p)
    prediction, lam, c_in = combined(around, d, k, [X0])
    np.testing.assert_allclose(prediction.blurred, d, atol=1e-12)
    np.testing.assert_allclose(prediction.residual, X0 - d, atol=1e-12)
    np.testing.assert_array_equal([lam, c_in], np.ones((2, 4)))
    errors = priced(combined(around, d, k, wrong([X0]))[0], k, d, X0 - d, lam, loss.absolute_clean)
    np.testing.assert_allclose(errors.blurred, total(np.abs(ERRORS[0])), rtol=1e-9)
    np.testing.assert_array_equal(errors.residual, 0)


@pytest.mark.parametrize("k", [1, 8, 20])
def test_inverse_heat_dissipation_costs_the_linear_minimum_on_gaussian_data(key, k):
    """E |D̂ - D|² = Σ_f P a_{k-1}² σ² / (P a_k² + σ²): what is left of B_{k-1} x0 given u, for each frequency."""
    p, n = ALL["ihdm"], 4000
    sigma = np.append(0, 0.5 * 48 ** (np.arange(20) / 19))
    here, before = dense.gauss(sigma[k]), dense.gauss(sigma[k - 1])
    wiener = dense.POWER * here * before / (dense.POWER * here**2 + 0.02**2)

    def run(key):
        data_key, noise_key = jax.random.split(key)
        spread = jnp.asarray(np.sqrt(dense.POWER)[..., None], jnp.float32)
        x0 = dct.idct2(spread * jax.random.normal(data_key, (n, *SHAPE)))
        t = jnp.full(n, float(k))
        x, blurred, residual = p.corrupt(noise_key, x0, t)
        around = denoiser.one_step(p)

        def predict(x, t):
            return around.combine(x, t, dct.idct2(jnp.asarray(wiener[..., None] - 1, jnp.float32) * dct.dct2(x)))

        example = loss.Example(x, t, blurred, residual)
        return loss.two_head(predict, example, around.weight, errors=loss.squared_blurred)

    value, errors = jax.jit(run)(key)
    expected = np.sum(dense.POWER * before**2 * 0.02**2 / (dense.POWER * here**2 + 0.02**2))
    spread = np.std(np.asarray(errors.blurred, np.float64)) / np.sqrt(n)
    np.testing.assert_allclose(value, expected, atol=5 * spread)
    assert spread < 0.05 * expected


class Network(nn.Module):
    """A stand-in of known answers: the level for one head, the blur's condition times the input for the other."""

    @nn.compact
    def __call__(self, x, condition, second, class_labels=None, augment_labels=None, train=False):
        gain = self.param("gain", nn.initializers.ones, ())
        return gain * jnp.concatenate([x + condition[:, None, None, None], second[:, None, None, None] * x], -1)


def test_an_amortised_model_is_told_each_images_blur(key):
    """One network, at any ratio: EDM's equations with α = r β, for one r and for a vector of them."""
    p = ALL["amortised"]
    model = denoiser.Denoiser(Network(), p, functools.partial(denoiser.edm, sigma_data=SIGMA_DATA))
    params, x = model.init(key), IMAGES[:4, ..., :1]
    c_in = 1 / np.sqrt(S**2 + SIGMA_DATA**2)
    blurred = C_SKIP * x + C_OUT * (c_in * x + np.log(S) / 4)
    for ratio, followed in (
        (np.full(4, 2.0), p.follow(bnr.constant(2.0))),
        (np.array([0.0, 0.1, 0.5, 3.0]), loss.following(p, jnp.asarray([0.0, 0.1, 0.5, 3.0]))),
    ):
        told = np.log1p(ratio * SIGMA / 0.01)[:, None, None, None] / 4
        of = model.of(followed)
        ours = jax.jit(lambda x, t, of=of: of.predict(params, x, t))(x, jnp.asarray(SIGMA, jnp.float32))
        np.testing.assert_allclose(ours.blurred, blurred, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(ours.residual, C_OUT * told * c_in * x, rtol=2e-5, atol=2e-6)
