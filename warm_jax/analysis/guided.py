"""Guidance weight × interval → quality: which weight, at which noise levels, makes a model's samples best.

A sweep as `sweep.py` has them: each cell is measured once and kept as a line of a file. What guides is what the config
says: `sample.guide`, a weaker model, or the model itself, told no class. At weight 1 the interval means nothing, and it
is measured once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from warm_jax.analysis import distances


class Cell(NamedTuple):
    """What is measured at once; `low` and `high` are None where all levels are guided."""

    weight: float
    low: float | None
    high: float | None
    seed: int


class Guided(NamedTuple):
    """One metric. Axes: w weights, i intervals, k seeds.

    Attributes:
      metric: Its name, a string in an array of no axis.
      weights: `[w]`, rising.
      intervals: σ_lo and σ_hi, `[i, 2]`; NaN: all levels.
      nfe: Evaluations a sample, as measured, `[w, i]`.
      values: One a seed, `[w, i, k]`.
      mean: Over seeds, `[w, i]`.
      half: Half-width of its 95 % interval (Student's t), `[w, i]`; NaN of a single seed.
    """

    metric: np.ndarray
    weights: Float[np.ndarray, " w"]
    intervals: Float[np.ndarray, "i 2"]
    nfe: Int[np.ndarray, "w i"]
    values: Float[np.ndarray, "w i k"]
    mean: Float[np.ndarray, "w i"]
    half: Float[np.ndarray, "w i"]


def collect(rows: dict[tuple[float, tuple], list[dict]]) -> Guided:
    """The table of the first score, from the rows of each weight and interval."""
    name = next(name for name in next(iter(rows.values()))[0]["scores"] if not name.endswith("_std"))
    weights, intervals = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    values = np.array([[[row["scores"][name] for row in rows[w, i]] for i in intervals] for w in weights])
    nfe = np.array([[rows[w, i][0]["nfe"] for i in intervals] for w in weights])
    mean, half = values.mean(axis=2), np.full(values.shape[:2], np.nan)
    if values.shape[2] > 1:
        mean, half = distances.interval(values)
    bounds = np.array([interval or (np.nan, np.nan) for interval in intervals], float)
    return Guided(np.array(name), np.array(weights, float), bounds, nfe, values, mean, half)


def interval_name(bounds: Float[np.ndarray, " 2"]) -> str:
    """An interval for people."""
    return "all levels" if np.isnan(bounds).any() else f"{bounds[0]:g} to {bounds[1]:g}"


def best(made: Guided) -> str:
    """Where the score is lowest, in words, and what no guidance gives."""
    i, j = np.unravel_index(np.argmin(made.mean), made.mean.shape)
    where = f"weight {made.weights[i]:g} and {interval_name(made.intervals[j])} (NFE {made.nfe[i, j]})"
    said = f"{made.metric}: lowest, {made.mean[i, j]:.3g}, at {where}"
    none = np.flatnonzero(made.weights == 1)
    return f"{said}; {made.mean[none[0], 0]:.3g} without guidance" if len(none) else said
