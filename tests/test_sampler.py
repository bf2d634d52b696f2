"""Samplers against exact predictors: orders of convergence, and EDM's own equations in numpy.

The published table of the Gaussian oracle is reproduced in test_sweep.py, by the analysis that makes it.
"""

import itertools

import gaussian_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_jax.diffusion import bnr, dct, oracle, process, sampler

N, POWER = gaussian_table.N, gaussian_table.POWER


def warm(ratio, shape=(N, N, 1)):
    return process.warm(shape, bnr.constant(ratio))


def gain(p, power, levels, solver):
    """The factor on each frequency's standard deviation: the sampler is linear, so ones in the DCT tell."""
    x = dct.idct2(jnp.full((1, *p.image_shape), levels[0]))
    out, record = jax.jit(lambda x, levels: sampler.sample(oracle.gaussian(p, power), p, x, levels, solver=solver))(
        x, jnp.asarray(levels)
    )
    return np.asarray(dct.dct2(out))[0, ..., 0], int(record.nfe)


def test_float32_reproduces_the_table_too():
    p = warm(0.5)
    g, _ = gain(p, POWER, p.levels(18).astype(np.float32), "heun")
    w2 = np.linalg.norm(np.abs(g) - np.sqrt(POWER)) / np.linalg.norm(np.sqrt(POWER))
    np.testing.assert_allclose(w2, 0.0515, atol=6e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
def test_order_of_convergence(solver, order, ratio):
    # With no blur the equation dx/ds = s x / (P + s²) is solved by √(P + s²); with blur a finer grid of the same solver
    # would test itself, so the exact gain is √(P a² + s²), the flow's map of standard deviations.
    p = warm(ratio, (8, 8, 1))
    lam = np.pi**2 * ((np.arange(8) / 8)[:, None] ** 2 + (np.arange(8) / 8) ** 2)
    power, (t0, t1) = 1 / (lam + 0.1), (2.0, 0.3)
    std = lambda t: np.sqrt(power * np.exp(-((ratio * t) ** 2) * lam) + t**2)  # noqa: E731
    errors = []
    with jax.enable_x64(True):
        for steps in (40, 80, 160):
            g, _ = gain(p, power, np.geomspace(t0, t1, steps + 1), solver)
            errors.append(np.linalg.norm(g / t0 - std(t1) / std(t0)))
    observed = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(observed, order, atol=0.15)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
def test_multistep3_is_a_parabola_in_the_root_of_noise(ratio):
    """Lagrange polynomials and quadrature in numpy, a clean estimate that is not linear, steps of uneven lengths."""
    p, lam = warm(ratio, (6, 6, 1)), np.pi**2 * ((np.arange(6) / 6)[:, None] ** 2 + (np.arange(6) / 6) ** 2)
    attenuation = lambda t: np.exp(-((ratio * t) ** 2) * lam / 2)  # noqa: E731
    x, levels = np.random.RandomState(0).randn(6, 6) * 3, np.array([3.0, 2.0, 1.9, 0.8, 0.5, 0.02, 0.0])
    expected = gaussian_table.multistep3(lambda x, t: np.tanh(x / (1 + t)), x, levels, attenuation)

    def predict(x, t):
        clean = jnp.tanh(dct.dct2(x) / (1 + t[:, None, None, None]))
        a = p.attenuation(t)
        return process.Prediction(dct.idct2(a * clean), dct.idct2((1 - a) * clean))

    with jax.enable_x64(True):
        start = dct.idct2(jnp.asarray(x)[None, ..., None])
        out, record = sampler.sample(predict, p, start, levels, solver="multistep3")
        np.testing.assert_allclose(dct.dct2(out)[0, ..., 0], expected, atol=1e-9)
    assert int(record.nfe) == 6


@pytest.mark.parametrize("ratio", [0.0, 2.0])
def test_multistep3_is_of_third_order_where_nothing_is_blurred(ratio):
    """A short first step, whose error is of second order; of blurred images, only the mean colour is not blurred."""
    p = warm(ratio, (8, 8, 1))
    lam = np.pi**2 * ((np.arange(8) / 8)[:, None] ** 2 + (np.arange(8) / 8) ** 2)
    power, (t0, t1) = 1 / (lam + 0.1), (2.0, 0.3)
    std = lambda t: np.sqrt(power * np.exp(-((ratio * t) ** 2) * lam) + t**2)  # noqa: E731
    errors = []
    with jax.enable_x64(True):
        for steps in (60, 120):
            uneven = np.append(0, np.cumsum(np.tile([1.0, 1.5], steps // 2)))
            levels = np.insert(t0 * (t1 / t0) ** (uneven / uneven[-1]), 1, t0 * (1 - 0.2 / steps**2))
            g, _ = gain(p, power, levels, "multistep3")
            errors.append(np.abs(g / t0 - std(t1) / std(t0)))
    one = np.s_[:] if ratio == 0 else np.s_[0, 0]
    shrinks = [np.linalg.norm(error[one]) for error in errors]
    np.testing.assert_allclose(np.log2(shrinks[0] / shrinks[1]), 3, atol=0.2)


def test_no_blur_is_edms_heun():
    """Algorithm 1 of Karras et al. 2022 in numpy float64, with a nonlinear denoiser."""
    p, levels = process.hot((5, 7, 2)), process.hot((5, 7, 2)).levels(9)
    x = np.random.RandomState(0).randn(3, 5, 7, 2) * 80

    def denoise(x, t, tanh):
        return tanh(x / (1 + t)) * 0.7

    expected, trajectory = x.copy(), []
    for t, t_next in itertools.pairwise(levels):
        d = (expected - denoise(expected, t, np.tanh)) / t
        stepped = expected + (t_next - t) * d
        if t_next > 0:
            d = (d + (stepped - denoise(stepped, t_next, np.tanh)) / t_next) / 2
            stepped = expected + (t_next - t) * d
        expected = stepped
        trajectory.append(expected)

    def predict(x, t):
        blurred = denoise(x, t[:, None, None, None], jnp.tanh)
        return process.Prediction(blurred, jnp.zeros_like(x))

    out, record = sampler.sample(predict, p, jnp.asarray(x, jnp.float32), levels, trajectory=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(record.states, trajectory, rtol=1e-5, atol=1e-4)
    assert int(record.nfe) == 17


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("solver", ["heun", "multistep", "multistep3"])
def test_empirical_oracle_reproduces_its_images(key, ratio, solver):
    """Samples of the exact score of a finite set are its members, each found about equally often."""
    images = np.random.RandomState(1).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    p = warm(ratio, (8, 8, 1))
    x = p.prior(key, (256, 8, 8, 1))
    out, _ = jax.jit(lambda x: sampler.sample(oracle.empirical(p, images), p, x, p.levels(80), solver=solver))(x)
    distance = np.sqrt(np.mean(np.square(np.asarray(out)[:, None] - images), (2, 3, 4)))
    assert np.max(np.min(distance, 1)) < 5e-3
    counts = np.bincount(np.argmin(distance, 1), minlength=8)
    assert np.sum((counts - 32) ** 2 / 32) < 24.3  # χ² with 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_the_same_noise_finds_the_same_image_as_evaluations_grow(key, solver):
    images = np.random.RandomState(1).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    p = warm(0.5, (8, 8, 1))
    x = p.prior(key, (64, 8, 8, 1))

    def found(steps, solver):
        out, _ = sampler.sample(oracle.empirical(p, images), p, x, p.levels(steps), solver=solver)
        return np.argmin(np.sum(np.square(np.asarray(out)[:, None] - images), (2, 3, 4)), 1)

    exact = found(320, "heun")
    agreement = [np.mean(found(steps, solver) == exact) for steps in (3, 80)]
    assert agreement[1] >= 0.95 and agreement[1] > agreement[0]


def test_a_coarse_step_far_off_the_data_stays_finite(key):
    # Two Heun steps overshoot to 1e4 at β = 0.002, where log-weights are near -1e16 and float32 resolves only 1e9.
    images = np.random.RandomState(1).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    p = warm(0.5, (8, 8, 1))
    out, _ = sampler.sample(oracle.empirical(p, images), p, p.prior(key, (4, 8, 8, 1)), p.levels(2))
    assert np.all(np.abs(out) < 1.01)


def test_trajectory_is_the_path_to_the_result(key):
    p = warm(0.5, (8, 8, 1))
    predict = oracle.gaussian(p, np.ones((8, 8)))
    x = p.prior(key, (2, 8, 8, 1))
    keys = jax.random.split(key, 2)
    for solver in p.solvers:
        out, record = sampler.sample(predict, p, x, p.levels(6), solver=solver, keys=keys, trajectory=True)
        assert record.states.shape == record.clean.shape == (6, 2, 8, 8, 1)
        np.testing.assert_array_equal(record.states[-1], out)
        first = predict(x, jnp.full(2, 80.0))
        np.testing.assert_allclose(record.clean[0], first.blurred + first.residual, atol=1e-6)
        assert sampler.sample(predict, p, x, p.levels(6), solver=solver, keys=keys)[1].states is None


def test_one_trace_for_any_grid_of_equal_length(key):
    p = warm(0.5, (8, 8, 1))
    traces = []

    def predict(x, t):
        traces.append(t.shape)
        return oracle.gaussian(p, np.ones((8, 8)))(x, t)

    run = jax.jit(lambda x, levels: sampler.sample(predict, p, x, levels)[0])
    x = p.prior(key, (2, 8, 8, 1))
    run(x, jnp.asarray(p.levels(6), jnp.float32))
    count = len(traces)
    run(x + 1, jnp.asarray(p.levels(6)[::1] * 0.5, jnp.float32))
    assert len(traces) == count


def test_bad_requests_are_named(key):
    p, x = warm(0.5, (8, 8, 1)), jnp.zeros((1, 8, 8, 1))
    predict = oracle.gaussian(p, np.ones((8, 8)))
    with pytest.raises(ValueError, match="unknown solver 'rk4'; choose one of heun, euler, multistep"):
        sampler.sample(predict, p, x, p.levels(3), solver="rk4")
    with pytest.raises(ValueError, match="falling"):
        sampler.sample(predict, p, x, np.array([1.0, 2.0]))
