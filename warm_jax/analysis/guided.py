"""Guidance weight × interval → quality: which weight, at which noise levels, makes a model's samples best.

A sweep as `sweep.py` has them: each cell is measured once and kept as a line of a file. What guides is what the config
says: `sample.guide`, a weaker model, or the model itself, told no class. At weight 1 the interval means nothing, and it
is measured once.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, PyTree
from ml_collections import ConfigDict

from warm_jax.analysis import distances, sweep, trained_models
from warm_jax.data import sources
from warm_jax.evaluation import evaluate, named_scores, reference
from warm_jax.experiments import experiment
from warm_jax.runtime import log, preemption
from warm_jax.sampling import batches, runs

_KEYS = ("analysis.guidance_weights", "analysis.guidance_intervals")


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


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `prepare` checked. `configs` by weight and interval, each of a way that the model can be sampled in."""

    workdir: pathlib.Path
    step: int
    ema: float | None
    scoring: trained_models.Scoring
    configs: dict[tuple[float, tuple], ConfigDict]


def prepare(config: ConfigDict, workdir: pathlib.Path, source: sources.Source, step: int, ema: float | None) -> Asked:
    """Checks every combination before the first is drawn. ValueError or OSError for bad input."""
    weights, intervals = (experiment.lookup(config, key) for key in _KEYS)
    if not weights or list(weights) != sorted(set(weights)):
        raise ValueError(f"analysis.guidance_weights is {tuple(weights)}; name weights rising, each once, as (1, 2)")
    if not intervals or len(set(intervals)) < len(intervals):
        raise ValueError(
            f"analysis.guidance_intervals is {tuple(intervals)}; name intervals, each once, as ((), (0.2, 5))"
        )
    made = {}
    for weight in weights:
        for interval in intervals:
            own = config.copy_and_resolve_references()
            own.sample.guidance = float(weight)
            own.sample.guidance_interval = () if weight == 1 else tuple(interval)
            if weight == 1:
                own.sample.guide = ""
            runs.open_run(own, workdir, step, ema)
            made[float(weight), tuple(interval)] = own
    return Asked(workdir, step, ema, trained_models.prepare_scoring(config, workdir, source), made)


def _measure(
    asked: Asked, draw: batches.Sampler, weights: PyTree, against: reference.Reference, seed: int
) -> tuple[int, sweep.Scores]:
    """NFE and scores of the `seed`-th `analysis.samples` images."""
    config = asked.scoring.judging.config
    count, evaluations = config.analysis.samples, []
    first = config.eval.first + seed * count

    def images() -> Iterator[np.ndarray]:
        for start in range(first, first + count, draw.batch_size):
            if preemption.requested():
                raise InterruptedError(preemption.requested())
            samples = draw(weights, np.arange(start, min(start + draw.batch_size, first + count)))
            evaluations.append(samples.nfe)
            yield samples.images

    scores = named_scores.score_images(asked.scoring.judging, against, images())
    if not scores:
        raise ValueError(f"{against.name} is no reference for {config.eval.metrics[0]}; make one with --mode=stats")
    return evaluations[-1], scores


def guided(asked: Asked) -> Guided:
    """Every weight in every interval, each finished cell a line of `sweep.jsonl`. InterruptedError after a signal."""
    judging, against = asked.scoring.judging, evaluate.find_reference(asked.scoring.judging)
    about = {
        "extractor": judging.extractor.hash,
        "reference": [against.name, against.provenance.data_hash, against.moments.count],
        "metric": judging.config.eval.metrics[0],
        "samples": [judging.config.eval.first, judging.config.analysis.samples],
    }
    kept, rows = asked.workdir / "sweep.jsonl", {}
    for (weight, interval), own in asked.configs.items():
        run = runs.open_run(own, asked.workdir, asked.step, asked.ema)
        step, weights = runs.load_weights(run)
        depends = about | {"made_with": runs.made_with(run, step, weights)}
        low, high = interval if interval and weight != 1 else (None, None)
        cells = [Cell(weight, low, high, seed) for seed in range(judging.config.analysis.repeats)]
        draw, rows[weight, interval] = run.sampler(), []

        def measure(cell: Cell, draw: batches.Sampler = draw, weights: PyTree = weights) -> tuple[int, sweep.Scores]:
            return _measure(asked, draw, weights, against, cell.seed)

        for row in sweep.sweep(cells, measure, kept, depends):
            log.say(f"weight {weight:g}, interval {interval or 'all'}, seed {row['seed']}: {row['scores']}")
            rows[weight, interval].append(row)
    return collect(rows)


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
