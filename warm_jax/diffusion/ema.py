"""Averages of parameters over training: the plain EMA's decay, and averages of any length made afterwards.

The plain one is EDM's (`decay`); what follows is of Karras et al. 2024 ("EDM2").

Let θ(τ) be the parameters after step τ of t, constant between steps. The power-function average of exponent γ > -1 is
(EDM2, eq. 2)

    θ̄_γ(t) = ∫_0^t p(τ) θ(τ) dτ,    p(τ) = (γ + 1) τ^γ / t^(γ+1) on [0, t],    ∫ p = 1.

Unlike an exponential average's, its length grows with t, and what came first is forgotten at the rate of a power. From
the definition t^(γ+1) θ̄(t) = (t-1)^(γ+1) θ̄(t-1) + (t^(γ+1) - (t-1)^(γ+1)) θ(t), so that (eq. 3)

    θ̄(t) = β θ̄(t-1) + (1 - β) θ(t),    β = (1 - 1/t)^(γ+1),

exactly, with no start to choose: at t = 1 β is 0. The length of an average is said by the standard deviation of its
profile over the length of training, as τ/t is distributed as Beta(γ+1, 1):

    σ_rel = (γ + 1)^½ (γ + 2)^-1 (γ + 3)^-½,

which rises from 0 (γ = ∞, the last parameters) to 1/√12 = 0.289 (γ = 0, the mean of all). Squared it is a cubic in γ,

    γ³ + 7γ² + (16 - σ^-2) γ + (12 - σ^-2) = 0,

of which the largest root is meant. 0.05 and 0.10 are γ = 16.97 and 6.94.

An average is linear in θ, so of averages p_i that were stored at steps t_i with exponents γ_i any sum Σ x_i θ̄_i is the
average of profile Σ x_i p_i. The profile p that is asked for is approached by least squares, ‖Σ x_i p_i - p‖² =
xᵀA x - 2 bᵀx + c, with the inner products of profiles, where m = min(t, t'),

    ⟨p, p'⟩ = ∫_0^m p p' dτ = (γ + 1)(γ' + 1) / (γ + γ' + 1) · m^(γ+γ'+1) / (t^(γ+1) t'^(γ'+1)).

All of it in float64: with many snapshots A is close to singular.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PyTree

_RIDGE = 1e-10
LEAST_RATIO = 1.1  # of two lengths that are tracked
LEAST, MOST = 0.001, 12**-0.5  # σ_rel: of γ = 998, and of γ = 0


class Profile(NamedTuple):
    """The weight (γ + 1) τ^γ / t^(γ+1) that an average at step t gives to the parameters of step τ ≤ t."""

    step: float | int
    gamma: float | int


class Fit(NamedTuple):
    """How averages are summed to another: Σ coefficients · averages; `error` is ‖Σ x_i p_i - p‖ / ‖p‖."""

    coefficients: Float[np.ndarray, " n"]
    error: float


def decay(step: Int32[Array, ""], batch_size: int, halflife_images: float, rampup_ratio: float) -> Float[Array, ""]:
    """EDM's decay of the plain EMA after `step` steps: 0.5^(batch / half-life).

    The half-life, in images, is at most `rampup_ratio` of the images seen so far.
    """
    seen = step.astype(jnp.float32) * batch_size
    halflife = jnp.minimum(halflife_images, rampup_ratio * seen)
    return jnp.exp2(-batch_size / jnp.maximum(halflife, 1e-8))


def check_sigma_rel(value: object, name: str) -> None:
    """Raises ValueError, naming `name`, the value and the limits, where no average of this length can be meant."""
    if not isinstance(value, int | float) or not LEAST <= value <= MOST:
        raise ValueError(
            f"{name} is {value}; a relative length σ_rel is from {LEAST:g} to {MOST:.4f}, the mean of all of training "
            "(EDM2 has 0.05 and 0.10)"
        )


def sigma_rel(gamma: float | int) -> float:
    """The relative length of an exponent."""
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def gamma(sigma: float | int) -> float:
    """The exponent γ ≥ 0 of a relative length. ValueError where there is none."""
    check_sigma_rel(sigma, "σ_rel")
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    return max(0.0, float(roots.real.max()))  # the others are below -1; of σ_rel = 1/√12 rounding may be


def update(
    average: PyTree[Float[Array, "..."]], params: PyTree[Float[Array, "..."]], gamma: float, step: Int32[Array, ""]
) -> PyTree[Float[Array, "..."]]:
    """The average at `step` ≥ 1, of the one a step before (any, for the first) and the parameters after `step`.

    1 - β is not computed from β, whose rounding to float32 would be a large part of it after many steps; and the
    average moves towards θ by that share, so that what stands still is its own average.
    """
    time = step.astype(jnp.float32)
    share = jnp.where(step <= 1, 1.0, -jnp.expm1((gamma + 1) * jnp.log1p(-1 / jnp.maximum(time, 2))))
    return jax.tree.map(lambda old, new: old + share.astype(old.dtype) * (new - old), average, params)


def inner_products(one: list[Profile], other: list[Profile]) -> Float[np.ndarray, "n m"]:
    """⟨p_i, p'_j⟩ of every pair, in units of 1 / step."""
    (t, g), (u, h) = (np.asarray(profiles, np.float64).T for profiles in (one, other))
    t, g = t[:, None], g[:, None]
    # By logarithms: the powers themselves leave float64.
    power = (g + h + 1) * np.log(np.minimum(t, u)) - (g + 1) * np.log(t) - (h + 1) * np.log(u)
    return (g + 1) * (h + 1) / (g + h + 1) * np.exp(power)


def fit(stored: list[Profile], wanted: Profile) -> Fit:
    """The sum of `stored` averages, each of another profile, that comes closest to the `wanted` one.

    One that is stored is itself. Differs from EDM2: the coefficients are made to sum to 1, which least squares alone
    does only in the limit of many snapshots (with four it is 0.91 for σ_rel 0.2, and 0.91 times its parameters is
    another network).
    """
    n = len(stored)
    if wanted in stored:
        return Fit(np.eye(n)[stored.index(wanted)], 0.0)
    a, b = inner_products(stored, stored), inner_products(stored, [wanted])[:, 0]
    size = np.sqrt(np.diag(a))  # profiles of length 1: late ones are small
    system = np.zeros((n + 1, n + 1))
    # The ridge: a is singular to float64 where profiles are many or alike, and huge coefficients of both signs would
    # make much of the float32 rounding of what is stored.
    system[:n, :n] = a / size[:, None] / size + _RIDGE * np.eye(n)
    system[n, :n] = system[:n, n] = size.min() / size
    right = np.append(b / size, size.min())
    x = np.linalg.solve(system, right)[:n] / size
    norm = inner_products([wanted], [wanted])[0, 0]
    return Fit(x, float(np.sqrt(max(0.0, x @ a @ x - 2 * b @ x + norm) / norm)))
