"""The blur-to-noise ratio BNR = α / β: which blur goes with which noise, and what that blur costs.

A BNR schedule is a pure function β ↦ α, from noise levels to blurs in pixels. With P[f] the data's DCT power
(`dct.power`), an image of which blur leaves the fraction a_α[f] and to which noise of level β is added still
carries, if it is Gaussian (docs/method.md §4),

    I(β, α) = Σ_f ½ log(1 + P[f] a_α[f]² / β²)      nats.

Noise alone leaves I(β, 0). Blur is free as long as it removes only what noise has already drowned.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion import dct

Schedule = Callable[[Float[Array, "*b"]], Float[Array, "*b"]]
Power = Float[Array, "h w"] | Float[np.ndarray, "h w"]


def constant(bnr: float) -> Schedule:
    """The paper's schedule α(β) = bnr · β; 0 is hot diffusion, 0.5 the paper's choice. `bnr` is finite and ≥ 0."""
    if not 0 <= bnr < float("inf"):
        raise ValueError(f"the blur-to-noise ratio must be finite and at least 0, not {bnr}; the paper uses 0.5")
    return lambda beta: bnr * jnp.asarray(beta)


def capped(schedule: Schedule, most: float) -> Schedule:
    """`schedule`, but never more blur than BNR `most`: α(β) ≤ most · β."""
    if not 0 < most < float("inf"):
        raise ValueError(f"the largest blur-to-noise ratio must be finite and above 0, not {most}")
    return lambda beta: jnp.minimum(schedule(beta), most * jnp.asarray(beta))


def log_uniform(least: float, most: float, zero: float = 0.0) -> Callable[[PRNGKeyArray, int], Float[Array, " n"]]:
    """A distribution of ratios for amortised training: (key, n) -> BNR `[n]`.

    0 with probability `zero` (in [0, 1]), else log-uniform on [`least`, `most`], 0 < least ≤ most.
    """
    if not 0 < least <= most < float("inf"):
        raise ValueError(f"blur-to-noise ratios are drawn from 0 < least ≤ most, not least={least}, most={most}")
    if not 0 <= zero <= 1:
        raise ValueError(f"the share of images at BNR 0 must lie in [0, 1], not {zero}")

    def draw(key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
        ratio_key, zero_key = jax.random.split(key)
        u = jax.random.uniform(ratio_key, (n,), jnp.float32)
        ratios = jnp.exp(np.log(least).item() + np.log(most / least).item() * u)
        return jnp.where(jax.random.uniform(zero_key, (n,)) < zero, 0, ratios)

    return draw


def _signal_to_noise(power: Power, beta: Array) -> Array:
    """P[f] / β², for `beta` of any shape [*b]: [*b, h, w]."""
    return jnp.asarray(power, beta.dtype) / jnp.square(beta)[..., None, None]


def _nats_lost(power: Power, alpha: Array, beta: Array) -> Array:
    """I(β, 0) - I(β, α) as one sum of small terms, so that a small loss is not a difference of large numbers."""
    height, width = power.shape
    exponent = jnp.square(alpha)[..., None, None] * jnp.asarray(dct.squared_frequencies(height, width), alpha.dtype)
    snr = _signal_to_noise(power, beta)
    return jnp.sum(0.5 * jnp.log1p(snr * -jnp.expm1(-exponent) / (1 + snr * jnp.exp(-exponent))), axis=(-2, -1))


def _nats(power: Power, beta: Array) -> Array:
    """I(β, 0)."""
    return jnp.sum(0.5 * jnp.log1p(_signal_to_noise(power, beta)), axis=(-2, -1))


def information_lost(power: Power, alpha: float | Array, beta: float | Array) -> Float[Array, "*b"]:
    """The fraction of the information left by noise that blur removes, 1 - I(β, α) / I(β, 0), in [0, 1).

    Args:
      power: The data's DCT power `[h, w]`, ≥ 0, in squared units of the pixels.
      alpha: Blur in pixels, ≥ 0.
      beta: Noise level, > 0, in units of the pixels; broadcasts with `alpha`.
    """
    beta = jnp.asarray(beta, jnp.result_type(float))
    alpha = jnp.broadcast_to(jnp.asarray(alpha, beta.dtype), jnp.broadcast_shapes(jnp.shape(alpha), beta.shape))
    beta = jnp.broadcast_to(beta, alpha.shape)
    return _nats_lost(power, alpha, beta) / _nats(power, beta)


def information_budget(power: Power, fraction: float) -> Schedule:
    """The most blur that loses no more than `fraction` of the information which noise has left.

    α(β) = max { α : I(β, α) ≥ (1 - fraction) I(β, 0) }, by bisection of ln α; the loss grows with α. (Ours, not the
    paper's.) α(0) = 0. The search ends at 2·max(h, w) pixels, where nothing but the mean is left. It has a derivative.

    Args:
      power: The data's DCT power `[h, w]`, ≥ 0 and not all 0.
      fraction: δ in (0, 1), say 0.05.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the information budget must lie between 0 and 1, not {fraction}; 0.05 is a good start")
    alpha_max, alpha_min = 2.0 * max(power.shape), 1e-4

    def alpha(beta: Float[Array, "*b"]) -> Float[Array, "*b"]:
        beta = jnp.asarray(beta)
        allowed = fraction * _nats(power, beta)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            affordable = _nats_lost(power, jnp.exp(middle), beta) <= allowed
            return jnp.where(affordable, middle, low), jnp.where(affordable, high, middle)

        bounds = jnp.full_like(beta, np.log(alpha_min)), jnp.full_like(beta, np.log(alpha_max))
        low, high = jax.lax.fori_loop(0, 30, halve, bounds)
        return jnp.where(beta > 0, jnp.exp((low + high) / 2), 0)

    @jax.custom_jvp
    def schedule(beta: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return alpha(jnp.asarray(beta))

    @schedule.defjvp
    def slope(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        """dα/dβ of the implicit function; 0 where the search ended at one of its bounds."""
        (beta,), (change,) = primals, tangents
        found = schedule(beta)
        inside = (beta > 0) & (found > 1.01 * alpha_min) & (found < 0.99 * alpha_max)
        at = jnp.where(inside, beta, 1), jnp.where(inside, found, 1)

        def excess(beta: Array, alpha: Array) -> Array:
            return _nats_lost(power, alpha, beta) - fraction * _nats(power, beta)

        by_beta = jax.jvp(excess, at, (jnp.ones_like(at[0]), jnp.zeros_like(at[1])))[1]
        by_alpha = jax.jvp(excess, at, (jnp.zeros_like(at[0]), jnp.ones_like(at[1])))[1]
        return found, jnp.where(inside, -by_beta / by_alpha, 0) * change

    return schedule
