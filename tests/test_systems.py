"""The corruptions of all systems: schedules, levels, targets and starts against their papers' equations in numpy."""

import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from warm_jax.diffusion import bnr, loss, oracle, process, sampler, systems

SHAPE = dense.SHAPE
IMAGES = np.random.RandomState(3).uniform(-1, 1, (40, 6, 8, 3)).astype(np.float32)


def start(key, shape):
    return jnp.zeros(shape, jnp.float32)


ALL = {
    "hot": process.hot(SHAPE),
    "warm": process.warm(SHAPE, bnr.constant(0.5)),
    "amortised": process.amortised(SHAPE, bnr.log_uniform(0.05, 10.0, 0.1)),
    "pfgmpp": process.pfgmpp(SHAPE, 128.0),
    "ddpm": systems.ddpm(SHAPE),
    "cosine": systems.ddpm(SHAPE, "cosine"),
    "blurring": systems.blurring(SHAPE),
    "ihdm": systems.ihdm(SHAPE, start, 20),
    "cold": systems.cold(SHAPE, start, systems.cold_blurs(systems.cold_kernels("linear", 50), 11)),
}


@functools.cache
def scales(name):
    """(a `[.., h, w, 1]`, s) of a system at levels, compiled."""
    p = ALL[name]
    return jax.jit(lambda t: (p.attenuation(t), p.noise(t)))


# ── Schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_linear_schedule_is_the_product_of_ddpm():
    k = np.array([1, 10, 500, 1000])
    alpha_bar = dense.linear_alpha_bar()[k]
    a, s = scales("ddpm")(jnp.asarray(k / 1000, jnp.float32))
    np.testing.assert_allclose(np.square(a), np.broadcast_to(alpha_bar[:, None, None, None], a.shape), rtol=2e-5)
    np.testing.assert_allclose(np.square(s), 1 - alpha_bar, rtol=2e-5)
    with jax.enable_x64(True):
        a, s = scales("ddpm")(jnp.asarray(k / 1000))
        fewer = systems.linear_logsnr(jnp.asarray(k[:3] / 500), 500)
    np.testing.assert_allclose(np.square(s), 1 - alpha_bar, rtol=1e-11)
    np.testing.assert_allclose(np.square(a[:, 2, 3, 0]), alpha_bar, rtol=1e-11)
    expected = dense.linear_alpha_bar(500)[k[:3]]
    np.testing.assert_allclose(fewer, np.log(expected / (1 - expected)), rtol=1e-11)


def test_cosine_schedule_runs_from_10_to_minus_10():
    t = np.linspace(0, 1, 201)
    alpha_bar = dense.cosine_alpha_bar(t)
    logsnr = np.asarray(jax.jit(systems.cosine_logsnr)(jnp.asarray(t, jnp.float32)))
    np.testing.assert_allclose(logsnr[[0, -1]], [10, -10], atol=1e-4)
    np.testing.assert_allclose(logsnr, np.log(alpha_bar / (1 - alpha_bar)), atol=1e-4)
    # Nichol and Dhariwal's cosine, with the ends cut off: ᾱ = cos² of an angle that grows evenly.
    angle = np.arccos(np.sqrt(alpha_bar))
    np.testing.assert_allclose(np.diff(angle), np.diff(angle)[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "cosine", "blurring"])
def test_float32_scales_at_every_level_of_the_native_grid(name):
    """a and s at t = k / 1000 as the papers have them, in numpy float64: accurate to the ends; a² + s² = 1."""
    k = np.arange(1, 1001)
    a, s = scales(name)(jnp.asarray(ALL[name].levels(1000)[:-1][::-1], jnp.float32))
    if name == "ddpm":
        alpha_bar = dense.linear_alpha_bar()[1:]
    else:
        alpha_bar = dense.cosine_alpha_bar(k / 1000)
    np.testing.assert_allclose(s, np.sqrt(1 - alpha_bar), rtol=3e-5)
    np.testing.assert_allclose(a[:, 0, 0, 0], np.sqrt(alpha_bar), rtol=3e-5)
    np.testing.assert_allclose(np.square(a[:, 0, 0, 0]) + np.square(s), 1, atol=5e-7)
    if name == "blurring":
        expected = np.stack([dense.blurring_schedule(i / 1000)[0] for i in k])
        np.testing.assert_allclose(a[..., 0], expected, rtol=1e-4)
    else:
        np.testing.assert_array_equal(a, np.broadcast_to(a[:, :1, :1], a.shape))


@pytest.mark.parametrize("name", ALL)
def test_every_path_has_a_clean_end(name):
    a, s = scales(name)(jnp.asarray([0.0, ALL[name].highest], jnp.float32))
    np.testing.assert_array_equal(s[0], 0)
    np.testing.assert_array_equal(a[0], np.broadcast_to(1, a[0].shape))
    assert np.all(np.isfinite(a)) and np.all(np.isfinite(s)) and np.all(a >= 0)


def test_blurring_attenuates_as_scipy_does():
    x = IMAGES[:3]
    for t in (0.003, 0.4, 1.0):
        expected = dense.filtered(x, dense.blurring_schedule(t)[0])
        ours = ALL["blurring"].attenuate(jnp.asarray(x), jnp.full(3, t))
        np.testing.assert_allclose(ours, expected, atol=2e-6)
        np.testing.assert_allclose(ALL["blurring"].blur(jnp.asarray(t)), 20 * np.sin(np.pi * t / 2) ** 2, rtol=1e-5)


def test_blurring_without_blur_is_denoising_diffusion(key):
    ours, theirs = systems.blurring(SHAPE, blur_max=0.0), ALL["cosine"]
    t, x0 = jnp.asarray([0.0, 0.01, 0.5, 0.99, 1.0]), jnp.asarray(IMAGES[:5, ..., :1])
    a, s = jax.jit(lambda t: (ours.attenuation(t), ours.noise(t)))(t)
    expected_a, expected_s = scales("cosine")(t)
    np.testing.assert_allclose(a, jnp.broadcast_to(expected_a, a.shape), rtol=3e-7)
    np.testing.assert_array_equal(s, expected_s)
    np.testing.assert_allclose(jax.jit(ours.corrupt)(key, x0, t)[0], jax.jit(theirs.corrupt)(key, x0, t)[0], atol=2e-6)
    np.testing.assert_array_equal(ours.draw_levels(key, 9), theirs.draw_levels(key, 9))
    np.testing.assert_array_equal(ours.prior(key, SHAPE), theirs.prior(key, SHAPE))
    assert not ours.blurs


def test_blurring_never_loses_noise_on_the_way_up():
    """σ²_ts = σ_t² - α_ts² σ_s² > 0 for all 1000 steps at 32², in float32, and right to 1 %: numpy float64 knows it."""
    p = systems.blurring((32, 32, 3))
    lam = np.pi**2 * ((np.arange(32) / 32)[:, None] ** 2 + (np.arange(32) / 32) ** 2)
    a, s = jax.tree.map(np.asarray, jax.jit(lambda t: (p.attenuation(t), p.noise(t)))(jnp.float32(p.levels(1000))))
    ours = np.square(s[:-1])[:, None, None] - np.square(a[:-1, ..., 0] / a[1:, ..., 0] * s[1:, None, None])
    scaled = [dense.blurring_schedule(k / 1000, lam=lam) for k in range(1000, 0, -1)]
    pairs = zip(scaled, [*scaled[1:], (np.ones((32, 32)), 0)], strict=True)
    exact = np.stack([s_t**2 - (a_t / a_s * s_s) ** 2 for (a_t, s_t), (a_s, s_s) in pairs])
    assert exact.min() > 0 and ours.min() > 0
    np.testing.assert_allclose(ours, exact, rtol=0.01)


# ── Levels in training ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "count", "unit"), [("ddpm", 1000, 1e-3), ("ihdm", 20, 1), ("cold", 50, 1)])
def test_discrete_levels_are_uniform_from_one_to_the_last(key, name, count, unit):
    # IHDM's released code never draws k = K, where sampling starts; here it is drawn.
    k = np.asarray(ALL[name].draw_levels(key, 20000), np.float64) / unit
    np.testing.assert_allclose(k, np.round(k), atol=1e-3)
    counts = np.bincount(np.round(k).astype(int), minlength=count + 1)
    assert len(counts) == count + 1 and counts[0] == 0
    assert scipy.stats.chisquare(counts[1:]).pvalue > 1e-3


@pytest.mark.parametrize("name", ["cosine", "blurring"])
def test_continuous_levels_are_uniform(key, name):
    t = np.asarray(ALL[name].draw_levels(key, 20000))
    assert scipy.stats.kstest(t, "uniform").pvalue > 1e-3 and t.min() > 0 and t.max() <= 1


# ── Inverse heat dissipation, cold diffusion ─────────────────────────────────────────────────────────────────────────


def test_ihdm_blurs_grow_by_equal_ratios():
    blurs = systems.ihdm_blurs(200, 0.5, 24.0)
    assert blurs[0] == 0 and len(blurs) == 201
    np.testing.assert_allclose(blurs[1:], 0.5 * 48 ** (np.arange(200) / 199), rtol=1e-12)
    t = jnp.arange(201, dtype=jnp.float32)
    np.testing.assert_allclose(systems.ihdm(SHAPE, start).blur(t), blurs, rtol=1e-6)


def test_ihdm_learns_to_go_one_level_back(key):
    p, n = ALL["ihdm"], 2000
    sigma = 0.5 * 48 ** (np.arange(20) / 19)  # of k = 1, …, 20
    for k, blur_here, blur_before in ((1, sigma[0], 0.0), (12, sigma[11], sigma[10])):
        x0 = np.broadcast_to(IMAGES[0, ..., :1], (n, *SHAPE))
        x, blurred, residual = jax.jit(p.corrupt)(key, x0, jnp.full(n, float(k)))
        before = dense.blurred(x0[0], blur_before)
        np.testing.assert_allclose(blurred[5], before, atol=2e-6)
        np.testing.assert_allclose(residual[5], x0[0] - before, atol=2e-6)
        noise = (np.asarray(x, np.float64) - dense.blurred(x0[0], blur_here)) / 0.02
        assert scipy.stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3


def test_ihdm_takes_its_own_number_of_steps():
    np.testing.assert_array_equal(ALL["ihdm"].levels(20), np.arange(20, -1, -1))
    with pytest.raises(ValueError, match="it takes 20 steps, not 19"):
        ALL["ihdm"].levels(19)


@pytest.mark.parametrize(("kind", "steps", "size"), [("linear", 50, 11), ("exponential", 300, 27)])
def test_cold_blur_is_the_spread_of_all_kernels_in_a_row(kind, steps, size):
    """Convolving the kernels one after another and measuring the std of what comes out; CIFAR-10's is about 4.2 px.

    Bansal et al.'s code counts kernels from i = 0.
    """
    i = np.arange(steps)
    stds = 0.35 + i / 100 if kind == "linear" else np.exp(0.01 * i)
    row, spreads = np.ones(1), [0.0]
    for std in stds:
        taps = scipy.stats.norm.pdf(np.arange(size) - size // 2, scale=std)
        row = np.convolve(row, taps / taps.sum())
        offsets = np.arange(len(row)) - len(row) // 2
        spreads.append(np.sqrt(np.sum(row * offsets**2)))
    blurs = systems.cold_blurs(systems.cold_kernels(kind, steps), size)
    np.testing.assert_allclose(blurs, spreads, rtol=1e-9)
    if kind == "linear":
        assert 4.15 <= blurs[-1] < 4.25
        np.testing.assert_allclose(ALL["cold"].blur(jnp.arange(51.0)), spreads, rtol=1e-6)


def test_cold_adds_no_noise(key):
    t = jnp.asarray([1.0, 20.0, 50.0])
    x, blurred, residual = jax.jit(ALL["cold"].corrupt)(key, IMAGES[:3, ..., :1], t)
    blurs = systems.cold_blurs(0.35 + np.arange(50) / 100, 11)
    expected = np.stack([dense.blurred(IMAGES[i, ..., :1], blurs[k]) for i, k in enumerate((1, 20, 50))])
    np.testing.assert_allclose(x, expected, atol=2e-6)
    np.testing.assert_allclose(blurred, expected, atol=2e-6)
    np.testing.assert_allclose(residual, IMAGES[:3, ..., :1] - expected, atol=2e-6)


def test_a_start_of_mean_colours_has_their_mean_and_covariance(key):
    images = IMAGES * np.array([1, 0.5, 2], np.float32) + IMAGES[:, :1, :1, :1] * np.array([0.2, 1, -1], np.float32)
    colours = images.mean((1, 2), dtype=np.float64)
    low = np.asarray(systems.low_frequencies(jnp.asarray(images), 24.0))
    assert low.shape == (40, 1, 1, 3)
    p = systems.cold((6, 8, 3), systems.mean_colours((6, 8, 3), low), np.array([0.0, 24.0]), symmetry_noise=0.002)
    n = 20000
    x = np.asarray(jax.jit(lambda key: p.prior(key, (n, 6, 8, 3)))(key), np.float64)
    drawn, covariance = x.mean((1, 2)), np.cov(colours.T)
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(drawn.mean(0), colours.mean(0), atol=5 * spread.max() / np.sqrt(n))
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=6 * spread.max() ** 2 / np.sqrt(n))
    rest = (x - drawn[:, None, None]) / 0.002 / np.sqrt(1 - 1 / 48)  # one degree of freedom of 48 went into the mean
    np.testing.assert_allclose(rest.std(), 1, rtol=0.01)


@pytest.mark.parametrize("alpha", [0.7, 2.5])
def test_a_start_of_images_is_one_of_them_blurred(key, alpha):
    low = np.asarray(systems.low_frequencies(jnp.asarray(IMAGES), alpha))
    blurs = np.array([0.0, alpha])
    p = systems.cold((6, 8, 3), systems.blurred_images((6, 8, 3), low, alpha), blurs, symmetry_noise=0.0)
    x = np.asarray(jax.jit(lambda key: p.prior(key, (800, 6, 8, 3)))(key))
    distance = np.abs(x[:, None] - dense.blurred(IMAGES, alpha)).max((2, 3, 4))
    assert distance.min(1).max() < 5e-5  # frequencies of which less than 1e-5 is left are dropped
    assert scipy.stats.chisquare(np.bincount(distance.argmin(1), minlength=40)).pvalue > 1e-3


def test_ihdm_starts_where_training_ends(key):
    """B_K x0 + σ ε, as the states of k = K that it is trained on."""
    low = np.asarray(systems.low_frequencies(jnp.asarray(IMAGES[:1]), 24.0))
    p = systems.ihdm((6, 8, 3), systems.blurred_images((6, 8, 3), low, 24.0))
    x = np.asarray(jax.jit(lambda key: p.prior(key, (300, 6, 8, 3)))(key), np.float64)
    noise = (x - dense.blurred(IMAGES[0], 24.0)) / 0.02
    assert scipy.stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3


# ── Ratios ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ratios_are_log_uniform_with_a_share_of_zeros(key):
    ratios = np.asarray(bnr.log_uniform(0.05, 10.0, 0.2)(key, 20000), np.float64)
    assert scipy.stats.binomtest(int(np.sum(ratios == 0)), 20000, 0.2).pvalue > 1e-3
    log = np.log(ratios[ratios > 0])
    assert scipy.stats.kstest(log, "uniform", args=(np.log(0.05), np.log(200))).pvalue > 1e-3
    assert np.all(bnr.log_uniform(0.5, 0.5, 0.0)(key, 5) > 0) and not np.any(bnr.log_uniform(1.0, 2.0, 1.0)(key, 5))
    for bad in ({"least": 0.0}, {"most": 0.01}, {"zero": 1.5}):
        with pytest.raises(ValueError, match="not"):
            bnr.log_uniform(**{"least": 0.05, "most": 10.0, "zero": 0.1, **bad})


def test_a_cap_holds_the_ratio_down():
    beta = jnp.asarray([0.0, 0.5, 1.0, 3.0, 8.0])
    np.testing.assert_allclose(bnr.capped(jnp.square, 2.0)(beta), [0, 0.25, 1, 6, 16])  # min(β², 2 β)
    np.testing.assert_allclose(bnr.capped(bnr.constant(3.0), 2.0)(beta), 2 * beta)
    with pytest.raises(ValueError, match="above 0, not 0"):
        bnr.capped(jnp.square, 0.0)


def test_amortised_images_follow_each_its_own_ratio(key):
    p, n = ALL["amortised"], 4000
    x0 = np.broadcast_to(IMAGES[0, ..., :1], (n, *SHAPE))
    example = jax.tree.map(np.asarray, jax.jit(lambda key, x0: loss.draw(p, key, x0))(key, x0))
    ratio, t = example.bnr.astype(np.float64), example.t.astype(np.float64)
    factor = np.exp(-((ratio * t)[:, None, None] ** 2) * dense.LAM / 2)
    z = (dense.Q @ x0[0].ravel().astype(np.float64)).reshape(6, 8)
    expected = np.einsum("fp,nf->np", dense.Q, (factor * z).reshape(n, -1)).reshape(n, *SHAPE)
    np.testing.assert_allclose(example.blurred, expected, atol=5e-6)
    np.testing.assert_allclose(example.residual, x0 - expected, atol=5e-6)
    noise = (example.x - expected) / t[:, None, None, None]
    pick = t > 0.02  # below, float32 images hide the noise's digits
    assert scipy.stats.kstest(np.ravel(noise[pick]), "norm").pvalue > 1e-3
    # Level, ratio and noise are independent draws.
    assert scipy.stats.kstest((np.log(t) + 1.2) / 1.2, "norm").pvalue > 1e-3
    assert scipy.stats.spearmanr(t, ratio).pvalue > 1e-3
    assert scipy.stats.spearmanr(t, noise[:, 0, 0, 0]).pvalue > 1e-3
    assert scipy.stats.spearmanr(ratio, noise[:, 0, 0, 0]).pvalue > 1e-3


def test_amortised_at_one_ratio_is_warm(key):
    """x = B_{r t} x0 + t ε in numpy, on the process that samples follow, and for a vector of ratios."""
    t, x0 = np.array([0.05, 0.7, 6.0]), IMAGES[:3, ..., :1]
    for ratios, p in (
        ([2.0, 2.0, 2.0], ALL["amortised"].follow(bnr.constant(2.0))),
        ([0.0, 0.5, 2.0], loss.following(ALL["amortised"], jnp.asarray([0.0, 0.5, 2.0]))),
    ):
        x, blurred, residual = jax.jit(p.corrupt)(key, x0, jnp.asarray(t, jnp.float32))
        expected = np.stack([dense.blurred(*pair) for pair in zip(x0, ratios * t, strict=True)])
        np.testing.assert_allclose(blurred, expected, atol=2e-6)
        np.testing.assert_allclose(residual, x0 - expected, atol=2e-6)
        normal = jax.random.normal(key, x0.shape)
        np.testing.assert_allclose(x - expected, normal * t[:, None, None, None], atol=2e-6)


# ── What can run what ────────────────────────────────────────────────────────────────────────────────────────────────

SCORE = {"heun", "euler", "multistep", "multistep3"}
CAN = {
    "hot": SCORE | {"ancestral", "stochastic"},
    "warm": SCORE | {"ancestral", "stochastic"},
    "amortised": SCORE | {"ancestral", "stochastic"},
    "pfgmpp": SCORE,
    "ddpm": SCORE | {"ancestral"},
    "cosine": SCORE | {"ancestral"},
    "blurring": SCORE | {"ancestral"},
    "ihdm": {"perturb"},
    "cold": {"euler", "heun"},
}
REASON = {"pfgmpp": "not Gaussian", "ihdm": "neither ε nor x0", "cold": "no noise"}


@pytest.mark.parametrize("name", ALL)
def test_solvers_that_make_no_sense_are_refused(name):
    """From the mathematics: no ε no score; no Gaussian noise no step up; levels in units of t only for EDM's family."""
    p = ALL[name]
    for solver in sampler.SOLVERS:
        if solver in CAN[name]:
            sampler.check_solver(solver, p)
            continue
        with pytest.raises(ValueError, match=f"cannot be sampled by {solver}: .*; choose ") as error:
            sampler.check_solver(solver, p)
        told = str(error.value)
        assert REASON.get(name, "" if solver != "perturb" else "its levels") in told
        assert set(told.rsplit("choose ", 1)[1].split(" or ")) == CAN[name]
    with pytest.raises(ValueError, match=f"unknown solver 'rk4'; choose one of {p.solvers[0]}"):
        sampler.check_solver("rk4", p)


def test_random_solvers_ask_for_keys():
    with pytest.raises(ValueError, match="ancestral draws noise: give keys"):
        predict = oracle.gaussian(ALL["ddpm"], dense.POWER)
        sampler.sample(predict, ALL["ddpm"], jnp.zeros((1, *SHAPE)), np.array([1.0, 0.5]), solver="ancestral")


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float64")], ids=str)
def test_the_images_type_is_kept_under_strict_promotion(name, dtype):
    """Traced only: with float64 allowed, float32 images stay float32, and float64 ones float64, in every solver."""
    p = ALL[name]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x, t = jax.ShapeDtypeStruct((2, *SHAPE), dtype), jax.ShapeDtypeStruct((2,), dtype)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
        assert {a.dtype for a in jax.eval_shape(p.corrupt, jax.random.key(0), x, t)} == {dtype}
        if dtype == np.float32:  # levels are drawn in float32
            assert jax.eval_shape(lambda x: loss.draw(p, jax.random.key(0), x).x, x).dtype == dtype
        prior = jax.eval_shape(lambda: p.prior(jax.random.key(0), (2, *SHAPE)))
        assert prior.dtype == np.float32
        for solver in p.solvers:

            def run(x, keys, solver=solver):
                predict = oracle.gaussian(p, dense.POWER)
                return sampler.sample(predict, p, x, p.levels(20), solver=solver, keys=keys, trajectory=True)

            out, record = jax.eval_shape(run, x, keys)
            assert out.dtype == record.states.dtype == record.clean.dtype == dtype
