r"""Samplers for people in a hurry: which solver, on which grid, is best with few evaluations.

All solvers of warm diffusion at equal numbers of evaluations (as measured: `sampler.Record.nfe`), each on two grids:
EDM's, and one of a lowest level β_min and a ρ of its own, fitted on Gaussian data of the measured power by `fit`. What
the fit was not made on judges it: a finite data set's exact predictor, and a trained model.

* Gaussian data: W2 / ‖√P‖ is exact. What a deterministic solver makes of the prior is linear; of a solver that draws
  noise the variance of each frequency follows v ← g² v + n² from step to step, g and n the answers of one step of the
  solver itself to a state without noise and to noise without a state.
* A finite data set: `energy` and `nearest` as in `sweep.py`; and `strayed`, the share of runs that end at another
  image than the exact flow does from the same noise: it tells solvers apart long after distances of laws no longer do,
  but only those that draw no noise (NaN for the others).
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.analysis import distances, manifold, sweep
from warm_jax.diffusion import dct, oracle, process, sampler
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.noise import GAUSSIAN, Noise
from warm_jax.runtime import rounding

NAMES = ("euler", "heun", "multistep", "multistep3", "ancestral", "stochastic")
CHURN = sampler.Churn(S_churn=2.0, S_min=0.05, S_max=50.0)  # of "stochastic": γ = 0.2 to 0.7 of so few steps
BETA_MAX = 80.0
EDM = (0.002, 7.0)  # (β_min, ρ)
CANDIDATES = tuple(itertools.product((0.002, 0.005, 0.01, 0.02, 0.03, 0.045, 0.07, 0.1), (7.0, 20.0)))
GRIDS = ("edm", "fitted")
_EXACT_STEPS = 40  # of Heun's solver: 79 evaluations, for the exact flow


class Way(NamedTuple):
    """How to sample within a budget of evaluations."""

    solver: str
    grid: str  # of `GRIDS`
    budget: int
    steps: int
    nfe: int  # as measured, at most `budget`
    beta_min: float
    rho: float


class Table(NamedTuple):
    """One measure. Axes: w ways, r BNRs, k seeds.

    Attributes:
      metric: Its name; less is better.
      bnrs: `[r]`.
      values: `[w, r, k]`.
      mean: `[w, r]`; NaN where not measured.
      half: Half-width of its 95 % interval (Student's t); 0 of a closed form.
    """

    metric: np.ndarray
    bnrs: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    half: np.ndarray


# ── Equal evaluations ────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _evaluations(solver: str, steps: int) -> int:
    """Measured, with an image of one pixel."""
    p, keys = process.hot((1, 1, 1)), jax.random.split(jax.random.key(0), 1)
    predict = lambda x, t: process.Prediction(x, jnp.zeros_like(x))  # noqa: E731
    x = jnp.ones((1, 1, 1, 1))
    return int(sampler.sample(predict, p, x, p.levels(steps), solver=solver, keys=keys, churn=CHURN)[1].nfe)


def steps_within(solver: str, budget: int) -> int:
    """The most steps that cost at most `budget` evaluations; ValueError where 2 steps cost more."""
    two, three = _evaluations(solver, 2), _evaluations(solver, 3)
    if two > budget:
        raise ValueError(f"{solver} takes {two} evaluations for 2 steps; give a budget of at least that, not {budget}")
    return 2 + (budget - two) // (three - two)


# ── Gaussian data ────────────────────────────────────────────────────────────────────────────────────────────────────


def _law(value: float) -> Noise:
    """Noise whose every frequency is `value`."""
    return GAUSSIAN._replace(draw=lambda key, shape: dct.idct2(jnp.full(shape, value)))


def _linear(power: Power, solver: str, bnr: Array, levels: Float[Array, " m"]) -> tuple[Float[Array, "h w"], Array]:
    """The standard deviation of each frequency of the samples, and the evaluations counted."""
    shape, count = (*np.shape(power), 1), len(levels) - 1
    own = process.warm(shape, lambda beta: bnr * beta)
    predict = oracle.gaussian(own, power)
    ones, keys = dct.idct2(jnp.ones((1, *shape), levels.dtype)), jax.random.split(jax.random.key(0), 1)
    if solver not in sampler.RANDOM:
        out, record = sampler.sample(predict, own, levels[0] * ones, levels, solver=solver)
        return jnp.abs(dct.dct2(out)[0, ..., 0]), record.nfe
    churn = CHURN._replace(S_churn=CHURN.S_churn / count)  # a step at a time

    def answers(t_i: Array, t_j: Array) -> tuple[Array, Array, Array]:
        def run(x: Array, noise: float) -> tuple[Array, Array]:
            law = dataclasses.replace(own, law=_law(noise))
            out, record = sampler.sample(predict, law, x, jnp.stack([t_i, t_j]), solver=solver, keys=keys, churn=churn)
            return dct.dct2(out)[0, ..., 0], record.nfe

        (gain, nfe), (noise, _) = run(ones, 0.0), run(0 * ones, 1.0)
        return jnp.square(gain), jnp.square(noise), nfe

    def step(variance: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        gain, noise, nfe = answers(*pair)
        return gain * variance + noise, nfe

    start = jnp.full(shape[:2], jnp.square(levels[0]))
    variance, nfe = jax.lax.scan(step, start, (levels[:-1], levels[1:]))
    return jnp.sqrt(variance), jnp.sum(nfe, dtype=nfe.dtype)


def gaussian_w2(
    power: Power, solver: str, steps: int, bnrs: Sequence[float | int], grids: Sequence[tuple[float, float]]
) -> tuple[int, Float[np.ndarray, "g r"]]:
    """Evaluations, and W2 / ‖√P‖ of samples from the prior, exactly, on each grid (β_min, ρ) at each BNR; float64."""
    std = np.sqrt(np.asarray(power, np.float64))
    every = np.stack([process.edm_grid(low, BETA_MAX, rho)(steps) for low, rho in grids])
    with jax.enable_x64(True):
        over_bnrs = jax.vmap(functools.partial(_linear, power, solver), in_axes=(0, None))
        run = jax.jit(jax.vmap(over_bnrs, in_axes=(None, 0)))
        made, nfe = run(jnp.asarray(bnrs, jnp.float64), jnp.asarray(every))
    return int(np.max(nfe)), np.linalg.norm(np.asarray(made) - std, axis=(2, 3)) / np.linalg.norm(std)


def fit(
    power: Power, bnrs: Sequence[float | int], budgets: Sequence[int], say: Callable[[str], None] = lambda line: None
) -> tuple[list[Way], Table]:
    """The ways that are compared, solver by solver, budget by budget, on EDM's grid and on the one that fits best.

    Best has the least W2, on average over the BNRs, of `CANDIDATES`; one grid of a solver and budget serves all BNRs.
    """
    ways, rows = [], []
    for solver, budget in itertools.product(NAMES, budgets):
        steps = steps_within(solver, budget)
        nfe, found = gaussian_w2(power, solver, steps, bnrs, CANDIDATES)
        best = int(np.argmin(found.mean(axis=1)))
        for name, chosen in zip(GRIDS, (CANDIDATES.index(EDM), best), strict=True):
            ways.append(Way(solver, name, budget, steps, nfe, *CANDIDATES[chosen]))
            rows.append(found[chosen])
        say(f"Gaussian data, {solver}, {nfe} evaluations: β_min {ways[-1].beta_min:g}, ρ {ways[-1].rho:g}")
    values = np.stack(rows)[..., None]
    return ways, Table(np.array("w2"), np.array(bnrs, float), values, values[..., 0], np.zeros(values.shape[:2]))


# ── Any measure ──────────────────────────────────────────────────────────────────────────────────────────────────────


def table(ways: Sequence[Way], bnrs: Sequence[float], metric: str, rows: Iterator[tuple[Way, dict]]) -> Table:
    """The table of one score, from rows of `sweep.sweep`, each with its way."""
    every = [(ways.index(way), list(bnrs).index(row["bnr"]), row) for way, row in rows]
    seeds = sorted({row["seed"] for _, _, row in every})
    values = np.full((len(ways), len(bnrs), len(seeds)), np.nan)
    for i, j, row in every:
        values[i, j, seeds.index(row["seed"])] = row["scores"].get(metric, np.nan)
    mean, half = distances.interval(values) if len(seeds) > 1 else (values[..., 0], np.full(values.shape[:2], np.nan))
    return Table(np.array(metric), np.array(bnrs, float), values, mean, half)


def empirical(
    images: Float[np.ndarray, "n h w c"],
    ways: Sequence[Way],
    bnrs: Sequence[float | int],
    seeds: Sequence[int],
    count: int,
    path: pathlib.Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Table]:
    """`strayed`, `energy` and `nearest` of `count` samples a seed of the exact predictor of `images`. Resumable."""
    data, rows, exact = jnp.asarray(images), [], {}
    spread = sweep.data_spread(data)

    @functools.partial(jax.jit, static_argnums=3)
    def draw(data: Array, bnr: Array, key: PRNGKeyArray, solver: str, levels: Array) -> tuple[Array, Array, dict]:
        own, predict = manifold.empirical(data, bnr)
        start_key, solver_key = jax.random.split(key)
        x, keys = own.prior(start_key, (count, *own.image_shape)), jax.random.split(solver_key, count)
        out, record = sampler.sample(predict, own, x, levels, solver=solver, keys=keys, churn=CHURN)
        flat = distances.distances(out.reshape(count, -1), data.reshape(len(data), -1))
        return jnp.argmin(flat, axis=1), record.nfe, sweep.against_data(out, data, spread)

    def run(cell: sweep.Cell, solver: str, levels: np.ndarray) -> tuple[np.ndarray, int, dict]:
        given = jnp.float32(cell.bnr), jax.random.key(cell.seed)
        found, nfe, scores = draw(data, *given, solver, jnp.asarray(levels, jnp.float32))
        return np.asarray(found), int(nfe), {name: float(score) for name, score in scores.items()}

    def measure(way: Way, cell: sweep.Cell) -> tuple[int, sweep.Scores]:
        if (cell.bnr, cell.seed) not in exact:
            exact[cell.bnr, cell.seed] = run(cell, "heun", process.edm_grid(EDM[0], BETA_MAX, EDM[1])(_EXACT_STEPS))[0]
        found, nfe, scores = run(cell, way.solver, process.edm_grid(way.beta_min, BETA_MAX, way.rho)(way.steps))
        if way.solver not in sampler.RANDOM:
            scores["strayed"] = float(np.mean(found != exact[cell.bnr, cell.seed]))
        return nfe, scores

    digest = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    for way in ways:
        depends = {"solver": way.solver, "grid": [way.beta_min, way.rho], "churn": CHURN, "images": digest}
        depends |= {"shape": list(images.shape), "count": count}
        wanted = sweep.cells(bnrs, (way.steps,), seeds)
        rows += [(way, row) for row in sweep.sweep(wanted, functools.partial(measure, way), path, depends)]
        say(f"{len(images)} images, {way.solver} on the {way.grid} grid, {rows[-1][1]['nfe']} evaluations")
    return {name: table(ways, bnrs, name, iter(rows)) for name in ("strayed", "energy", "nearest")}


# ── What follows ─────────────────────────────────────────────────────────────────────────────────────────────────────


def best(ways: Sequence[Way], found: Table, bnr: int, budget: int) -> tuple[int, list[int]]:
    """The way with the least mean within a budget at BNR number `bnr`, and those that cannot be told from it.

    Those are whose intervals meet its own. A way of a smaller budget is within a larger one too.
    """
    within = [i for i, way in enumerate(ways) if way.budget <= budget and np.isfinite(found.mean[i, bnr])]
    mean, half = found.mean[:, bnr], np.nan_to_num(found.half[:, bnr])
    first = min(within, key=lambda i: mean[i])
    near = [i for i in within if i != first and mean[i] - half[i] <= mean[first] + half[first]]
    return first, sorted(near, key=lambda i: mean[i])


def gains(ways: Sequence[Way], found: Table) -> np.ndarray:
    """What the fitted grid leaves of the score on EDM's: `[pairs of ways, r]`; below 1 it is better."""
    return found.mean[1::2] / found.mean[::2]


def recommendation(ways: Sequence[Way], found: Table) -> list[str]:
    """A line for each BNR and budget: solver, steps and grid, the score, and what cannot be told from it."""
    lines = []
    for j, bnr in enumerate(found.bnrs):
        for budget in sorted({way.budget for way in ways}):
            first, near = best(ways, found, j, budget)
            way, half = ways[first], found.half[first, j]
            said = rounding.with_error(found.mean[first, j], half)
            also = [f"{ways[i].solver} on the {ways[i].grid} grid" for i in near if ways[i].budget == way.budget]
            others = f"; as good: {', '.join(also)}" if also else ""
            chosen = {"solver": way.solver, "steps": way.steps, "beta_min": way.beta_min, "rho": way.rho}
            told = " ".join(f"sample.{key}={value}" for key, value in chosen.items())
            lines.append(f"BNR {bnr:g}, NFE ≤ {budget}: {told} ({found.metric} {said}, NFE {way.nfe}{others})")
    return lines
