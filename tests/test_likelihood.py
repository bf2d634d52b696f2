"""The variational bound against closed forms of Gaussian data, dense algebra in float64, and an independent table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.special
import scipy.stats

from warm_jax.diffusion import bnr, dct, likelihood, noise, oracle, process, systems
from warm_jax.diffusion.process import Prediction
from warm_jax.runtime import mesh

N = 16
SHAPE = (N, N, 1)
LAM = np.pi**2 * ((np.arange(N) / N)[:, None] ** 2 + (np.arange(N) / N) ** 2)
POWER = 1 / (LAM + (np.pi / N) ** 2 / 2)
POWER *= 0.25 / POWER.mean()
ENTROPY = 0.5 * np.log(2 * np.pi * np.e * POWER).sum()  # nats
LEVELS = {"P_mean": -1.2, "P_std": 1.2}


def amortised(ratio):
    made = process.amortised(SHAPE, bnr.log_uniform(0.05, 10.0), **LEVELS)
    return made.follow(bnr.constant(ratio))


PROCESSES = {
    "hot": lambda: process.hot(SHAPE),
    "warm 0.5": lambda: process.warm(SHAPE, bnr.constant(0.5)),
    "warm 2": lambda: process.warm(SHAPE, bnr.constant(2.0)),
    "warm 10": lambda: process.warm(SHAPE, bnr.constant(10.0)),
    "budget": lambda: process.warm(SHAPE, bnr.capped(bnr.information_budget(POWER, 0.05), 10.0)),
    "ddpm": lambda: systems.ddpm(SHAPE),
    "blurring": lambda: systems.blurring(SHAPE),
}


def expected(made, strata):
    """The integral of the exact predictor, or its sum over a grid, with the posterior variance in closed form.

    Gauss's two points in each stratum stand for the draws.
    """

    def one(k):
        t, spent = strata.place(k, jnp.asarray([0.5 - 12**-0.5, 0.5 + 12**-0.5]))
        a, s = made.attenuation(t)[..., 0], made.noise(t)[:, None, None]
        return jnp.sum(spent[..., 0] * POWER * s**2 / (POWER * a**2 + s**2)) / 2

    return float(jnp.sum(jax.lax.map(one, jnp.arange(strata.count))))


def ends(made, strata):
    """What prior and last term add on average, and what of that an exact model would not pay, in closed form."""
    t, low = jnp.asarray(made.highest), jnp.asarray(strata.edges[0])
    a, s = np.asarray(made.attenuation(t)[..., 0]), float(made.noise(t))
    top = POWER * a**2 / s**2
    r = float(made.noise(low)) ** 2 / (POWER * np.asarray(made.attenuation(low)[..., 0]) ** 2)
    paid = 0.5 * top.sum() + 0.5 * np.log(2 * np.pi * np.e * r * POWER).sum()
    return paid, 0.5 * np.log1p(r).sum() + 0.5 * (top - np.log1p(top)).sum()


@pytest.mark.parametrize("name", PROCESSES)
def test_with_the_exact_posterior_mean_every_path_gives_the_entropy(name):
    """Path independence: nothing but the two ends is left above the entropy, whatever the blur."""
    with jax.enable_x64(True):
        made = PROCESSES[name]()
        strata = likelihood.continuous(made, 500)
        paid, extra = ends(made, strata)
        excess = expected(made, strata) + paid - ENTROPY
    # Two points resolve smooth schedules; one has a corner where it is capped, one is straight between 1,000 levels.
    exact = {"budget": 2e-3, "ddpm": 1e-3, "blurring": 5e-5}.get(name, 2e-6)
    np.testing.assert_allclose(excess / N**2, extra / N**2, atol=exact)
    if exact == 2e-6:
        np.testing.assert_allclose(excess / N**2, 3.8e-5, atol=1e-6)  # nats a dimension


@pytest.mark.parametrize(
    ("ratio", "excess"), [(0.0, (0.0817, 0.0203)), (0.5, (0.0822, 0.0204)), (2.0, (0.0865, 0.0214))]
)
def test_the_bound_of_a_chain_exceeds_the_entropy_by_what_an_independent_program_found(ratio, excess):
    """n = 1000 and 4000 levels of EDM's grid; it falls as 1/n."""
    with jax.enable_x64(True):
        made = process.warm(SHAPE, bnr.constant(ratio))
        for n, value in zip((1000, 4000), excess, strict=True):
            strata = likelihood.on_grid(made, made.levels(n)[:-1])
            found = expected(made, strata) + ends(made, strata)[0] - ENTROPY
            np.testing.assert_allclose(found / N**2, value, atol=6e-5)


def drawn(n, seed=1):
    return dct.idct2(
        jnp.sqrt(jnp.asarray(POWER, jnp.float32))[..., None] * jax.random.normal(jax.random.key(seed), (n, *SHAPE))
    )


@pytest.mark.parametrize("name", ["hot", "warm 2", "blurring"])
def test_the_drawn_bound_is_minus_the_log_density_on_average(name, key):
    """Image by image: -log p(x0) in closed form; what is left has the standard error that the strata report."""
    made, x0 = PROCESSES[name](), drawn(32)
    strata = likelihood.continuous(made, 48)
    run = jax.jit(lambda x0, numbers: likelihood.bound(
        oracle.gaussian(made, POWER), made, strata, key, x0, numbers, eight_bit=False
    ))  # fmt: skip
    found = run(x0, jnp.arange(32))
    z = np.asarray(dct.dct2(x0), np.float64)[..., 0]
    exact = 0.5 * np.sum(np.log(2 * np.pi * POWER) + z**2 / POWER, axis=(1, 2))
    # The posterior is not the point x0: each image's own bound is exact only on average over x0.
    difference = (np.asarray(likelihood.total(found), np.float64) - exact) / N**2
    error = difference.std(ddof=1) / np.sqrt(32)
    _, extra = ends(made, strata)
    assert error < 0.02
    assert abs(difference.mean() - extra / N**2) < 4 * error
    reported = np.sqrt(likelihood.sampling_variance(np.asarray(found.by_level).sum(-1)).mean()) / N**2
    assert 0.5 * difference.std(ddof=1) < reported < 4 * difference.std(ddof=1)


def dense(side):
    """The DCT over side² pixels as a matrix, from scipy."""
    return np.kron(*[scipy.fft.dct(np.eye(side), axis=0, norm="ortho")] * 2)


def test_terms_by_frequency_are_the_dense_kl_of_the_posteriors():
    """p(x_j | x_i, x0) by conditioning a joint Gaussian over pixels; KL of the same with the predicted x̂0."""
    side, ratio = 4, 0.5
    made = process.warm((side, side, 1), bnr.constant(ratio))
    levels = np.array([1.7, 0.9, 0.2])
    q, rng = dense(side), np.random.default_rng(0)
    lam = np.pi**2 * ((np.arange(side) / side)[:, None] ** 2 + (np.arange(side) / side) ** 2).ravel()
    x0, wrong = rng.uniform(-1, 1, (2, side * side))

    def posterior(i, j, x_i, clean):
        """x_i = T x_j + noise with T = A_i / A_j, and x_j = A_j x0 + noise."""
        a = [q.T @ np.diag(np.exp(-((ratio * level) ** 2) * lam / 2)) @ q for level in (levels[i], levels[j])]
        step = a[0] @ np.linalg.inv(a[1])
        prior = levels[j] ** 2 * np.eye(side**2)
        own = levels[i] ** 2 * np.eye(side**2) - step @ prior @ step.T
        gain = prior @ step.T @ np.linalg.inv(step @ prior @ step.T + own)
        return a[1] @ clean + gain @ (x_i - a[0] @ clean), prior - gain @ step @ prior

    with jax.enable_x64(True):
        strata, key = likelihood.on_grid(made, levels), jax.random.key(3)
        image = jnp.asarray(x0.reshape(1, side, side, 1))

        def predict(x, t):
            guess = jnp.asarray(wrong.reshape(1, side, side, 1)) + 0.1 * x
            return Prediction(0.3 * guess, 0.7 * guess)

        found = likelihood.bound(predict, made, strata, key, image, jnp.arange(1), eight_bit=False)
        for stratum, (i, j) in enumerate([(1, 2), (0, 1)]):
            _, unit = likelihood.draws(key, jnp.arange(1), jnp.asarray(stratum), (side, side, 1), np.dtype("float64"))
            x_i = q.T @ np.diag(np.exp(-((ratio * levels[i]) ** 2) * lam / 2)) @ q @ x0
            x_i = x_i + levels[i] * np.asarray(unit).ravel()
            mean, covariance = posterior(i, j, x_i, x0)
            other, _ = posterior(i, j, x_i, wrong + 0.1 * x_i)
            whole = 0.5 * (mean - other) @ np.linalg.solve(covariance, mean - other)
            np.testing.assert_allclose(found.by_level[0, stratum].sum(), whole, rtol=1e-9)
            # The covariance is diagonal in frequency, so each ring has its own share.
            share = 0.5 * (q @ (mean - other)) ** 2 / np.diag(q @ covariance @ q.T)
            ring = np.rint(np.hypot(*np.mgrid[:side, :side])).astype(int).ravel()
            np.testing.assert_allclose(found.by_level[0, stratum], np.bincount(ring, share), rtol=1e-8)


def test_a_wrong_predictor_costs_exactly_the_computed_bits(key):
    """x̂0 off by c in one coefficient at every level: ½ (SNR_low - SNR_high) c², on a grid to rounding."""
    c, f = 0.03, (2, 5)
    with jax.enable_x64(True):
        made = process.warm(SHAPE, bnr.constant(0.5))
        x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)))
        off = dct.idct2(jnp.zeros((1, *SHAPE)).at[0, *f, 0].set(c))
        grid = likelihood.on_grid(made, made.levels(8)[:-1])

        def predict(x, t):
            return Prediction(x0 + off, jnp.zeros_like(x0))

        found = likelihood.bound(predict, made, grid, key, x0, jnp.arange(3), eight_bit=False)

    def snr(t):
        return np.exp(-((0.5 * t) ** 2) * LAM[f]) / t**2

    nats = 0.5 * (snr(0.002) - snr(80.0)) * c**2
    np.testing.assert_allclose(np.asarray(found.by_level).sum((1, 2)), nats, rtol=1e-9)
    assert np.asarray(found.by_level)[0, :, round(np.hypot(*f))].sum() == pytest.approx(nats, rel=1e-9)
    bits = likelihood.bits(nats, N * N)
    assert bits == pytest.approx(nats / np.log(2) / 256)


def test_images_are_independent_of_their_batch_and_of_the_devices(key):
    """One device and eight, alone and together; an amortised model at a fixed BNR is the warm one."""
    x0, numbers = drawn(8), jnp.arange(8)

    def of(made, devices, chosen):
        strata, predict = likelihood.continuous(made, 3), oracle.gaussian(made, POWER)
        split = mesh.split(mesh.make_mesh(devices))
        run = jax.jit(
            lambda x0, numbers: likelihood.total(likelihood.bound(predict, made, strata, key, x0, numbers)),
            out_shardings=split,
        )
        return np.asarray(run(jax.device_put(x0[chosen], split), jax.device_put(numbers[chosen], split)))

    warm = process.warm(SHAPE, bnr.constant(0.5))
    every = of(warm, 8, slice(8))
    np.testing.assert_allclose(of(warm, 1, slice(5, 6)), every[5:6], rtol=2e-6)
    np.testing.assert_allclose(of(amortised(0.5), 8, slice(8)), every, rtol=2e-6)


@pytest.mark.parametrize("sigma", [0.002, 0.02])
def test_the_last_term_of_bytes_weighs_all_values_of_a_pixel(key, sigma):
    """scipy's normal densities of all 256 values, pixel by pixel in float64, at BNR 0."""
    made = process.hot((4, 4, 1))
    values = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1))
    values[0, 0, 0], values[0, 0, 1] = 0, 255
    unit = jax.random.normal(key, (2, 4, 4, 1))
    x0 = jnp.asarray(values / 127.5 - 1, jnp.float32)
    found = likelihood.last_byte_nats(made, x0, sigma, unit)
    seen = np.asarray(x0, np.float64) + sigma * np.asarray(unit, np.float64)
    every = scipy.stats.norm.logpdf(seen[..., None], np.arange(256) / 127.5 - 1, sigma)
    own = np.take_along_axis(every, values[..., None], -1)[..., 0] - scipy.special.logsumexp(every, -1)
    np.testing.assert_allclose(found, -own.sum((1, 2, 3)), rtol=1e-3)


def test_the_prior_is_the_kl_of_two_gaussians():
    """With and without a Gaussian start, by scipy's entropies in one dimension after another."""
    made = process.warm((4, 4, 1), bnr.constant(0.5), beta_max=2.0)
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)), jnp.float32)
    rng = np.random.default_rng(1)
    start = likelihood.Start(rng.normal(size=(4, 4, 1)) * 0.1, rng.uniform(0.1, 0.5, (4, 4, 1)))
    lam = np.pi**2 * ((np.arange(4) / 4)[:, None] ** 2 + (np.arange(4) / 4) ** 2)[..., None]
    mean = np.exp(-lam / 2) * scipy.fft.dctn(np.asarray(x0, np.float64), axes=(1, 2), norm="ortho")
    for given in (None, start):
        m, variance = (0, 4.0) if given is None else (given.mean, 4.0 + given.variance)
        kl = 0.5 * (4 / variance + (mean - m) ** 2 / variance - 1 - np.log(4 / variance))
        found = likelihood.prior_nats(made, x0, given).sum(1)
        np.testing.assert_allclose(found, kl.sum((1, 2, 3)), rtol=1e-5)


def test_the_budgets_slope_is_that_of_its_values():
    """Against central differences in float64, of a value that bisection finds to 10⁻⁸."""
    with jax.enable_x64(True):
        schedule = bnr.information_budget(POWER, 0.05)
        beta, h = jnp.asarray([0.01, 0.3, 2.0, 60.0]), 1e-3
        found = jax.jvp(schedule, (beta,), (beta,))[1]
        numeric = (schedule(beta * np.exp(h)) - schedule(beta * np.exp(-h))) / (2 * h)
    np.testing.assert_allclose(found, numeric, atol=5e-6)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: systems.cold(SHAPE, lambda key, shape: jnp.zeros(shape), np.array([0.0, 1.0])), "no likelihood"),
        (lambda: systems.ihdm(SHAPE, lambda key, shape: jnp.zeros(shape)), "kernel density"),
        (lambda: process.pfgmpp(SHAPE, 128.0), "Gaussian noise"),
    ],
)
def test_what_has_no_bound_is_refused_with_the_reason(made, reason):
    with pytest.raises(ValueError, match=reason):
        likelihood.check(made())


def test_bad_strata_are_refused():
    made = process.hot(SHAPE)
    for wrong, text in (
        (lambda: likelihood.continuous(made, 0), "at least 1 stratum"),
        (lambda: likelihood.continuous(made, 4, 90.0), "between 0 and 80"),
        (lambda: likelihood.on_grid(made, np.array([1.0])), "at least 2 levels"),
        (lambda: likelihood.on_grid(made, np.array([2.0, 1.0, 0.5]), 3), "from 1 to 2 strata"),
        (lambda: likelihood.sampling_variance(np.zeros((1, 2))), "at least 3 strata"),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()
    assert noise.GAUSSIAN is made.law
