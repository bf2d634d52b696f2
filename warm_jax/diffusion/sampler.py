"""From noise to images: solvers of the reverse process, each one `lax.scan` over a grid of levels.

The deterministic ones discretise the posterior means x̂0 and ε̂ and integrate the blur exactly (docs/method.md §9 to
§11): from level i to j,

    step(x, i→j; x̂0, ε̂) = x + idct((a_j - a_i) dct(x̂0)) + (s_j - s_i) ε̂.

(The derivative form, dx/dt with ȧ = -BNR² t λ a, multiplies the network's errors at high frequencies by thousands.)
With no blur this is EDM's step, term by term; with a scale and no blur it is DDIM's; with no noise it is cold
diffusion's Algorithm 2.

Here s is a number. Noise with a colour, s(t) c(t)[f], is white in the states y = idct(dct(x) / c): they are what is
stepped through, with a / c in place of a, and x̂0 stays what it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from warm_jax.diffusion import dct
from warm_jax.diffusion.process import Predict, Prediction, Process


class Churn(NamedTuple):
    """How much noise the stochastic solvers add: EDM's names and defaults, and δ.

    Attributes:
      S_churn: `stochastic`: in all of the path, in units of ln t; each step adds S_churn / n, at most √2 - 1.
      S_min: At levels from here …
      S_max: … to here.
      S_noise: Factor on the noise that is added.
      delta: `perturb`: noise after each step, in units of that of the training states.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = float("inf")
    S_noise: float = 1.0
    delta: float = 1.25


class Guided(NamedTuple):
    """A guided predictor beside the plain one.

    Attributes:
      predict: It; outside of the chosen levels it is the plain one.
      cost: How many evaluations of a network one call at level t is.
      chosen: t -> whether it is guided there; None: everywhere.
    """

    predict: Predict
    cost: Callable[[Array], Array | int]
    chosen: Callable[[Array], Array] | None = None


class Record(NamedTuple):
    """What happened on the way.

    Attributes:
      nfe: Evaluations for each image, counted where they are made: a guided one is as many as `Guided.cost` says.
      states: With `trajectory`, the state after each step, `[n, b, h, w, c]`; else None.
      clean: With `trajectory`, the x̂0 that each step started from, `[n, b, h, w, c]`; else None.
    """

    nfe: Int[Array, ""]
    states: Float[Array, "n b h w c"] | None
    clean: Float[Array, "n b h w c"] | None


class _Estimate(NamedTuple):
    clean: Array  # x̂0
    noise: Array  # ε̂


class _Problem(NamedTuple):
    """What stays the same from step to step."""

    predict: Predict
    process: Process
    keys: Array | None  # one an image
    churn: Churn
    count: int  # steps
    cost: Callable[[Array], Array | int] = lambda t: 1  # of one call of `predict` at a level


class _Span(NamedTuple):
    """One step, from level i to the lower level j."""

    t_i: Array
    t_j: Array
    number: Array


def _evaluate(problem: _Problem, x: Array, t: Array, nfe: Array) -> tuple[_Estimate, Array]:
    """Asks `predict` at level `t`, a scalar, and counts it. Where there is no noise, ε̂ is 0."""
    prediction, s = problem.predict(x, jnp.full(x.shape[:1], t)), problem.process.noise(t)
    noise = jnp.where(s > 0, (x - prediction.blurred) / jnp.where(s > 0, s, 1), 0)
    return _Estimate(prediction.blurred + prediction.residual, noise), nfe + problem.cost(t)


def _step(process: Process, x: Array, estimate: _Estimate, t_i: Array, t_j: Array) -> Array:
    reblur = process.attenuation(t_j) - process.attenuation(t_i)
    drift = dct.idct2(reblur * dct.dct2(estimate.clean))
    return x + drift + (process.noise(t_j) - process.noise(t_i)) * estimate.noise


def _draw(problem: _Problem, number: Array, x: Array) -> Array:
    """Noise of unit scale for step `number`: a function of each image's own key."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(problem.keys)
    return jax.vmap(lambda key: problem.process.law.draw(key, x.shape[1:]))(keys).astype(x.dtype)


def _ratio(a: Array, b: Array) -> Array:
    """a / b of attenuations; 0 where b has underflowed, as nothing but noise is left there."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _euler(problem: _Problem, carry: Any, span: _Span):
    """First order, one evaluation a step (with the clean estimate frozen: deterministic DDIM)."""
    x, nfe = carry
    here, nfe = _evaluate(problem, x, span.t_i, nfe)
    x = _step(problem.process, x, here, span.t_i, span.t_j)
    return (x, nfe), (x, here.clean)


def _heun(problem: _Problem, carry: Any, span: _Span):
    """Second order, two evaluations a step; the last step, to the clean end of the path, is Euler's."""
    x, nfe = carry
    t_i, t_j = span.t_i, span.t_j
    here, nfe = _evaluate(problem, x, t_i, nfe)
    x_euler = _step(problem.process, x, here, t_i, t_j)

    def correct(nfe: Array) -> tuple[Array, Array]:
        there, nfe = _evaluate(problem, x_euler, t_j, nfe)
        mean = _Estimate((here.clean + there.clean) / 2, (here.noise + there.noise) / 2)
        return _step(problem.process, x, mean, t_i, t_j), nfe

    x, nfe = jax.lax.cond(t_j > 0, correct, lambda nfe: (x_euler, nfe), nfe)
    return (x, nfe), (x, here.clean)


def _multistep(problem: _Problem, carry: Any, span: _Span):
    """Second order, one evaluation a step: x̂0 extrapolated from the step before, in ln(s / a_0), a_0 the mean's.

    x̃0 = x̂0 + (h / 2 h_before) (x̂0 - x̂0_before),  h = ln(s_i / a_i0) - ln(s_j / a_j0);
    x_j = (s_j / s_i) (x - B_i x̃0) + B_j x̃0. The first step has no step before it and the last has h = ∞: there
    x̃0 = x̂0.
    """
    x, nfe, clean_before, h_before = carry
    process = problem.process
    here, nfe = _evaluate(problem, x, span.t_i, nfe)
    s_i, s_j = process.noise(span.t_i), process.noise(span.t_j)
    h = process.log_noise_to_signal(span.t_i) - process.log_noise_to_signal(span.t_j)
    weight = jnp.where(jnp.isfinite(h) & (h_before > 0), h / (2 * h_before), 0)
    clean = here.clean + weight * (here.clean - clean_before)
    reblur = process.attenuation(span.t_j) - s_j / s_i * process.attenuation(span.t_i)
    x = s_j / s_i * x + dct.idct2(reblur * dct.dct2(clean))
    return (x, nfe, here.clean, h), (x, here.clean)


def _multistep3(problem: _Problem, carry: Any, span: _Span):
    """Third order, one evaluation a step (ours): x̂0 through this step and the two before it, in w = √(s / a_0).

    The flow is exactly x_j / s_j = x_i / s_i + ∫ x̂0 d(a / s), and for the mean's frequency a / s = w⁻². In units of
    w_i, with nodes 1, w_1, w_2 and divided differences d = [1, w_1] and dd = [1, w_1, w_2] of x̂0, the integral of

        x̂0(w) ≈ x̂0 + (w - 1) d + (w - 1)(w - w_1) dd

    over that weight, from 1 down to e^(-h/2) with h as in `_multistep`, divided by the integral of the weight, is

        x̃0 = x̂0 - tanh(h/4) d + (h / (e^h - 1) - 1 + (1 + w_1) tanh(h/4)) dd.

    Steps of any length. The first has d = dd = 0, the second dd = 0, and the last, with h = ∞, is x̂0 itself. Blur is
    integrated as in `_multistep`: x_j = (s_j / s_i)(x - B_i x̃0) + B_j x̃0, exact for a constant x̂0. How x̂0 changes
    *within* a step is weighed for every frequency as for the mean, so that what a step blurs is second-order. The first
    step is Euler's: third order needs a path at whose top x̂0 hardly changes, as from β = 80; on the even grids of ddpm
    and blurring the order is 2.

    Why not in ln s, as DPM-Solver++ has it: at low noise x̂0 no longer changes while ln s goes on, and over the long
    steps of a short run a parabola in it overshoots: 0.43 from the Gaussian oracle's data after 9 evaluations, here
    0.05 (tests/gaussian_table.py). Its version of three points halves dd, which tames that and makes it second-order.
    """
    x, nfe, before, clocks = carry
    process = problem.process
    here, nfe = _evaluate(problem, x, span.t_i, nfe)
    s_i, s_j = process.noise(span.t_i), process.noise(span.t_j)
    clock = process.log_noise_to_signal(span.t_i)
    h, (w_1, w_2) = clock - process.log_noise_to_signal(span.t_j), jnp.exp((clocks - clock) / 2)
    d = jnp.where(span.number > 0, (here.clean - before[0]) / (1 - w_1), 0)
    dd = jnp.where(span.number > 1, (d - (before[0] - before[1]) / (w_1 - w_2)) / (1 - w_2), 0)
    slope = jnp.tanh(h / 4)
    clean = here.clean - slope * d + (h / jnp.expm1(h) - 1 + (1 + w_1) * slope) * dd
    clean = jnp.where(jnp.isfinite(h), clean, here.clean)
    reblur = process.attenuation(span.t_j) - s_j / s_i * process.attenuation(span.t_i)
    x = s_j / s_i * x + dct.idct2(reblur * dct.dct2(clean))
    return (x, nfe, jnp.stack([here.clean, before[0]]), jnp.stack([clock, clocks[0]])), (x, here.clean)


def _up(problem: _Problem, t_i: Array) -> Array:
    """t̂, where `_stochastic` evaluates in place of t_i."""
    churn = problem.churn
    most = min(churn.S_churn / problem.count, 2**0.5 - 1)
    return jnp.where((t_i >= churn.S_min) & (t_i <= churn.S_max), 1 + most, 1).astype(t_i.dtype) * t_i


def _stochastic(problem: _Problem, carry: Any, span: _Span):
    """Heun's step after a step up along the forward process, from t_i to t̂ = t_i + γ t_i (EDM, algorithm 2).

    With A = a_t̂ / a_i for each frequency, x ← A x + S_noise √(s_t̂² - A² s_i²) ε: the state that more blur and noise
    would make. γ = min(S_churn / n, √2 - 1) for S_min ≤ t_i ≤ S_max.
    """
    x, nfe = carry
    process, churn, t_i, up = problem.process, problem.churn, span.t_i, _up(problem, span.t_i)
    factor = _ratio(process.attenuation(up), process.attenuation(t_i))
    added = jnp.square(process.noise(up)) - jnp.square(factor * process.noise(t_i))
    added = churn.S_noise * jnp.sqrt(jnp.maximum(added, 0))
    noise = dct.dct2(_draw(problem, span.number, x))
    x = jnp.where(up > t_i, dct.idct2(factor * dct.dct2(x) + added * noise), x)
    return _heun(problem, (x, nfe), _Span(up, span.t_j, span.number))


def _ancestral(problem: _Problem, carry: Any, span: _Span):
    """A draw from p(x_j | x_i, x0 = x̂0), for each frequency Gaussian: DDPM's sampler, for any a and s.

    With r = a_i / a_j and v = s_i² - r² s_j², what is added from j to i, the mean is
    (r s_j² / s_i²) x_i + (a_j v / s_i²) x̂0 and the variance v s_j² / s_i²: multiply N(x_j; a_j x̂0, s_j²) by
    N(x_i; r x_j, v) and complete the square.
    """
    x, nfe = carry
    process = problem.process
    here, nfe = _evaluate(problem, x, span.t_i, nfe)
    a_i, a_j = process.attenuation(span.t_i), process.attenuation(span.t_j)
    s_i2, s_j2 = jnp.square(process.noise(span.t_i)), jnp.square(process.noise(span.t_j))
    r = _ratio(a_i, a_j)
    v = jnp.maximum(s_i2 - jnp.square(r) * s_j2, 0)
    mean = r * s_j2 / s_i2 * dct.dct2(x) + a_j * v / s_i2 * dct.dct2(here.clean)
    noise = dct.dct2(_draw(problem, span.number, x))
    x = dct.idct2(mean + jnp.sqrt(v * s_j2 / s_i2) * noise)
    return (x, nfe), (x, here.clean)


def _perturb(problem: _Problem, carry: Any, span: _Span):
    """The next less blurred image as predicted, and noise of δ s on it, except at the end (IHDM, algorithm 2)."""
    x, nfe = carry
    prediction = problem.predict(x, jnp.full(x.shape[:1], span.t_i))
    scale = jnp.where(span.t_j > 0, problem.churn.delta * problem.process.noise(span.t_i), 0)
    x = prediction.blurred + scale * _draw(problem, span.number, x)
    return (x, nfe + problem.cost(span.t_i)), (x, prediction.blurred + prediction.residual)


SOLVERS = {
    "euler": _euler,
    "heun": _heun,
    "multistep": _multistep,
    "multistep3": _multistep3,
    "stochastic": _stochastic,
    "ancestral": _ancestral,
    "perturb": _perturb,
}
RANDOM = ("stochastic", "ancestral", "perturb")  # these draw noise


def _with_guidance(solver: str, problem: _Problem, guided: Guided | None, carry: Any, span: _Span):
    """One step, guided where it looks at a level that is chosen, by whole programs: the others keep their bits.

    (A branch around the network alone would do, but what is fused with its last layer rounds otherwise.)
    """
    if guided is None:
        return SOLVERS[solver](problem, carry, span)
    strong = problem._replace(predict=guided.predict, cost=guided.cost)
    if guided.chosen is None:
        return SOLVERS[solver](strong, carry, span)
    first = _up(problem, span.t_i) if solver == "stochastic" else span.t_i
    looked_at = [first, span.t_j] if solver in ("heun", "stochastic") else [first]
    return jax.lax.cond(
        jnp.any(guided.chosen(jnp.stack(looked_at))),
        lambda carry: SOLVERS[solver](strong, carry, span),
        lambda carry: SOLVERS[solver](problem, carry, span),
        carry,
    )


def _in_white(predict: Predict, process: Process) -> tuple[Predict, Process]:
    """What `sample` sees of a process whose noise has a colour: one of the states y = x / c, whose noise is white.

    y_t = (a / c) z_0 + n ε has the same x0, and so the same x̂0; D̂ is divided by c.
    """

    def whitened(y: Array, t: Array) -> Prediction:
        prediction = predict(process.tint(y, t), t)
        blurred = process.whiten(prediction.blurred, t)
        return Prediction(blurred, prediction.blurred + prediction.residual - blurred)

    attenuation = lambda t: process.attenuation(t) / process.colour(t)  # noqa: E731
    return whitened, dataclasses.replace(process, colour=None, attenuation=attenuation)


def check_solver(solver: str, process: Process) -> None:
    """Raises ValueError, with the choices and the reason, where `solver` cannot run `process`."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(process.solvers)}")
    if solver not in process.solvers:
        reason = process.refusal or "its levels are not noise levels that a step up could be measured in"
        raise ValueError(f"this system cannot be sampled by {solver}: {reason}; choose {' or '.join(process.solvers)}")


def sample(
    predict: Predict,
    process: Process,
    x: Float[Array, "b h w c"],
    levels: Float[np.ndarray, " m"] | Float[Array, " m"],
    *,
    solver: str = "heun",
    keys: Key[Array, " n"] | None = None,
    churn: Churn = Churn(),  # noqa: B008
    trajectory: bool = False,
    guided: Guided | None = None,
) -> tuple[Float[Array, "b h w c"], Record]:
    """Runs the reverse process from `x` at `levels[0]` to `levels[-1]`.

    Args:
      predict: A network, an oracle, anything that maps (x, t) to a `Prediction`.
      process: The process that `x` is a state of.
      x: The state at `levels[0]`, from `process.prior` or a corrupted image.
      levels: At least two falling levels, all but the last above 0. `process.levels(n)`, or a part of it.
      solver: One of `process.solvers`. NFE is the number of steps, but 2 · steps - 1 for "heun" and "stochastic" where
        the path ends at 0.
      keys: `[b]`, one an image, for the solvers that draw noise (`RANDOM`).
      churn: How much noise those add.
      trajectory: Whether to keep every state (n times the memory).
      guided: What steps do that look at a level of its interval; `predict` does the others, as if it were alone.

    Returns:
      The state at `levels[-1]`, and the record with the measured number of evaluations.
    """
    check_solver(solver, process)
    if solver in RANDOM and (keys is None or keys.shape != x.shape[:1]):
        raise ValueError(f"{solver} draws noise: give keys of shape {x.shape[:1]}, one an image")
    if isinstance(levels, np.ndarray) and not (len(levels) >= 2 and np.all(np.diff(levels) < 0) and levels[-1] >= 0):
        raise ValueError(f"levels must be at least two, falling and not negative; got {levels}")
    t, count, coloured = jnp.asarray(levels, x.dtype), len(levels) - 1, process
    if coloured.colour is not None:
        x = coloured.whiten(x, t[0])
        predict, process = _in_white(predict, coloured)
        guided = guided and guided._replace(predict=_in_white(guided.predict, coloured)[0])
    problem = _Problem(predict, process, keys, churn, count)
    carry = (x, jnp.zeros((), jnp.int32))
    if solver == "multistep":
        carry = (*carry, jnp.zeros_like(x), jnp.zeros((), x.dtype))
    if solver == "multistep3":
        carry = (*carry, jnp.zeros((2, *x.shape), x.dtype), jnp.zeros(2, x.dtype))

    def step(carry, span):
        carry, history = _with_guidance(solver, problem, guided, carry, span)
        return carry, history if trajectory else None

    carry, history = jax.lax.scan(step, carry, _Span(t[:-1], t[1:], jnp.arange(count)))
    states, clean = history if trajectory else (None, None)
    if trajectory:
        states = coloured.tint(states, t[1:, None])
    return coloured.tint(carry[0], t[-1]), Record(carry[1], states, clean)
