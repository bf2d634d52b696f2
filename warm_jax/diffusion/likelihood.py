r"""A variational bound on -log p(x0), frequency by frequency, for every process with Gaussian noise (method.md §16).

With SNR_t[f] = a(t)[f]² / s(t)[f]², falling in t, the Gaussian posteriors p(x_j | x_i, x0) and p(x_j | x_i, x̂0) of the
ancestral chain have one variance, and the KL divergence between them is

    KL_ij = ½ Σ_f (SNR_j[f] - SNR_i[f]) · |z_0[f] - ẑ_0[f](x_i)|²,        z = dct(x),  j below i            (1)

With ever finer steps

    -log p(x0) ≤ ∫ ½ Σ_f (-dSNR_t[f]/dt) E|z_0[f] - ẑ_0[f](x_t)|² dt  +  prior  +  last                      (2)

    prior   KL of p(x_T | x0) from what sampling starts with: ½ Σ_f SNR_T[f] z_0[f]² where that is the noise alone
    last    E[-log P(x0 | x_low)] at the lowest level. Of 8-bit data each pixel apart, its 256 values weighed by their
            normal densities; of real numbers the density N(z_low / a, s² / a²) of each frequency

For the exact posterior mean (2) does not depend on the path: ½ E|z_0 - ẑ_0|² is the gradient of the mutual information
with respect to the SNRs. What differs between two BNRs is what a network fails to learn along each.

The integral is drawn in strata of the clock ln(s / a[0]), which is ln β in EDM's family: one level in each for each
image. Levels and noise are functions of key, image and stratum alone, so two models see the same and differences can
be taken image by image. The sum over a given grid (1) is drawn in the same way, or is complete with a stratum a step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from warm_jax.diffusion import dct, radial
from warm_jax.diffusion.noise import GAUSSIAN
from warm_jax.diffusion.process import Predict, Process

BIN = 2 / 255  # between two values of 8-bit data on [-1, 1]
_NODES = 512  # of the clock's table
_TAIL = 12  # standard deviations beyond which float32 knows no weight


class Bound(NamedTuple):
    """The terms of (2) for each image, nats. Their sum is `total`."""

    by_level: Float[Array, "b strata rings"]  # the integral, or the sum (1): by stratum, the lowest noise first
    prior: Float[Array, "b rings"]
    last: Float[Array, " b"]


class Start(NamedTuple):
    """The Gaussian that a(T) z_0 is said to follow where sampling starts, of each DCT coefficient; zero: nothing."""

    mean: Float[Array, "h w c"]
    variance: Float[Array, "h w c"]


class Strata(NamedTuple):
    """How levels are drawn: in stratum k of n, at the share u of its width. See `continuous` and `on_grid`.

    Attributes:
      count: n.
      place: (k, u `[b]`) -> levels t `[b]`, and ½ of the SNR that is spent there `[b, h, w, 1]`.
      edges: Levels between which the strata lie, float64 `[n + 1]`, rising.
    """

    count: int
    place: Callable[[Array, Float[Array, " b"]], tuple[Float[Array, " b"], Float[Array, "b h w 1"]]]
    edges: Float64[np.ndarray, " edges"]


def check(process: Process) -> None:
    """Raises ValueError, with the reason, where (2) is no bound of the process."""
    if process.target is not None:
        raise ValueError(
            "the bound needs a prediction of x0; inverse heat dissipation predicts the next less blurred image, in a "
            "chain of its own whose start is a kernel density of training images"
        )
    if process.law is not GAUSSIAN:
        raise ValueError("the bound is of Gaussian noise, and PFGM++'s is not; the hot system is its limit")
    if process.colour is not None:
        raise ValueError("the bound's terms for bytes are of white noise, and this process's noise has a colour")
    with jax.ensure_compile_time_eval():
        noisy = bool(process.noise(jnp.asarray(process.highest, jnp.float32)) > 0)
    if not noisy:
        raise ValueError("cold diffusion adds no noise, so it has no density and no likelihood")


def lowest(process: Process) -> float:
    """The level at which the process ends but for its last step: `beta_min`, or one of a thousand steps of t."""
    return float(process.levels(1000)[-2])


def signal_to_noise(process: Process, t: Float[Array, "*b"]) -> Float[Array, "*b h w 1"]:
    """SNR_t[f]; 0 where nothing is left of a frequency."""
    return jnp.square(process.attenuation(t) / process.noise(t)[..., None, None, None])


# ── Levels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ticks(process: Process, low: float) -> tuple[Float64[np.ndarray, " nodes"], Float64[np.ndarray, " nodes"]]:
    """ln t at equal steps of the clock, from level `low` to the highest; and the clock, scaled to [0, 1]."""
    log_t, ticks = np.linspace(math.log(low), math.log(process.highest), _NODES), np.linspace(0, 1, _NODES)
    with jax.ensure_compile_time_eval():
        t = jnp.asarray(np.exp(log_t), jnp.float32)
        clock = np.asarray(process.log_noise_to_signal(t), np.float64)
        rising = (
            np.diff(np.asarray(signal_to_noise(process, t)), axis=0)
            > 1e-4 * np.asarray(signal_to_noise(process, t))[1:]
        )
    if rising.any():
        raise ValueError(
            f"the bound needs a signal-to-noise ratio that falls; here blur shrinks so fast near level "
            f"{np.exp(log_t[np.argwhere(rising)[0][0]]):.3g} that some frequency's rises: lower process.bnr_max"
        )
    clock = np.maximum.accumulate(clock)
    if np.allclose(clock, log_t, atol=1e-5):  # the level is the clock: no table that float32 has rounded
        return log_t, ticks
    return np.interp(ticks, (clock - clock[0]) / (clock[-1] - clock[0]), log_t), ticks


def continuous(process: Process, count: int, low: float | None = None) -> Strata:
    """Strata of equal width in ln(s / a[0]) between the level `low` (None: `lowest`) and the highest one.

    The map from the clock to t is a table, and its own slope goes into the weight, so that (2) is estimated without
    bias whatever the table's rounding.
    """
    low = lowest(process) if low is None else low
    if not 0 < low < process.highest:
        raise ValueError(f"the lowest level must lie between 0 and {process.highest:g}, not at {low}")
    if count < 1:
        raise ValueError(f"the bound needs at least 1 stratum, not {count}")
    nodes, ticks = _ticks(process, low)

    def place(k: Array, u: Array) -> tuple[Array, Array]:
        table = jnp.asarray(nodes, u.dtype)
        position = (k.astype(u.dtype) + u) / count * (_NODES - 1)
        cell = jnp.clip(position.astype(jnp.int32), 0, _NODES - 2)
        slope = table[cell + 1] - table[cell]
        log_t = table[cell] + (position - cell.astype(u.dtype)) * slope

        def of_log(log_t: Array) -> Array:
            return signal_to_noise(process, jnp.exp(log_t))

        _, falling = jax.jvp(of_log, (log_t,), (jnp.ones_like(log_t),))
        spent = -falling * (slope * (_NODES - 1) / count)[:, None, None, None]
        return jnp.exp(log_t), spent / 2

    return Strata(count, place, np.exp(np.interp(np.linspace(0, 1, count + 1), ticks, nodes)))


def on_grid(process: Process, levels: Float64[np.ndarray, " m"], count: int | None = None) -> Strata:
    """The sum (1) over the steps of a grid: noisy levels falling, as `process.levels(n)[:-1]`.

    With `count` fewer strata than steps one step of each stratum is drawn, with the weight of all; None: every step.
    """
    rising = np.sort(np.asarray(levels, np.float64))
    steps = len(rising) - 1
    count = steps if count is None else count
    if steps < 1 or rising[0] <= 0 or np.any(np.diff(rising) <= 0):
        raise ValueError("a grid for the bound has at least 2 levels, all above 0 and no two the same")
    if not 1 <= count <= steps:
        raise ValueError(f"a grid of {steps} steps has from 1 to {steps} strata, not {count}")
    first = np.round(np.linspace(0, steps, count + 1)).astype(np.int64)

    def place(k: Array, u: Array) -> tuple[Array, Array]:
        start, end = jnp.asarray(first)[k], jnp.asarray(first)[k + 1]
        width = (end - start).astype(u.dtype)
        step = jnp.minimum(start + jnp.floor(u * width).astype(start.dtype), end - 1)
        t = jnp.asarray(rising, u.dtype)
        spent = signal_to_noise(process, t[step]) - signal_to_noise(process, t[step + 1])
        return t[step + 1], spent * width / 2

    return Strata(count, place, rising[first])


# ── Ends of the path ─────────────────────────────────────────────────────────────────────────────────────────────────


def _by_ring(values: Float[Array, "b h w c"]) -> Float[Array, "b rings"]:
    """Sums over the channels and the coefficients of each ring, see `radial.rings`."""
    ring = radial.rings(*values.shape[1:3])
    members = jnp.asarray(ring.ravel()[:, None] == np.arange(ring.max() + 1), values.dtype)
    flat = jnp.sum(values, axis=-1).reshape(len(values), -1)
    return jnp.matmul(flat, members, precision=jax.lax.Precision.HIGHEST)


def prior_nats(process: Process, x0: Float[Array, "b h w c"], start: Start | None = None) -> Float[Array, "b rings"]:
    """KL of p(x_T | x0) from what sampling starts with, by ring.

    N(0, s²) for a process without a start; with one, `start` must say its Gaussian. ValueError where it is missing.
    """
    if process.start is not None and start is None:
        raise ValueError("sampling starts from images here; the bound needs the Gaussian that they follow (`start`)")
    t = jnp.asarray(process.highest, x0.dtype)
    signal = process.attenuation(t) * dct.dct2(x0)
    noise = jnp.square(process.noise(t))
    if start is None:
        return _by_ring(jnp.square(signal) / (2 * noise))
    variance = noise + jnp.asarray(start.variance, x0.dtype)
    extra = jnp.square(signal - jnp.asarray(start.mean, x0.dtype)) / variance
    return _by_ring((extra + noise / variance - 1 - jnp.log(noise / variance)) / 2)


def last_density_nats(process: Process, x0: Float[Array, "b h w c"], low: float) -> Float[Array, " b"]:
    """E[-log p(x0 | x_low)] of real-valued data under the density N(z_low / a, s² / a²): entropy, the same for all."""
    t = jnp.asarray(low, x0.dtype)
    ratio = jnp.broadcast_to(process.noise(t) / process.attenuation(t), x0.shape[1:])
    return jnp.full(len(x0), jnp.sum(jnp.log(ratio)) + 0.5 * math.log(2 * math.pi * math.e) * ratio.size, x0.dtype)


def last_byte_nats(
    process: Process, x0: Float[Array, "b h w c"], low: float, noise: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """-log P(x0 | x_low) of 8-bit data on [-1, 1], for one draw `noise` of unit variance.

    x_low is brought back to the scale of x0, frequency by frequency, where its noise has a standard deviation of r
    bins on average. The 256 values of a pixel are weighed by their densities there, and those weights, divided by their
    sum, are P: what is known of it without knowing images (VDM's decoder, Kingma et al. 2021).
    """
    with jax.ensure_compile_time_eval():
        factor = process.noise(jnp.asarray(low, x0.dtype)) / process.attenuation(jnp.asarray(low, x0.dtype))
        r = float(jnp.sqrt(jnp.mean(jnp.square(factor)))) / BIN
    off = dct.idct2(factor * dct.dct2(noise)) / BIN  # x_low / a - x0, in bins
    value = jnp.round((x0 + 1) / BIN)
    reach = min(255, math.ceil(_TAIL * r) + 1)

    def weight(j: int) -> Array:
        """ln of the density of the value j above the right one, less that of the right one."""
        there = (value + j >= 0) & (value + j <= 255)
        return jnp.where(there, (2 * j * off - j**2) / (2 * r**2), -jnp.inf)

    ways = jnp.stack([weight(j) for j in range(-reach, reach + 1)])
    return jnp.sum(jax.nn.logsumexp(ways, axis=0), axis=(1, 2, 3))


# ── The bound ────────────────────────────────────────────────────────────────────────────────────────────────────────


def draws(
    key: PRNGKeyArray, numbers: Int[Array, " b"], stratum: Array, shape: tuple[int, int, int], dtype: np.dtype
) -> tuple[Float[Array, " b"], Float[Array, "b h w c"]]:
    """u in [0, 1) and unit noise for each image: a function of key, image number and stratum, and of nothing else."""

    def one(number: Array) -> tuple[Array, Array]:
        u_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, number), stratum))
        return jax.random.uniform(u_key, (), dtype), jax.random.normal(noise_key, shape, dtype)

    return jax.vmap(one)(numbers)


def bound(
    predict: Predict,
    process: Process,
    strata: Strata,
    key: PRNGKeyArray,
    x0: Float[Array, "b h w c"],
    numbers: Int[Array, " b"],
    *,
    eight_bit: bool = True,
    start: Start | None = None,
) -> Bound:
    """An unbiased estimate of (2), or of (1) on a grid, for each image: one evaluation of `predict` a stratum.

    Args:
      predict: Of `process`.
      process: One that `check` passes.
      strata: `continuous` or `on_grid`.
      key: Of the levels and the noise.
      x0: Images on [-1, 1].
      numbers: Of the images; an image's levels and noise are a function of its number and `key`.
      eight_bit: Whether x0 is v / 127.5 - 1 of bytes v, and the bound that of their probability; else of a density.
      start: Of a process with a start, the Gaussian that it is.
    """
    check(process)
    z0, shape = dct.dct2(x0), x0.shape[1:]

    def one(stratum: Array) -> Float[Array, "b rings"]:
        u, noise = draws(key, numbers, stratum, shape, x0.dtype)
        t, spent = strata.place(stratum, u)
        x = process.attenuate(x0, t) + process.noise(t)[:, None, None, None] * noise
        found = predict(x, t)
        return _by_ring(spent * jnp.square(z0 - dct.dct2(found.blurred + found.residual)))

    by_level = jnp.moveaxis(jax.lax.map(one, jnp.arange(strata.count)), 0, 1)
    low = float(strata.edges[0])
    if eight_bit:
        last = last_byte_nats(process, x0, low, draws(key, numbers, jnp.asarray(strata.count), shape, x0.dtype)[1])
    else:
        last = last_density_nats(process, x0, low)
    return Bound(by_level, prior_nats(process, x0, start), last)


def total(found: Bound) -> Float[Array, " b"]:
    """The bound of each image, nats."""
    return jnp.sum(found.by_level, axis=(1, 2)) + jnp.sum(found.prior, axis=1) + found.last


def bits(nats: Array | np.ndarray | float, dimensions: int) -> Array | np.ndarray | float:
    """Nats an image as bits a dimension; `dimensions` are height × width × channels."""
    return nats / (dimensions * math.log(2))


def sampling_variance(by_level: Float[np.ndarray, "b strata"]) -> Float64[np.ndarray, " b"]:
    """The variance of each image's sum over strata that comes of drawing levels and noise, at least 3 strata.

    One draw in each stratum does not show its variance; neighbours do, and second differences are blind to a trend:
    Σ (x_{k-1} - 2 x_k + x_{k+1})² / 6, scaled from the n - 2 inner strata to all. What is left of a bend makes it too
    large rather than too small.
    """
    values = np.asarray(by_level, np.float64)
    n = values.shape[1]
    if n < 3:
        raise ValueError(f"the variance needs at least 3 strata, not {n}")
    bend = values[:, :-2] - 2 * values[:, 1:-1] + values[:, 2:]
    return np.sum(np.square(bend), axis=1) / 6 * n / (n - 2)
