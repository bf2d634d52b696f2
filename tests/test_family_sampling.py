"""The samplers of all systems against dense linear algebra, their papers' own forms, and exact flows, in float64."""

import dataclasses
import itertools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import scipy.stats
from test_systems import ALL

from warm_jax.diffusion import bnr, dct, noise, oracle, process, sampler, systems

SHAPE, POWER, LAM = dense.SHAPE, dense.POWER, dense.LAM
KEYS = jax.random.split(jax.random.key(0), 1)
MILD = process.warm(SHAPE, bnr.constant(0.5))


def quick(function):
    """jit with half of the compile time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def given_noise(p, e):
    """The process whose every draw of noise is `e` `[h, w, c]`: it makes a random step a linear map to be read off."""
    return dataclasses.replace(p, law=noise.Noise(lambda key, shape: jnp.broadcast_to(e, shape), p.law.log_density))


def knowing(p, x0):
    """A predictor sure of `x0` whatever it is shown."""

    def predict(x, t):
        clean = jnp.broadcast_to(x0, x.shape).astype(x.dtype)
        blurred = p.attenuate(clean, t)
        return process.Prediction(blurred, clean - blurred)

    return predict


def row(p, t):
    """(a `[h, w]`, s) of the papers at a scalar t, in numpy, whatever the code under test says."""
    if p is ALL["blurring"]:
        return dense.blurring_schedule(t)
    if p in (ALL["ddpm"], ALL["cosine"]):
        linear = p is ALL["ddpm"]
        alpha_bar = dense.linear_alpha_bar()[round(t * 1000)] if linear else dense.cosine_alpha_bar(t)
        return np.full((6, 8), np.sqrt(alpha_bar)), np.sqrt(1 - alpha_bar)
    return dense.gauss({"hot": 0.0, "warm": 0.5}[next(n for n, q in ALL.items() if q is p)] * t), t


# ── Ancestral sampling ───────────────────────────────────────────────────────────────────────────────────────────────

STEPS = [("blurring", 0.5, 0.45), ("blurring", 1.0, 0.999), ("warm", 1.0, 0.6), ("hot", 2.0, 0.3), ("ddpm", 0.7, 0.699)]


def one_ancestral_step(p, x, x0, t_i, t_j):
    """Mean `[48]` and covariance `[48, 48]` of one step, read off its answers to no noise and to unit noises."""
    with jax.enable_x64(True):
        unit = jnp.asarray(np.concatenate([np.zeros((1, 48)), np.eye(48)]).reshape(49, *SHAPE))

        def step(e, x, x0, levels):
            p_e = given_noise(p, e)
            return sampler.sample(knowing(p_e, x0), p_e, x[None], levels, solver="ancestral", keys=KEYS)[0][0]

        run = quick(jax.vmap(step, in_axes=(0, None, None, None)))
        out = np.asarray(run(unit, jnp.asarray(x), jnp.asarray(x0), jnp.asarray([t_i, t_j]))).reshape(49, 48)
    root = (out[1:] - out[0]).T
    return out[0], root @ root.T


@pytest.mark.parametrize(("name", "t_i", "t_j"), STEPS)
def test_an_ancestral_step_draws_from_the_posterior(name, t_i, t_j):
    """p(x_j | x_i, x0) by conditioning the joint Gaussian of the two states over all pixels; and in the paper's form.

    Given x0 the states are A_j x0 + s_j ε and R x_j + noise with R = A_i A_j⁻¹, so Cov(x_j, x_i) = s_j² Rᵀ.
    """
    p, rng = ALL[name], np.random.RandomState(0)
    x, x0 = rng.randn(*SHAPE), rng.uniform(-1, 1, SHAPE)
    mean, covariance = one_ancestral_step(p, x, x0, t_i, t_j)
    (a_i, s_i), (a_j, s_j) = row(p, t_i), row(p, t_j)
    big_i, big_j = dense.matrix(a_i), dense.matrix(a_j)
    r = np.linalg.solve(big_j.T, big_i.T).T
    joint = np.block([[s_j**2 * np.eye(48), s_j**2 * r.T], [s_j**2 * r, s_i**2 * np.eye(48)]])
    gain = np.linalg.solve(joint[48:, 48:], joint[48:, :48]).T
    expected = big_j @ x0.ravel() + gain @ (x.ravel() - big_i @ x0.ravel())
    np.testing.assert_allclose(mean, expected, atol=1e-9)
    np.testing.assert_allclose(covariance, joint[:48, :48] - gain @ joint[48:, :48], atol=1e-10)

    # Hoogeboom and Salimans 2022, equations 19 to 24, for each frequency.
    alpha_ts, u, z0 = a_i / a_j, (dense.Q @ x.ravel()).reshape(6, 8), (dense.Q @ x0.ravel()).reshape(6, 8)
    sigma2_ts = s_i**2 - alpha_ts**2 * s_j**2
    sigma2_den = 1 / (1 / s_j**2 + alpha_ts**2 / sigma2_ts)
    theirs = alpha_ts * sigma2_den / sigma2_ts * u + a_j * sigma2_den / s_j**2 * z0
    np.testing.assert_allclose(dense.Q @ mean, theirs.ravel(), atol=1e-9)
    np.testing.assert_allclose(dense.Q @ covariance @ dense.Q.T, np.diag(sigma2_den.ravel()), atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 500, 1000])
def test_ddpms_own_step(k):
    """Ho et al. 2020, equation 7: the posterior's mean and β̃, which is 0 at the first step of the forward process."""
    rng, betas = np.random.RandomState(0), np.linspace(1e-4, 0.02, 1000)
    x, x0 = rng.randn(*SHAPE), rng.uniform(-1, 1, SHAPE)
    mean, covariance = one_ancestral_step(ALL["ddpm"], x, x0, k / 1000, (k - 1) / 1000)
    beta, here, before = betas[k - 1], *dense.linear_alpha_bar()[[k, k - 1]]
    expected = np.sqrt(before) * beta / (1 - here) * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - here) * x
    np.testing.assert_allclose(mean, expected.ravel(), atol=1e-9)
    np.testing.assert_allclose(covariance, (1 - before) / (1 - here) * beta * np.eye(48), atol=1e-12)


@pytest.mark.parametrize(("name", "count"), [("ddpm", 50), ("blurring", 60), ("warm", 30), ("BNR 10", 30)])
def test_ancestral_samples_have_the_propagated_spread(name, count):
    """Float32 samples of Gaussian data: each frequency's variance by the recursion of the linear map, in float64.

    At BNR 10 the path starts where 800 pixels of blur leave exactly 0 of all but the mean in float32.
    """
    p, ratio = (process.warm(SHAPE, bnr.constant(10.0)), 10.0) if name == "BNR 10" else (ALL[name], 0.5)
    levels, n = p.levels(count), 3000
    variance = np.full((6, 8), row(p, levels[0])[1] ** 2 if name != "BNR 10" else 80.0**2)
    for t_i, t_j in itertools.pairwise(levels):
        if name in ("warm", "BNR 10"):
            (a_i, s_i), (a_j, s_j) = ((dense.gauss(ratio * t), t) for t in (t_i, t_j))
            r = np.exp(-(ratio**2) * (t_i**2 - t_j**2) * LAM / 2)  # never 0 / 0
        else:
            (a_i, s_i), (a_j, s_j) = row(p, t_i), row(p, t_j) if t_j else (np.ones((6, 8)), 0.0)
            r = a_i / a_j
        wiener = POWER * a_i / (POWER * a_i**2 + s_i**2)
        v = s_i**2 - r**2 * s_j**2
        gain = r * s_j**2 / s_i**2 + a_j * v / s_i**2 * wiener
        variance = gain**2 * variance + v * s_j**2 / s_i**2

    def run(key):
        keys = jax.random.split(key, n)
        x = jax.vmap(lambda key: p.prior(jax.random.fold_in(key, 1000), SHAPE))(keys)
        return dct.dct2(sampler.sample(oracle.gaussian(p, POWER), p, x, levels, solver="ancestral", keys=keys)[0])

    z = np.asarray(quick(run)(jax.random.key(3)), np.float64)[..., 0]
    assert np.all(np.isfinite(z))
    np.testing.assert_allclose(np.mean(z**2, 0), variance, rtol=5.5 * np.sqrt(2 / n))
    np.testing.assert_allclose(np.mean(z**2 / variance), 1, rtol=5 * np.sqrt(2 / z.size))
    correlation = np.corrcoef(z.reshape(n, -1).T) - np.eye(48)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(n)


# ── Deterministic solvers ────────────────────────────────────────────────────────────────────────────────────────────


def test_euler_is_ddim():
    """Song et al. 2021, equation 12 with σ = 0: x_j = √ᾱ_j x̂0 + √(1 - ᾱ_j) ε̂, on the Gaussian oracle."""
    p, x, levels = ALL["ddpm"], np.random.RandomState(0).randn(2, *SHAPE), np.array([1.0, 0.6, 0.25, 0.001, 0.0])
    alpha_bar, expected = dense.linear_alpha_bar(), x
    for t_i, t_j in itertools.pairwise(levels):
        here, after = alpha_bar[round(1000 * t_i)], alpha_bar[round(1000 * t_j)]
        clean = dense.filtered(expected, POWER * np.sqrt(here) / (POWER * here + 1 - here))
        epsilon = (expected - np.sqrt(here) * clean) / np.sqrt(1 - here)
        expected = np.sqrt(after) * clean + np.sqrt(1 - after) * epsilon
    run = quick(lambda x, levels: sampler.sample(oracle.gaussian(p, POWER), p, x, levels, solver="euler"))
    with jax.enable_x64(True):
        out, record = run(jnp.asarray(x), jnp.asarray(levels))
    np.testing.assert_allclose(out, expected, atol=1e-9)
    assert int(record.nfe) == 4


def test_multistep_is_dpm_solver_2m():
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, in numpy: λ = ln(α / σ), D = (1 + 1/2r) x̂0 - 1/2r x̂0_before."""
    p, x, levels = ALL["cosine"], np.random.RandomState(0).randn(2, *SHAPE), np.array([1.0, 0.9, 0.4, 0.3, 0.02])
    alpha, sigma = np.sqrt(dense.cosine_alpha_bar(levels)), np.sqrt(1 - dense.cosine_alpha_bar(levels))
    h, expected, before = np.diff(np.log(alpha / sigma)), x, None
    for i in range(4):
        clean = dense.filtered(expected, POWER * alpha[i] / (POWER * alpha[i] ** 2 + sigma[i] ** 2))
        r = h[i - 1] / h[i]
        d = clean if before is None else (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before
        expected = sigma[i + 1] / sigma[i] * expected - alpha[i + 1] * np.expm1(-h[i]) * d
        before = clean
    run = quick(lambda x, levels: sampler.sample(oracle.gaussian(p, POWER), p, x, levels, solver="multistep"))
    with jax.enable_x64(True):
        out, record = run(jnp.asarray(x), jnp.asarray(levels))
    np.testing.assert_allclose(out, expected, atol=1e-9)
    assert int(record.nfe) == 4


ORDER = {"euler": 1, "heun": 2, "multistep": 2}


def uneven(t0, t1, n):
    """`n` steps from t0 to t1, each second one twice as long: a multistep solver must weigh the step before it."""
    return t0 + (t1 - t0) * np.append(0, np.cumsum(np.tile([1.0, 2.0], n // 2))) / (1.5 * n)


def orders(p, predict, x, grids, solvers, exact, unit=1.0):
    """The observed order of each solver: log₂ of how the error shrinks when the grid doubles."""
    found = {}
    with jax.enable_x64(True):
        for solver in solvers:
            run = quick(lambda x, levels, solver=solver: sampler.sample(predict, p, x, levels, solver=solver)[0])
            errors = [np.linalg.norm(np.asarray(run(jnp.asarray(x), jnp.asarray(g))) / unit - exact) for g in grids]
            found[solver] = np.log2(errors[0] / errors[1])
    return found


@pytest.mark.parametrize(
    ("name", "t0", "t1"), [("hot", 2.0, 0.3), ("ddpm", 0.8, 0.2), ("cosine", 0.8, 0.2), ("blurring", 0.35, 0.15)]
)
def test_order_of_convergence_on_gaussian_data(name, t0, t1):
    """The flow maps standard deviations: the exact gain is √(P a² + s²) after over before, a and s from the papers."""
    p = ALL[name]
    grids = [uneven(t0, t1, n) for n in (80, 160)]
    before, after = (np.sqrt(POWER * a**2 + s**2) for a, s in (row(p, t0), row(p, t1)))
    x = dense.Q.T.dot(np.ones(48)).reshape(1, *SHAPE)  # every frequency 1
    exact = dense.filtered(x, after / before)
    found = orders(p, oracle.gaussian(p, POWER), x, grids, p.solvers[:3], exact)
    assert set(found) == set(ORDER)
    for solver, order in found.items():
        assert abs(order - ORDER[solver]) < 0.2, (solver, order)


def test_order_of_convergence_of_pfgmpp():
    """dx/dσ = (x - D̂) / σ with D̂ from Student weights, written in numpy and solved by scipy to 1e-11."""
    dims, rng = 20.0, np.random.RandomState(0)
    data, x = rng.uniform(-1, 1, (3, 48)), rng.randn(1, 48)

    def slope(sigma, x):
        log_weight = -(48 + dims) / 2 * np.log1p(np.sum((x - data) ** 2, 1) / (dims * sigma**2))
        weight = np.exp(log_weight - log_weight.max())
        return (x - weight @ data / weight.sum()) / sigma

    exact = scipy.integrate.solve_ivp(slope, (2.0, 0.4), x[0], method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    p = process.pfgmpp(SHAPE, dims)
    images = data.reshape(3, *SHAPE)
    grids = [uneven(2.0, 0.4, n) for n in (80, 160)]
    found = orders(p, oracle.empirical(p, images), x.reshape(1, *SHAPE), grids, p.solvers[:3], exact.reshape(1, *SHAPE))
    assert set(found) == set(ORDER)
    for solver, order in found.items():
        assert abs(order - ORDER[solver]) < 0.25, (solver, order)


def test_order_of_convergence_without_noise():
    """dz/dt = ȧ(t) dct(x̂0(x)) for a blur that grows smoothly and a smooth wrong x̂0, in numpy, solved by scipy."""
    p = dataclasses.replace(
        ALL["cold"],
        blur=lambda t: 0.5 * t,
        attenuation=lambda t: jnp.exp(-jnp.square(t)[..., None, None, None] * (LAM[..., None] / 8)),
    )
    x = np.random.RandomState(0).randn(1, *SHAPE)

    def slope(t, x):
        clean = (np.tanh(2 * x) + 0.1 * x).reshape(SHAPE)
        return dense.filtered(clean, -t * LAM / 4 * np.exp(-(t**2) * LAM / 8)).ravel()

    exact = scipy.integrate.solve_ivp(slope, (3.0, 0.5), x.ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]

    def predict(x, t):
        clean = jnp.tanh(2 * x) + 0.1 * x
        blurred = p.attenuate(clean, t)
        return process.Prediction(blurred, clean - blurred)

    grids = [uneven(3.0, 0.5, n) for n in (80, 160)]
    found = orders(p, predict, x, grids, p.solvers, exact.reshape(1, *SHAPE))
    assert set(found) == {"euler", "heun"}
    for solver, order in found.items():
        assert abs(order - ORDER[solver]) < 0.2, (solver, order)


# ── Cold diffusion ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_algorithm_2_where_degradation_is_linear_in_the_level():
    """D(x, k) = (1 - k/K · C) x, Bansal et al. 2022, section 3.3: what a wrong guess g of x0 does to the result.

    Each step adds (1/K) C g, K of them C g: x_0 = (1 - C) x0 + C g. Frequencies not degraded come back exactly.
    """
    rng, count = np.random.RandomState(0), 50
    c = rng.uniform(0, 1, (6, 8))
    c[0, 0] = c[2, 3] = 0
    p = dataclasses.replace(
        ALL["cold"], attenuation=lambda t: 1 - t[..., None, None, None] / count * jnp.asarray(c[..., None], t.dtype)
    )
    x0, guess = rng.uniform(-1, 1, (2, 1, *SHAPE))
    levels = p.levels(10)

    def run(x, guess):
        return sampler.sample(knowing(p, guess), p, x, levels, solver="euler", trajectory=True)

    with jax.enable_x64(True):
        run = quick(run)
        start = jnp.asarray(dense.filtered(x0, 1 - c))
        out, record = run(start, jnp.asarray(guess))
        _, exact = run(start, jnp.asarray(x0))
    np.testing.assert_allclose(out, dense.filtered(x0, 1 - c) + dense.filtered(guess, c), atol=1e-12)
    assert int(record.nfe) == 10
    for state, k in zip(exact.states, levels[1:], strict=True):
        np.testing.assert_allclose(state, dense.filtered(x0, 1 - k / count * c), atol=1e-12)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cold_steps_with_the_true_image_pass_every_degraded_one(solver):
    """x_k - D(x0, k) + D(x0, k-1) is D(x0, k-1) at every level, blurred by scipy, in float32, on half of the levels."""
    p, x0 = ALL["cold"], np.random.RandomState(0).uniform(-1, 1, (2, *SHAPE))
    blurs, levels = systems.cold_blurs(0.35 + np.arange(50) / 100, 11), p.levels(25)
    start = jnp.asarray(dense.blurred(x0, blurs[50]), jnp.float32)
    run = quick(lambda x: sampler.sample(knowing(p, jnp.asarray(x0)), p, x, levels, solver=solver, trajectory=True))
    _, record = run(start)
    assert int(record.nfe) == {"euler": 25, "heun": 49}[solver]
    for state, k in zip(record.states, levels[1:], strict=True):
        np.testing.assert_allclose(state, dense.blurred(x0, blurs[int(k)]), atol=2e-5)


# ── Inverse heat dissipation ─────────────────────────────────────────────────────────────────────────────────────────


def test_perturb_adds_noise_after_every_step_but_the_last(key):
    """u ← f(u) + δσ ε, and f alone at the end (Rissanen et al. 2023, algorithm 2), for a model f of closed form."""
    p, n = systems.ihdm(SHAPE, lambda key, shape: jnp.zeros(shape, jnp.float32), steps=4, noise=0.02), 1500

    def predict(x, t):
        return process.Prediction(0.5 * x + t[:, None, None, None], 7 * jnp.ones_like(x))

    def run(x, keys):
        churn = sampler.Churn(delta=1.3)
        return sampler.sample(predict, p, x, p.levels(4), solver="perturb", keys=keys, churn=churn, trajectory=True)

    x = np.random.RandomState(0).randn(n, *SHAPE).astype(np.float32)
    out, record = quick(run)(x, jax.random.split(key, n))
    states = np.asarray(record.states, np.float64)
    assert int(record.nfe) == 4
    added = np.stack(
        [(states[i] - (0.5 * (states[i - 1] if i else x) + 4 - i)).reshape(n, 48) / 0.026 for i in range(4)]
    )
    np.testing.assert_allclose(added[3], 0, atol=1e-4)
    np.testing.assert_array_equal(states[3], out)
    for part in added[:3]:
        assert scipy.stats.kstest(part.ravel(), "norm").pvalue > 1e-3
    # Steps, images and pixels have noise of their own.
    np.testing.assert_allclose(np.corrcoef(added[:3].reshape(3, -1)), np.eye(3), atol=5.5 / np.sqrt(n * 48))
    np.testing.assert_allclose(np.corrcoef(added[:3, :40].reshape(120, -1)), np.eye(120), atol=5.5 / np.sqrt(48))
    np.testing.assert_allclose(np.corrcoef(added[0].T), np.eye(48), atol=5.5 / np.sqrt(n))


def test_sampling_ihdm_from_its_start_to_a_known_image(key):
    """With the true B_{k-1} x0 for a model the last state is x0, whatever noise went in; K evaluations."""
    x0 = np.random.RandomState(0).uniform(-1, 1, (1, *SHAPE)).astype(np.float32)
    low = np.asarray(systems.low_frequencies(jnp.asarray(x0), 24.0))
    p = systems.ihdm(SHAPE, systems.blurred_images(SHAPE, low, 24.0), steps=12)

    def predict(x, t):
        blurred = p.attenuate(jnp.broadcast_to(x0, x.shape), p.target(t))
        return process.Prediction(blurred, x0 - blurred)

    out, record = quick(
        lambda keys: sampler.sample(
            predict, p, p.prior(key, (3, *SHAPE)), p.levels(12), solver="perturb", keys=keys, trajectory=True
        )
    )(jax.random.split(key, 3))
    np.testing.assert_allclose(out, np.broadcast_to(x0, out.shape), atol=2e-6)
    assert int(record.nfe) == 12
    blurs = np.append(0, 0.5 * 48 ** (np.arange(12) / 11))
    for i, state in enumerate(record.states[:-1]):
        rest = (np.asarray(state) - dense.blurred(x0, blurs[11 - i])) / (1.25 * 0.02)
        np.testing.assert_allclose(rest.std(), 1, atol=5 / np.sqrt(2 * 144))


# ── Churn ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("churn", "count"), [((30.0, 0.05, 50.0, 1.007), 18), ((4.0, 0.0, np.inf, 1.003), 40)])
def test_no_blur_is_edms_stochastic_sampler(churn, count):
    """Algorithm 2 of Karras et al. 2022 in numpy float64 with the same noise and a nonlinear denoiser."""
    s_churn, s_min, s_max, s_noise = churn
    p, levels, rng = ALL["hot"], ALL["hot"].levels(count), np.random.RandomState(0)
    x, e = rng.randn(2, *SHAPE) * 80, rng.randn(*SHAPE)
    denoise = lambda x, t, tanh: tanh(x / (1 + t)) * 0.7  # noqa: E731
    expected, asked = x, []
    for t, t_next in itertools.pairwise(levels):
        gamma = min(s_churn / count, np.sqrt(2) - 1) if s_min <= t <= s_max else 0
        t_hat = t + gamma * t
        x_hat = expected + np.sqrt(t_hat**2 - t**2) * s_noise * e
        asked.append(t_hat)
        d = (x_hat - denoise(x_hat, t_hat, np.tanh)) / t_hat
        expected = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            d_next = (expected - denoise(expected, t_next, np.tanh)) / t_next
            expected = x_hat + (t_next - t_hat) * (d + d_next) / 2

    def predict(x, t):
        blurred = denoise(x, t[:, None, None, None], jnp.tanh)
        return process.Prediction(blurred, jnp.broadcast_to(t[:, None, None, None], x.shape) - blurred)  # x̂0 tells t

    def hot_predict(x, t):
        return process.Prediction(predict(x, t).blurred, jnp.zeros_like(x))

    def run(predict, x, levels, e):
        settings = sampler.Churn(s_churn, s_min, s_max, s_noise)
        keys = jax.random.split(jax.random.key(0), 2)
        p_e = given_noise(p, e)
        return sampler.sample(predict, p_e, x, levels, solver="stochastic", keys=keys, churn=settings, trajectory=True)

    with jax.enable_x64(True):
        args = jnp.asarray(x), jnp.asarray(levels), jnp.asarray(e)
        out, record = quick(lambda *args: run(hot_predict, *args))(*args)
        told = quick(lambda *args: run(predict, *args)[1].clean[:, 0, 0, 0, 0])(*args)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9)
    assert int(record.nfe) == 2 * count - 1
    np.testing.assert_allclose(told, asked, rtol=1e-12)  # the levels stepped up to: S_min, S_max and the cap at √2 - 1


@pytest.mark.parametrize("ratio", [0.5, 3.0])
def test_a_step_up_with_blur_has_the_forward_marginals(ratio):
    """From variance P a_i² + s_i² to P a_t̂² + s_t̂² exactly, a in numpy; the state is seen through the predictor."""
    p, t, count, s_noise = process.warm(SHAPE, bnr.constant(ratio)), 0.7, 3, 1.0
    up = t * (1 + 1.0 / count)

    def seen(x, e):
        def predict(x, t):
            return process.Prediction(x, jnp.zeros_like(x))

        p_e = given_noise(p, e)
        levels, churn = np.array([t, 0.5, 0.2, 0.1]), sampler.Churn(S_churn=1.0, S_noise=s_noise)
        run = sampler.sample(predict, p_e, x, levels, solver="stochastic", keys=KEYS, churn=churn, trajectory=True)
        return dct.dct2(run[1].clean[0])

    with jax.enable_x64(True):
        ones = jnp.asarray(dense.Q.T.dot(np.ones(48)).reshape(1, *SHAPE))
        run = quick(seen)
        kept = np.asarray(run(ones, jnp.zeros(SHAPE)))[0, ..., 0]
        added = np.asarray(run(jnp.zeros_like(ones), ones[0]))[0, ..., 0]
    at = lambda t: POWER * dense.gauss(ratio * t) ** 2 + t**2  # noqa: E731
    np.testing.assert_allclose(kept**2 * at(t) + added**2, at(up), rtol=1e-10)
    # and a fixed image arrives where the blur of t̂ would take it
    np.testing.assert_allclose(kept * dense.gauss(ratio * t), dense.gauss(ratio * up), rtol=1e-9, atol=1e-14)


def test_no_churn_is_heun(key):
    p = ALL["warm"]
    x, keys = p.prior(key, (2, *SHAPE)), jax.random.split(key, 2)
    predict = oracle.gaussian(p, POWER)
    heun = quick(lambda x: sampler.sample(predict, p, x, p.levels(9))[0])(x)
    for churn in (sampler.Churn(S_churn=0.0), sampler.Churn(S_churn=9.0, S_min=90.0)):
        settings = {"solver": "stochastic", "keys": keys, "churn": churn}
        ours = quick(lambda x, settings=settings: sampler.sample(predict, p, x, p.levels(9), **settings)[0])(x)
        np.testing.assert_allclose(ours, heun, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("solver", ["stochastic", "ancestral"])
def test_randomness_belongs_to_the_image_not_the_batch(key, solver):
    """An image's noise is a function of its own key: alone, or in another place of another batch, it is the same."""
    p = ALL["warm"]
    x, keys = p.prior(key, (3, *SHAPE)), jax.random.split(key, 3)
    churn, levels = sampler.Churn(S_churn=3.0), p.levels(7)
    run = quick(
        lambda x, keys: sampler.sample(oracle.gaussian(p, POWER), p, x, levels, solver=solver, keys=keys, churn=churn)[
            0
        ]
    )
    together = run(x, keys)
    np.testing.assert_allclose(run(x[::-1], keys[::-1])[::-1], together, atol=5e-5)
    np.testing.assert_allclose(run(x[1:2], keys[1:2])[0], together[1], atol=5e-5)
    assert not np.allclose(run(x, keys[::-1]), together, atol=1e-2)


@pytest.mark.parametrize("solver", ["stochastic", "ancestral", "heun", "multistep", "multistep3"])
def test_extreme_blur_stays_finite_in_float32(solver):
    # BNR 30 from β = 80: a is 0 for all frequencies but the mean, then subnormal, then normal on the way down.
    p = process.warm(SHAPE, bnr.constant(30.0))
    keys = jax.random.split(jax.random.key(0), 2)
    run = quick(
        lambda x: sampler.sample(
            oracle.gaussian(p, POWER), p, x, p.levels(60), solver=solver, keys=keys, churn=sampler.Churn(S_churn=20.0)
        )[0]
    )
    out = np.asarray(run(p.prior(jax.random.key(1), (2, *SHAPE))))
    assert np.all(np.abs(out) < 20 * np.sqrt(POWER.max()))
