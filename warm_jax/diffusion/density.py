r"""The density that a deterministic sampler gives to an image: the change of variables along the ODE (method.md §17).

Along dx/dt = v(x, t), equation (5) of `process.py`, a density changes by d ln p / dt = -div v, so that

    ln p_low(x_low) = ln p_T(x_T) + ∫ div v(x_t, t) dt        from the lowest level up to T                  (1)

in the clock ln t, where the velocity is mild: at a constant BNR the derivative of a = e^(-q), -2q e^(-q), is never
below -2 / e. The divergence is estimated by Hutchinson's probes, e · (∂v/∂x) e with E[e eᵀ] = 1. The signs are
those of DCT coefficients, not of pixels: a denoiser acts nearly frequency by frequency, and the estimate is exact where
it does so. Images come to the lowest level by its own attenuation, x_low = a x0, whose volume is Σ ln a.

The solver is handed in: any `solve(field, start, end, state)` that integrates dy/du = field(u, y).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from warm_jax.diffusion import dct
from warm_jax.diffusion.process import Predict, Process

State = tuple[Float[Array, "b h w c"], Float[Array, " b"]]
Field = Callable[[Array, State], State]
Solve = Callable[[Field, float, float, State], tuple[State, Array]]


class Density(NamedTuple):
    """Of each image, nats, and what it took."""

    log_density: Float[Array, " b"]
    evaluations: Array  # of the field; each is one of the network and one derivative a probe


def velocity(predict: Predict, process: Process, log_t: Array, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """dx / d ln t of equation (5): idct(ȧ dct(x̂0)) + ṡ ε̂, derivatives by ln t."""
    level = jnp.full(len(x), log_t, x.dtype)

    def of_log(log_t: Array) -> tuple[Array, Array]:
        t = jnp.exp(log_t)
        return process.attenuation(t), process.noise(t)[:, None, None, None]

    (_, s), (a_dot, s_dot) = jax.jvp(of_log, (level,), (jnp.ones_like(level),))
    found = predict(x, jnp.exp(level))
    clean = dct.idct2(a_dot * dct.dct2(found.blurred + found.residual))
    return clean + s_dot / s * (x - found.blurred)


def probes(
    key: PRNGKeyArray, numbers: Int[Array, " b"], count: int, shape: tuple[int, int, int], dtype: jnp.dtype
) -> Float[Array, "count b h w c"]:
    """Random signs of DCT coefficients, as images: a function of key and image number alone."""

    def one(number: Array) -> Array:
        return jax.random.rademacher(jax.random.fold_in(key, number), (count, *shape), dtype)

    return jnp.moveaxis(dct.idct2(jax.vmap(one)(numbers)), 1, 0)


def log_density(
    predict: Predict,
    process: Process,
    solve: Solve,
    x0: Float[Array, "b h w c"],
    probe: Float[Array, "count b h w c"],
    low: float,
) -> Density:
    """ln p(x0) of real-valued images by (1), from the level `low` > 0; `process` as `likelihood.check` passes it.

    Its state at the highest level is taken for N(0, s²), what sampling starts with.
    """

    def field(log_t: Array, state: State) -> State:
        def of_x(x: Array) -> Array:
            return velocity(predict, process, log_t, x)

        moved, pull = jax.vjp(of_x, state[0])  # backwards: the networks' norms have no forward derivative
        divergence = jax.lax.map(lambda e: jnp.sum(e * pull(e)[0], axis=(1, 2, 3)), probe)
        return moved, jnp.mean(divergence, axis=0)

    first, last = (jnp.asarray(t, x0.dtype) for t in (low, process.highest))
    left = process.attenuation(first)
    start = dct.idct2(left * dct.dct2(x0))
    volume = jnp.sum(jnp.log(jnp.broadcast_to(left, x0.shape[1:])))
    (x, gained), evaluations = solve(
        field, math.log(low), math.log(process.highest), (start, jnp.zeros(len(x0), x0.dtype))
    )
    scale, size = process.noise(last), x[0].size
    squares = jnp.sum(jnp.square(x), axis=(1, 2, 3))
    prior = process.law.log_density(squares, jnp.broadcast_to(scale, squares.shape), size)
    return Density(prior + gained + volume, evaluations)
