"""From noise to images: solvers of the probability-flow equation, each one `lax.scan` over a grid of levels.

All of them discretise the posterior means x̂0 and ε̂ and integrate the blur exactly: from level i to j,

    step(x, i→j; x̂0, ε̂) = x + idct((a_j - a_i) dct(x̂0)) + (s_j - s_i) ε̂.

(The derivative form, dx/dt with ȧ = -BNR² t λ a, multiplies the network's errors at high frequencies by thousands.)
With no blur this is EDM's step, term by term.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from warm_jax.diffusion import dct
from warm_jax.diffusion.process import Predict, Process


class Record(NamedTuple):
    """What happened on the way.

    Attributes:
      nfe: Evaluations of `predict` for each image, counted where they are made.
      states: With `trajectory`, the state after each step, `[n, b, h, w, c]`; else None.
      clean: With `trajectory`, the x̂0 that each step started from, `[n, b, h, w, c]`; else None.
    """

    nfe: Int[Array, ""]
    states: Float[Array, "n b h w c"] | None
    clean: Float[Array, "n b h w c"] | None


class _Estimate(NamedTuple):
    clean: Array  # x̂0
    noise: Array  # ε̂


def _evaluate(predict: Predict, process: Process, x: Array, t: Array, nfe: Array) -> tuple[_Estimate, Array]:
    """Asks `predict` at level `t`, a scalar with s(t) > 0, and counts it."""
    prediction = predict(x, jnp.full(x.shape[:1], t))
    noise = (x - prediction.blurred) / process.noise(t)
    return _Estimate(prediction.blurred + prediction.residual, noise), nfe + 1


def _step(process: Process, x: Array, estimate: _Estimate, t_i: Array, t_j: Array) -> Array:
    reblur = process.attenuation(t_j) - process.attenuation(t_i)
    drift = dct.idct2(reblur * dct.dct2(estimate.clean))
    return x + drift + (process.noise(t_j) - process.noise(t_i)) * estimate.noise


def _euler(predict, process, carry, pair):
    """First order, one evaluation a step (with the clean estimate frozen: deterministic DDIM)."""
    x, nfe = carry
    here, nfe = _evaluate(predict, process, x, pair[0], nfe)
    x = _step(process, x, here, *pair)
    return (x, nfe), (x, here.clean)


def _heun(predict, process, carry, pair):
    """Second order, two evaluations a step; the last step, to where there is no noise to divide by, is Euler's."""
    x, nfe = carry
    t_i, t_j = pair
    here, nfe = _evaluate(predict, process, x, t_i, nfe)
    x_euler = _step(process, x, here, t_i, t_j)

    def correct(nfe: Array) -> tuple[Array, Array]:
        there, nfe = _evaluate(predict, process, x_euler, t_j, nfe)
        mean = _Estimate((here.clean + there.clean) / 2, (here.noise + there.noise) / 2)
        return _step(process, x, mean, t_i, t_j), nfe

    x, nfe = jax.lax.cond(process.noise(t_j) > 0, correct, lambda nfe: (x_euler, nfe), nfe)
    return (x, nfe), (x, here.clean)


def _multistep(predict, process, carry, pair):
    """Second order, one evaluation a step: x̂0 extrapolated in ln s from the step before.

    x̃0 = x̂0 + (h / 2 h_before) (x̂0 - x̂0_before),  h = ln(s_i / s_j);  x_j = (s_j / s_i) (x - B_i x̃0) + B_j x̃0.
    The first step has no step before it and the last has h = ∞: there x̃0 = x̂0.
    """
    x, nfe, clean_before, h_before = carry
    t_i, t_j = pair
    here, nfe = _evaluate(predict, process, x, t_i, nfe)
    s_i, s_j = process.noise(t_i), process.noise(t_j)
    h = jnp.log(s_i / s_j)
    weight = jnp.where(jnp.isfinite(h) & (h_before > 0), h / (2 * h_before), 0)
    clean = here.clean + weight * (here.clean - clean_before)
    reblur = process.attenuation(t_j) - s_j / s_i * process.attenuation(t_i)
    x = s_j / s_i * x + dct.idct2(reblur * dct.dct2(clean))
    return (x, nfe, here.clean, h), (x, here.clean)


SOLVERS = {"euler": _euler, "heun": _heun, "multistep": _multistep}


def check_solver(solver: str) -> None:
    """Raises ValueError, with the choices, where `solver` is not one of `SOLVERS`."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")


def sample(
    predict: Predict,
    process: Process,
    x: Float[Array, "b h w c"],
    levels: Float[np.ndarray, " m"] | Float[Array, " m"],
    *,
    solver: str = "heun",
    trajectory: bool = False,
) -> tuple[Float[Array, "b h w c"], Record]:
    """Runs the reverse process from `x` at `levels[0]` to `levels[-1]`.

    Args:
      predict: A network, an oracle, anything that maps (x, t) to a `Prediction`.
      process: The process that `x` is a state of.
      x: The state at `levels[0]`, from `process.prior` or a corrupted image.
      levels: At least two falling levels; all but the last have noise. `process.levels(n)`, or a part of it.
      solver: "euler" (NFE = steps), "heun" (2 · steps - 1 where the path ends without noise) or "multistep" (steps).
      trajectory: Whether to keep every state (n times the memory).

    Returns:
      The state at `levels[-1]`, and the record with the measured number of evaluations.
    """
    check_solver(solver)
    if isinstance(levels, np.ndarray) and not (len(levels) >= 2 and np.all(np.diff(levels) < 0) and levels[-1] >= 0):
        raise ValueError(f"levels must be at least two, falling and not negative; got {levels}")
    t = jnp.asarray(levels, x.dtype)
    carry = (x, jnp.zeros((), jnp.int32))
    if solver == "multistep":
        carry = (*carry, jnp.zeros_like(x), jnp.zeros((), x.dtype))

    def step(carry, pair):
        carry, history = SOLVERS[solver](predict, process, carry, pair)
        return carry, history if trajectory else None

    carry, history = jax.lax.scan(step, carry, (t[:-1], t[1:]))
    states, clean = history if trajectory else (None, None)
    return carry[0], Record(carry[1], states, clean)
