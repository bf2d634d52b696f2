"""The figures of a checkpoint's samples, drawn as `sample` says: what is checked, drawn and measured for them.

Memorisation looks for the training images nearest to samples; guidance is a sweep as `sweep.py` has them, whose cells
are weights, intervals and seeds.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8
from ml_collections import ConfigDict

from warm_jax.analysis import guided, sweep, trained_models
from warm_jax.analysis import memorisation as memorised
from warm_jax.data import sources
from warm_jax.evaluation import evaluate, named_scores, reference, shards
from warm_jax.experiments import experiment
from warm_jax.metrics import extract
from warm_jax.runtime import log, preemption, workdirs
from warm_jax.sampling import batches, runs

MOST = 200_000  # training images, spread over a larger set: their features are all in memory
_KEYS = ("analysis.guidance_weights", "analysis.guidance_intervals")


# ── Memorisation ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Memory:
    """What `prepare_memorisation` checked: how samples are drawn and told apart, and the held-out images, if any."""

    judging: shards.Run
    held_out: sources.Source | None


def prepare_memorisation(
    config: ConfigDict, workdir: pathlib.Path, source: sources.Source, step: int, ema: float | None
) -> Memory:
    """Checks everything that can be checked. ValueError or OSError for bad input."""
    sampling = runs.open_run(config, workdir, step, ema)
    seen = workdirs.seen_data(workdir)
    if seen not in (None, source.fingerprint):
        raise ValueError(
            f"{workdir} was trained on other images than {source.spec}; name its own with data.source: a copy is of a "
            "training image"
        )
    if len(source) <= memorised.NEIGHBOURS:
        raise ValueError(f"{source.spec} has {len(source)} images; {memorised.NEIGHBOURS} neighbours need more")
    extractor, spec = reference.load_extractor(config), config.analysis.get("held_out", "")
    reference.check_images(config, extractor)
    held_out = reference.open_images(config, spec, "name another with analysis.held_out") if spec else None
    if held_out is not None and held_out.fingerprint == source.fingerprint:
        raise ValueError(f"analysis.held_out is {spec}, the training images; name others, not trained on")
    workdirs.check_writable(workdir / "evaluations")
    emas = () if ema is None else (ema,)
    return Memory(shards.Run(config, workdir, extractor, None, sampling, 1, False, emas), held_out)


def _features(asked: Memory, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """Of images in memory."""
    chunks = (images[i : i + 1000] for i in range(0, len(images), 1000))
    found = []
    for batch in reference.features_of(asked.judging.extractor, chunks, asked.judging.config.eval.batch_size):
        if preemption.requested():
            raise InterruptedError(preemption.requested())
        found.append(batch)
    return extract.collect(found).pool


def _read(source: sources.Source, most: int) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
    """At most `most` images, spread over the source, and their numbers."""
    chosen = reference.spread(len(source), most)
    parts = np.array_split(chosen, -(-len(chosen) // 256))
    return np.concatenate([source.read(part)[0] for part in parts]), chosen


def _draw(asked: Memory) -> tuple[UInt8[np.ndarray, "n h w c"], Float[np.ndarray, "n d"]]:
    """`analysis.samples` samples of the seeds from `eval.first` on, at most 5,000, and their features.

    In shards, as an evaluation keeps them.
    """
    run = asked.judging
    images = shards.Images(run, run.sampling.step, run.sampling.ema)
    count = min(run.config.analysis.samples, reference.PIXEL_IMAGES)
    judged = shards.judge(run, images, run.config.eval.first, count)
    if judged is None:
        raise InterruptedError(preemption.requested())
    return judged.pixels, judged.pool


def memorisation(asked: Memory, source: sources.Source) -> memorised.Memorisation:
    """Draws samples and looks for the training images nearest to them. InterruptedError where a signal comes."""
    samples, features = _draw(asked)
    training, numbers = _read(source, MOST)
    held_out = samples[:0] if asked.held_out is None else _read(asked.held_out, len(samples))[0]
    log.say(f"nearest of {len(training):,} training images to {len(samples)} samples, {len(held_out)} held-out images")

    def spaces(images: np.ndarray, features: np.ndarray | None = None) -> list[np.ndarray]:
        return [_features(asked, images) if features is None else features, images.reshape(len(images), -1)]

    held = spaces(held_out) if len(held_out) else [features[:0], np.zeros((0, samples[0].size))]
    return memorised.compare(samples, training, numbers, spaces(samples, features), spaces(training), held)


# ── Guidance ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What `prepare_guidance` checked. `configs` by weight and interval, each of a way to sample the model."""

    workdir: pathlib.Path
    step: int
    ema: float | None
    scoring: trained_models.Scoring
    configs: dict[tuple[float, tuple], ConfigDict]


def prepare_guidance(
    config: ConfigDict, workdir: pathlib.Path, source: sources.Source, step: int, ema: float | None
) -> Guidance:
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
    return Guidance(workdir, step, ema, trained_models.prepare_scoring(config, workdir, source), made)


def _measure(
    asked: Guidance, draw: batches.Sampler, weights: PyTree, against: reference.Reference, seed: int
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


def guidance(asked: Guidance) -> guided.Guided:
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
        cells = [guided.Cell(weight, low, high, seed) for seed in range(judging.config.analysis.repeats)]
        draw, rows[weight, interval] = run.sampler(), []

        def measure(
            cell: guided.Cell, draw: batches.Sampler = draw, weights: PyTree = weights
        ) -> tuple[int, sweep.Scores]:
            return _measure(asked, draw, weights, against, cell.seed)

        for row in sweep.sweep(cells, measure, kept, depends):
            log.say(f"weight {weight:g}, interval {interval or 'all'}, seed {row['seed']}: {row['scores']}")
            rows[weight, interval].append(row)
    return guided.collect(rows)
