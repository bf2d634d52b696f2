r"""How far the states of a sampler lie from the forward process, level by level.

The paper argues from a drawing that a large BNR drives reverse states off the data manifold; here it is measured. At
each level t > 0 of a sampling grid, `count` states of the reverse process (X) stand against as many draws of the
forward process (Y) of the same level, the law that an exact sampler would have. Four measures, each 0 when the laws
are equal (docs/method.md §15):

| measure | of | unit |
|---|---|---|
| gap | E[-log p_t(X)] - E[-log p_t(Y)], divided by the dimensions | nats per dimension, signed |
| departure | energy distance of the values of -log p_t, divided by the dimensions | nats per dimension |
| neighbour | distance from X to the nearest of the Y over that from Y to the nearest other, less 1 | –, signed |
| energy | energy distance of the states over the mean distance of two forward states | – |

A gap below 0 is no merit: a state that is smoother, or nearer to the middle of the data, than typical draws has a
higher density than they have, as 0 has under N(0, I), and is as far from their law. So the signed gap says in which
direction reverse states leave, and `departure` whether the laws of log-density agree, which a gap of 0 does not say:
it is 0 only if they do, about 2 |gap| once they no longer overlap, and gap² / (√π σ) for a shift of values that spread
by σ far more than that, so that it tells a small shift later than the gap does. Neither of the two distances needs a
density: they serve any data set.

Common random numbers. In each repetition state i of the forward process is made of the noise that reverse state i
starts from, and of an image drawn with replacement, the same at every level, NFE and BNR. Each side keeps its law, so
means stay unbiased; but the noise of a state, of which -log p_t is half the square, is shared, and most of it cancels
in differences. Distances are means over pairs i ≠ j, which are independent: they are unbiased too, and of equal laws
below 0 half of the time or more. Intervals are Student's t over repetitions, each with noise and images of its own. An
energy distance of equal laws is skewed, mostly a little below 0 and seldom far above: of 1,000 CIFAR-10 images, 64
states and 10 seeds its interval holds 0 in 93 % of cases, and in 7 % lies wholly below. So a negative one says nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from warm_jax.analysis.distances import energy, energy_distance, interval, neighbour_distance
from warm_jax.diffusion import oracle, sampler
from warm_jax.diffusion.process import Predict, Process, warm

MEASURES = ("gap", "departure", "neighbour", "energy")

PredictOf = Callable[[Any, Any], tuple[Process, Predict]]
States = Float[Array, "levels b h w c"]


class Manifold(NamedTuple):
    """Arrays only: `np.savez(path, **result._asdict())` holds them all. Axes: r BNRs, s step counts, m levels at most.

    Attributes:
      bnrs: `[r]`.
      steps: `[s]`.
      nfe: Evaluations of a whole run, the last step included, as measured, `[s]`.
      levels: β of the states, `[s, m]`: each step count has its own levels, NaN beyond their end.
      mean: Of each of `MEASURES`, over repetitions, `[4, r, s, m]`; NaN where not measured.
      half: Half-width of its 95 % interval.
      average: The same averaged over ln β, by trapezoids from the first level to the last, `[4, r, s]`: grids of
        different density can be compared, and have the same ends but for one step at the top.
      average_half: Half-width of its 95 % interval.
      measures: The names, `[4]`.
      seeds: The repetitions' seeds.
      count: States a repetition and level.
    """

    bnrs: np.ndarray
    steps: np.ndarray
    nfe: np.ndarray
    levels: np.ndarray
    mean: np.ndarray
    half: np.ndarray
    average: np.ndarray
    average_half: np.ndarray
    measures: np.ndarray
    seeds: np.ndarray
    count: np.ndarray


# ── States ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _reverse(
    predict: Predict, process: Process, levels: np.ndarray | Array, key: PRNGKeyArray, count: int, solver: str
) -> tuple[States, Array]:
    """`reverse_states`, and the evaluations counted."""
    start_key, _, solver_key = jax.random.split(key, 3)
    x = process.prior(start_key, (count, *process.image_shape))
    keys: Key[Array, " b"] = jax.random.split(solver_key, count)
    _, record = sampler.sample(predict, process, x, levels, solver=solver, keys=keys, trajectory=True)
    return record.states[:-1], record.nfe


def reverse_states(
    predict: Predict,
    process: Process,
    levels: Float[np.ndarray, " n"] | Float[Array, " n"],
    key: PRNGKeyArray,
    count: int,
    solver: str = "heun",
) -> States:
    """`count` runs of the sampler from the prior: their states at `levels[1:-1]`.

    `levels` as for `sampler.sample`, all but the last above 0. Left out are the prior, which is not the sampler's work,
    and the end of the path, where the forward process has no density.
    """
    return _reverse(predict, process, levels, key, count, solver)[0]


def forward_states(
    process: Process,
    images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"],
    levels: Float[np.ndarray, " m"] | Float[Array, " m"],
    key: PRNGKeyArray,
    count: int,
) -> States:
    """`count` draws of the forward process at each of `levels`, all > 0: images with replacement, and noise.

    Draw i has the same image and noise at every level, and with the same `key` the noise that run i of
    `reverse_states` starts from (a system with a `start` of its own draws other noise there).
    """
    start_key, image_key, _ = jax.random.split(key, 3)  # as in `_reverse`
    images = jnp.asarray(images)
    chosen = images[jax.random.randint(image_key, (count,), 0, len(images))]
    noise = process.law.draw(start_key, chosen.shape).astype(chosen.dtype)

    def at(t: Array) -> Array:
        return process.attenuate(chosen, jnp.full(count, t)) + process.noise(t) * noise

    return jax.lax.map(at, jnp.asarray(levels, chosen.dtype))


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def surprise(
    process: Process,
    images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"],
    states: States,
    levels: Float[np.ndarray, " levels"] | Float[Array, " levels"],
) -> Float[Array, "levels b"]:
    """-log p_t of each state under the corrupted data set, exactly, in nats per dimension."""
    number, count = states.shape[:2]
    t = jnp.repeat(jnp.asarray(levels, states.dtype), count)
    log_p = oracle.log_density(process, images)(states.reshape(-1, *states.shape[2:]), t)
    return -log_p.reshape(number, count) / np.prod(states.shape[2:]).item()


def density_gap(
    process: Process,
    images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"],
    reverse: States,
    forward: States,
    levels: Float[np.ndarray, " levels"] | Float[Array, " levels"],
) -> Float[Array, " levels"]:
    """Mean over states of -log p_t(reverse) less that of -log p_t(forward), in nats per dimension; signed."""
    return jnp.mean(surprise(process, images, reverse, levels) - surprise(process, images, forward, levels), axis=1)


# ── All of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _measure(
    predict_of: PredictOf,
    density: bool,
    steps: int,
    count: int,
    solver: str,
    bnr: Any,
    params: Any,
    images: Array,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "measures levels"], Float[Array, " levels"], Array]:
    """All measures of one repetition, the levels that they are at, and the evaluations. One program."""
    process, predict = predict_of(params, bnr)
    levels = process.levels(steps)
    reverse, nfe = _reverse(predict, process, levels, key, count, solver)
    between = levels[1:-1]
    forward = forward_states(process, images, between, key, count)
    gap = departure = jnp.full(len(between), jnp.nan)
    if density:
        x, y = (surprise(process, images, states, between) for states in (reverse, forward))
        gap = jnp.mean(x - y, axis=1)
        departure = jax.vmap(lambda x, y: energy(x[:, None], y[:, None])[0])(x, y)
    apart = neighbour_distance(reverse, forward), energy_distance(reverse, forward)
    return jnp.stack([gap, departure, *apart]), jnp.asarray(between, jnp.float32), nfe


def manifold(
    predict_of: PredictOf,
    images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"],
    bnrs: Sequence[float | int],
    steps: Sequence[int],
    *,
    params_of: Callable[[float, int], Any] = lambda bnr, seed: None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    count: int = 64,
    solver: str = "heun",
    density: bool = True,
    traced: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Manifold:
    """Measures every BNR with every number of steps, each once a seed.

    Args:
      predict_of: (params, bnr) -> the process and a predictor of it. For the empirical oracle: `empirical`.
      images: The data: what the forward process corrupts, and what the exact density is of.
      bnrs: The ratios.
      steps: Numbers of steps, each at least 2: NFE 2 · steps - 1 for Heun.
      params_of: (bnr, seed) -> the first argument of `predict_of`, arrays: an argument of the program, not a constant
        in it.
      seeds: At least two, one a repetition.
      count: States a repetition, at least 2. Memory: steps · count images.
      solver: One of the process's.
      density: Whether to measure the first two, at the cost of 2 · count · levels passes over all images. Only worth
        something where `images` are all that there are.
      traced: Whether `predict_of` takes a traced BNR, so that one program a number of steps serves all of them.
      say: Is told of each finished (BNR, steps).
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or count < 2:
        raise ValueError(f"intervals need at least 2 different seeds and 2 states each, not {list(seeds)} and {count}")
    if not len(bnrs) or not len(steps) or min(steps, default=2) < 2 or min(bnrs) < 0:
        raise ValueError(
            f"give ratios of at least 0, and numbers of steps of at least 2, not {list(bnrs)} and {list(steps)}"
        )
    images, most = jnp.asarray(images), max(steps) - 1
    levels = np.full((len(steps), most), np.nan)
    values = np.full((len(MEASURES), len(bnrs), len(steps), most, len(seeds)), np.nan)
    averages, nfe = np.full((len(MEASURES), len(bnrs), len(steps), len(seeds)), np.nan), np.zeros(len(steps), int)
    for j, number in enumerate(steps):
        program = functools.partial(_measure, predict_of, density, number, count, solver)
        run = jax.jit(program, static_argnums=() if traced else 0)
        for i, bnr in enumerate(bnrs):
            for k, seed in enumerate(seeds):
                found, own, evaluations = run(float(bnr), params_of(bnr, seed), images, jax.random.key(seed))
                if i and not np.allclose(own, levels[j, : number - 1], rtol=1e-4):
                    raise ValueError(
                        f"BNR {bnr:g} is sampled on other levels than BNR {bnrs[0]:g}, so they cannot stand "
                        "in one figure; compare models of the same beta_min, beta_max and rho"
                    )
                values[:, i, j, : number - 1, k] = np.asarray(found)
                averages[:, i, j, k] = _average(np.asarray(found, np.float64), np.asarray(own, np.float64))
                levels[j, : number - 1], nfe[j] = own, evaluations
            row, unit = (0, " nats per dimension") if density else (3, "")
            say(f"BNR {bnr:g}, {number} steps: {MEASURES[row]} {np.mean(averages[row, i, j]):.4g}{unit}")
    mean, half = interval(values)
    average, average_half = interval(averages)
    names = np.array(MEASURES)
    return Manifold(
        np.array(bnrs, float),
        np.array(steps),
        nfe,
        levels,
        mean,
        half,
        average,
        average_half,
        names,
        np.array(seeds),
        np.array(count),
    )


def _average(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Over ln β along the last axis; of a single level, that level's."""
    x = -np.log(levels)
    return values[..., 0] if len(x) == 1 else np.trapezoid(values, x, axis=-1) / (x[-1] - x[0])


def empirical(images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"], bnr: Any) -> tuple[Process, Predict]:
    """The warm process at constant `bnr`, which may be traced, and the exact predictor for a data set of `images`.

    `manifold(empirical, images, bnrs, steps, params_of=lambda bnr, seed: images, traced=True)`.
    """
    process = warm(tuple(images.shape[1:]), lambda beta: bnr * beta)
    return process, oracle.empirical(process, images)
