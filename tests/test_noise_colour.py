"""Noise with a level for each frequency, against dense algebra in float64 and hot diffusion of whitened data."""

import dataclasses

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tiny
from test_family_sampling import given_noise, knowing, one_ancestral_step, orders, quick, uneven

from warm_jax.diffusion import bnr, coloured, loss, oracle, process, sampler
from warm_jax.experiments import experiment, family
from warm_jax.models import denoiser
from warm_jax.sampling import trajectories

SHAPE, POWER, LAM, Q = dense.SHAPE, dense.POWER, dense.LAM, dense.Q
EQUAL = np.sqrt(POWER / POWER.mean())  # the colour in which whitened data are flat
RISING = 0.4 + LAM / LAM.max()


def still(colour):
    return lambda t: jnp.broadcast_to(jnp.asarray(colour, t.dtype)[..., None], (*t.shape, *colour.shape, 1))


def moving(t):
    """A colour that changes along the path: whiter and whiter noise towards the data."""
    return 1 + (jnp.asarray(RISING, t.dtype)[..., None] - 1) * (t / (1 + t))[..., None, None, None]


HOT, WARM = process.hot(SHAPE), process.warm(SHAPE, bnr.constant(0.5))
EQUAL_HOT = dataclasses.replace(HOT, colour=still(EQUAL))
MOVING_WARM = dataclasses.replace(WARM, colour=moving)


def scales(t, ratio=0.5):
    """(a, s) `[h, w]` of MOVING_WARM at a scalar t, in numpy."""
    return dense.gauss(ratio * t), t * (1 + (RISING - 1) * t / (1 + t))


# ── Corruption and oracles ───────────────────────────────────────────────────────────────────────────────────────────


def test_moments_and_spectra_of_corrupted_states(key):
    """Mean A x0 and covariance Qᵀ diag(s²) Q given x0; of Gaussian data the power P a² + s²."""
    t, n, rng = 0.8, 6000, np.random.RandomState(0)
    a, s = scales(t)
    one = rng.uniform(-1, 1, SHAPE).astype(np.float32)
    many = (np.sqrt(POWER).ravel() * rng.randn(n, 48) @ Q).reshape(n, *SHAPE).astype(np.float32)
    corrupt = jax.jit(MOVING_WARM.corrupt)
    x, blurred, residual = corrupt(key, np.broadcast_to(one, (n, *SHAPE)), jnp.full(n, t))
    mean = dense.filtered(one, a)
    np.testing.assert_allclose(blurred[0], mean, atol=1e-5)
    np.testing.assert_allclose(residual[0], one - mean, atol=1e-5)
    np.testing.assert_allclose(np.mean(x, 0), mean, atol=5 * s.max() / np.sqrt(n))
    covariance = np.cov(np.asarray(x).reshape(n, -1).T)
    np.testing.assert_allclose(covariance, dense.matrix(s**2), atol=6 * s.max() ** 2 / np.sqrt(n))
    found = np.mean((np.asarray(corrupt(key, many, jnp.full(n, t))[0]).reshape(n, 48) @ Q.T) ** 2, 0)
    np.testing.assert_allclose(found, (POWER * a**2 + s**2).ravel(), rtol=5 * np.sqrt(2 / n))


def test_states_are_shown_by_the_noise_of_all_frequencies():
    """σ_d / √(σ_d² a_0² + mean s²)."""
    shown = trajectories.scales(MOVING_WARM, np.array([2.0, 0.5]), 0.5)
    np.testing.assert_allclose(shown, [0.5 / np.sqrt(0.25 + np.mean(scales(t)[1] ** 2)) for t in (2.0, 0.5)], rtol=1e-5)


def test_the_prior_has_the_colour_of_the_highest_level(key):
    x = quick(lambda key: MOVING_WARM.prior(key, (2000, *SHAPE)))(key)
    z = np.reshape(x, (2000, 48)) @ Q.T / scales(80.0)[1].ravel()
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 1e-3


def test_oracles_are_dense_conditioning():
    """E[x0 | x] = Σ Aᵀ (A Σ Aᵀ + S)⁻¹ x; Bayes' rule with scipy's normal densities of covariance S."""
    t, rng = 3.0, np.random.RandomState(0)
    a, s = (dense.matrix(factor) for factor in scales(t))
    covariance, x = dense.matrix(POWER), rng.randn(3, 48)
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + s @ s)
    states, levels = jnp.asarray(x.reshape(3, *SHAPE), jnp.float32), jnp.full(3, t)
    prediction = quick(oracle.gaussian(MOVING_WARM, POWER))(states, levels)
    np.testing.assert_allclose(np.reshape(prediction.blurred, (3, -1)), x @ (a @ gain).T, atol=2e-5)
    np.testing.assert_allclose(np.reshape(prediction.residual, (3, -1)), x @ (gain - a @ gain).T, atol=2e-5)

    images = rng.uniform(-1, 1, (5, *SHAPE)).astype(np.float32)
    means = images.reshape(5, 48) @ a.T
    x = means[:3] + 0.6 * x @ s.T
    states = jnp.asarray(x.reshape(3, *SHAPE), jnp.float32)
    logs = np.stack([scipy.stats.multivariate_normal.logpdf(x, mean, s @ s) for mean in means], 1)
    weights = scipy.special.softmax(logs, 1)
    assert 0.01 < weights.max(1).min() < 0.99
    prediction = quick(oracle.empirical(MOVING_WARM, images))(states, levels)
    np.testing.assert_allclose(np.reshape(prediction.blurred, (3, -1)), weights @ means, atol=2e-4)
    density = quick(oracle.log_density(MOVING_WARM, images))(states, levels)
    np.testing.assert_allclose(density, scipy.special.logsumexp(logs, 1) - np.log(5), rtol=1e-5)


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("solver", ["multistep3", "stochastic"])
def test_equal_snr_is_hot_diffusion_of_whitened_data(solver):
    """Of an exact predictor that is not linear: the images of a set and of the whitened set. All states and x̂0.

    `stochastic` has Heun's step in it, and that Euler's.
    """
    rng, keys = np.random.RandomState(0), jax.random.split(jax.random.key(1), 2)
    images, start = rng.uniform(-1, 1, (4, *SHAPE)), rng.randn(2, *SHAPE)
    levels, churn = np.array([3.0, 1.1, 0.4, 0.1, 0.0]), sampler.Churn(S_churn=1.0)

    def run(p, images, x):
        return sampler.sample(
            oracle.empirical(p, images), p, x, levels, solver=solver, keys=keys, churn=churn, trajectory=True
        )

    with jax.enable_x64(True):
        out, record = quick(lambda *given: run(EQUAL_HOT, *given))(images, dense.filtered(start, 3 * EQUAL))
        expected, white = quick(lambda *given: run(HOT, *given))(dense.filtered(images, 1 / EQUAL), 3 * start)
    np.testing.assert_allclose(out, dense.filtered(expected, EQUAL), atol=1e-10)
    np.testing.assert_allclose(record.states, dense.filtered(white.states, EQUAL), atol=1e-10)
    np.testing.assert_allclose(record.clean, dense.filtered(white.clean, EQUAL), atol=1e-10)
    assert int(record.nfe) == int(white.nfe)


def test_white_noise_given_as_a_colour_is_white_noise(key):
    levels = WARM.levels(6)
    outs = []
    for p in (WARM, dataclasses.replace(WARM, colour=still(np.ones((6, 8))))):

        def run(key, p=p):
            x = p.prior(key, (2, *SHAPE))
            return sampler.sample(oracle.gaussian(p, POWER), p, x, levels)[0]

        outs.append(quick(run)(key))
    np.testing.assert_allclose(*outs, atol=1e-4)


def test_white_noise_costs_nothing():
    """The products of a corruption: two each for dct and idct. The levels of the noise stay one number an image."""
    x, t = jnp.zeros((2, *SHAPE)), jnp.ones(2)
    for p, products in ((WARM, 4), (MOVING_WARM, 8)):
        text = str(jax.make_jaxpr(p.corrupt)(jax.random.key(0), x, t))
        assert text.count("dot_general") == products
    assert WARM.deviation(t).shape == (2, 1, 1, 1) and MOVING_WARM.deviation(t).shape == (2, 6, 8, 1)


@pytest.mark.parametrize(("t_i", "t_j"), [(1.0, 0.6), (2.0, 0.05)])
def test_an_ancestral_step_draws_from_the_posterior(t_i, t_j):
    """Conditioning the joint Gaussian of two states, Cov(x_j, x_i) = S_j Rᵀ with R = A_i A_j⁻¹; the colour moves."""
    rng = np.random.RandomState(0)
    x, x0 = rng.randn(*SHAPE), rng.uniform(-1, 1, SHAPE)
    mean, covariance = one_ancestral_step(MOVING_WARM, x, x0, t_i, t_j)
    (a_i, s_i), (a_j, s_j) = (map(dense.matrix, scales(t)) for t in (t_i, t_j))
    r = np.linalg.solve(a_j.T, a_i.T).T
    joint = np.block([[s_j @ s_j, s_j @ s_j @ r.T], [r @ s_j @ s_j, s_i @ s_i]])
    gain = np.linalg.solve(joint[48:, 48:], joint[48:, :48]).T
    np.testing.assert_allclose(mean, a_j @ x0.ravel() + gain @ (x.ravel() - a_i @ x0.ravel()), atol=1e-9)
    np.testing.assert_allclose(covariance, joint[:48, :48] - gain @ joint[48:, :48], atol=1e-10)


def test_churn_moves_along_the_forward_process():
    """Up from t to t̂, then Euler's step to 0 with x0 known: what is left of the start and of the noise is 0, at x0.

    One level lower, at t_j, a state keeps s_j / s_t̂ of what it differs from A_t̂ x0 by; the added noise has the variance
    s_t̂² - A² s_t², A = A_t̂ / A_t.
    """
    t, t_j, rng = 1.0, 0.5, np.random.RandomState(0)
    up = t * 2**0.5
    x, x0, e = rng.randn(*SHAPE), rng.uniform(-1, 1, SHAPE), rng.randn(*SHAPE)
    (a_t, s_t), (a_up, s_up), (a_j, s_j) = scales(t), scales(up), scales(t_j)

    def run(e, x, x0):
        p = given_noise(MOVING_WARM, e)
        levels = jnp.asarray([t, t_j])
        keys = jax.random.split(jax.random.key(0), 1)
        churn = sampler.Churn(S_churn=10.0)
        return sampler.sample(knowing(p, x0), p, x[None], levels, solver="stochastic", keys=keys, churn=churn)[0][0]

    with jax.enable_x64(True):
        out = quick(run)(jnp.asarray(e), jnp.asarray(x), jnp.asarray(x0))
    factor = a_up / a_t
    added = np.sqrt(s_up**2 - factor**2 * s_t**2)
    # `given_noise` is in white units: the colour at t̂ is in `added` already.
    raised = dense.filtered(x, factor) + dense.filtered(e, added)
    expected = dense.filtered(x0, a_j) + dense.filtered(raised - dense.filtered(x0, a_up), s_j / s_up)
    np.testing.assert_allclose(out, expected, atol=1e-9)


def test_orders_of_convergence_where_the_colour_moves():
    """The exact flow multiplies each frequency's deviation √(P a² + s²)."""
    p, t0, t1 = MOVING_WARM, 2.0, 0.3
    deviation = [np.sqrt(POWER * a**2 + s**2) for a, s in (scales(t0), scales(t1))]
    x = np.random.RandomState(0).randn(1, *SHAPE)
    exact, grids = dense.filtered(x, deviation[1] / deviation[0]), [uneven(t0, t1, n) for n in (80, 160)]
    found = orders(p, oracle.gaussian(p, POWER), x, grids, ("heun", "multistep"), exact)
    assert found == pytest.approx({"heun": 2, "multistep": 2}, abs=0.2)


# ── Networks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_network_sees_whitened_images_and_is_judged_on_them(key):
    """Predictions, levels and losses of equal SNR are hot diffusion's of whitened images."""
    x0 = np.random.RandomState(0).uniform(-1, 1, (4, *SHAPE)).astype(np.float32)
    white = dense.filtered(x0, 1 / EQUAL).astype(np.float32)
    values, predictions = [], []
    for p, images in ((EQUAL_HOT, x0), (HOT, white)):
        model = denoiser.Denoiser(tiny.Linear(heads=1), p, lambda of: denoiser.choose("edm", of, 0.5, POWER))
        params = tiny.randomised(jax.jit(model.init)(key), np.random.RandomState(1))

        def judged(images, p=p, model=model, params=params):
            example, around = loss.draw(p, key, images), model.preconditioning
            predict = lambda x, t: model.predict(params, x, t)  # noqa: E731
            value = loss.two_head(predict, example, around.weight, errors=around.errors)[0]
            return value, predict(example.x, example.t)

        value, prediction = quick(judged)(images)
        values.append(value)
        predictions.append(prediction)
    np.testing.assert_allclose(predictions[0].blurred, dense.filtered(predictions[1].blurred, EQUAL), atol=3e-4)
    np.testing.assert_allclose(*values, rtol=1e-4)


def test_spectral_preconditioning_is_the_wiener_filter_of_coloured_noise(key):
    """With a silent network D̂ and R̂ are the Gaussian oracle's, which knows the noise of each frequency."""
    around = denoiser.choose("spectral", MOVING_WARM, 0.5, POWER)
    x, t = jax.random.normal(key, (3, *SHAPE)), jnp.asarray([0.1, 1.0, 5.0])
    silent = jnp.zeros_like(x)
    expected = quick(oracle.gaussian(MOVING_WARM, POWER))(x, t)
    for ours, exact in zip(quick(around.combine)(x, t, silent, silent), expected, strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5)
    weight = quick(around.weight)(t)
    for i, level in enumerate(np.asarray(t)):
        a, s = scales(level)
        left = np.mean(POWER * a**2 * s**2 / (POWER * a**2 + s**2))
        np.testing.assert_allclose(weight[i], 1 / left, rtol=1e-4)


# ── Systems ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def snr(p, power, t):
    """P a² / s² `[h, w]` of a process at a scalar t."""
    at = jnp.asarray([t], jnp.float32)
    return (power[..., None] * np.square(p.attenuation(at)[0] / p.deviation(at)[0]))[..., 0]


def built(system, power, **changes):
    return experiment.build(tiny.config(system, **changes), family.Measured(power)).process


def test_the_colours_of_the_papers():
    """SNRs of the same mean as denoising diffusion's, by Falck et al.'s and Scimeca et al.'s definitions."""
    k = np.arange(28) / 28
    power = 0.25 / (0.01 + k[:, None] ** 2 + k**2) + 0.1 * k[:, None]  # not symmetric
    white = dense.linear_alpha_bar()[300] / (1 - dense.linear_alpha_bar()[300]) * power
    r = np.hypot(28 * k[:, None], 28 * k)
    weights = {
        "equal_snr": 1 / power,
        "flipped_snr": power[::-1, ::-1] / power,
        "coloured": (1 + r) ** (2 * 0.7),
        "band": np.where((r / 28 > 0.2) & (r / 28 < 0.6), 1, 1 / 0.05**2),
    }
    for name, weight in weights.items():
        changes = {"process__theta": -0.7} if name == "coloured" else {}
        if name == "band":
            changes = {"process__colour": "band", "process__band_low": 0.2, "process__band_high": 0.6}
            changes |= {"process__band_floor": 0.05}
        found = snr(built("coloured" if name == "band" else name, power, **changes), power, 0.3)
        expected = white * weight
        np.testing.assert_allclose(found, expected * white.mean() / expected.mean(), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(snr(built("flipped_snr", power), power, 0.3), white[::-1, ::-1], rtol=1e-4)


def test_warm_in_the_colour_of_the_data():
    """BNR with equal SNR: at noise t each frequency has mean(P) a² / t²."""
    power = np.linspace(3, 0.01, 28 * 28).reshape(28, 28)
    p = built("coloured_warm", power, process__bnr=2.0)
    k = np.pi * np.arange(28) / 28
    expected = power.mean() / 0.5**2 * np.exp(-((2.0 * 0.5) ** 2) * (k[:, None] ** 2 + k**2))
    np.testing.assert_allclose(snr(p, power, 0.5), expected, rtol=1e-4)
    assert p.blurs and not built("coloured_warm", power, process__bnr=0.0).blurs


def test_heat_flow_is_the_heat_equation_along_flow_matching(key):
    """a = τ τ^(λ/2) and s = 1 - τ, from 1e-4 up; the loss is the error of the velocity dz/dτ = ȧ z_0 - ε."""
    p, lam = coloured.heat_flow(SHAPE), LAM[..., None]
    for tau in (1e-4, 0.3, 0.999):
        at = jnp.asarray([1 - tau])
        np.testing.assert_allclose(p.attenuation(at)[0], tau * tau ** (lam / 2), rtol=2e-3, atol=1e-12)
        np.testing.assert_allclose(p.noise(at)[0], 1 - tau, rtol=1e-5)
    np.testing.assert_allclose(np.diff(p.levels(7)), -(1 - 1e-4) / 7)
    around, rng, tau = denoiser.velocity(p), np.random.RandomState(0), np.array([0.4, 0.8])
    x0, guess = rng.uniform(-1, 1, (2, 2, *SHAPE)).astype(np.float32)
    t = jnp.asarray(1 - tau, jnp.float32)

    def judged(x0, guess):
        x, blurred, residual = p.corrupt(key, x0, t)
        example = loss.Example(x, t, blurred, residual)
        return x, around.errors(around.combine(x, t, guess), example, around.weight).blurred

    x, ours = quick(judged)(x0, guess)
    for i, one in enumerate(tau):
        a, speed = one ** (1 + lam / 2), (1 + lam / 2) * one ** (lam / 2)
        z, z0, z_hat = (np.reshape(Q @ np.ravel(image[i]), SHAPE) for image in (x, x0, guess))
        epsilon, guessed = (z - a * z0) / (1 - one), (z - a * z_hat) / (1 - one)
        wrong = np.sum(((speed * z_hat - guessed) - (speed * z0 - epsilon)) ** 2)
        np.testing.assert_allclose(ours[i], wrong, rtol=1e-4)


@pytest.mark.parametrize(
    ("system", "changes", "power", "message"),
    [
        (
            "equal_snr",
            {},
            np.r_[np.ones(27), 0],
            r"equal_snr needs data with power at every frequency; at frequency \(0, 27\)",
        ),
        (
            "flipped_snr",
            {},
            np.r_[0, np.ones(27)],
            r"flipped_snr needs data with power .* at frequency \(0, 0\) it is 0",
        ),
        ("coloured", {"process__colour": "pink"}, np.ones(28), "process.colour is 'pink'; choose one of equal_snr"),
        ("coloured", {"process__theta": 9.0}, np.ones(28), "process.theta is 9.0; it must be from -8 to 8"),
        ("coloured", {"process__colour": "band", "process__band_low": 0.9}, np.ones(28), "band_low < band_high"),
        ("coloured", {"process__colour": "band", "process__band_floor": 0.0}, np.ones(28), "process.band_floor is 0.0"),
        ("equal_snr", {"sample__solver": "stochastic"}, np.ones(28), "cannot be sampled by stochastic: its levels"),
        ("heat_flow", {"process__scale_min": 0.0}, np.ones(28), "process.scale_min is 0.0"),
        ("heat_flow", {"sample__beta_min": 0.1}, np.ones(28), "heat_flow has not EDM's grid"),
    ],
)
def test_what_cannot_be_says_why(system, changes, power, message):
    with pytest.raises(ValueError, match=message):
        built(system, np.tile(power, (28, 1)), **changes)


def test_velocities_are_of_white_noise():
    with pytest.raises(ValueError, match="velocity is of white noise"):
        denoiser.choose("velocity", EQUAL_HOT, 0.5, POWER)


def test_a_colour_is_finite_and_above_0():
    for value in (0.0, np.nan, -1.0, np.inf):
        colour = np.ones((6, 8))
        colour[2, 5] = value
        with pytest.raises(ValueError, match=r"must be finite and above 0; at frequency \(2, 5\)"):
            coloured.coloured(HOT, colour)
