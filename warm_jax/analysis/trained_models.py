"""What the figures show of trained models: what they explain, how far their states depart, what their samples score.

A model is taken as it was trained: at its BNR, without guidance, without clipping, with its images' classes.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from warm_jax import api
from warm_jax.analysis import learning, likelihoods, manifold, solvers, sweep
from warm_jax.data import sources
from warm_jax.evaluation import bits, evaluate, named_scores, reference, shards
from warm_jax.experiments import family
from warm_jax.runtime import log, preemption, workdirs
from warm_jax.sampling import batches, runs

Models = dict[float, api.Model]  # by the BNR at which they are sampled
METRICS = ("fd", "fd_infinity", "kid", "swd", "lsd")  # of `named_scores.METRICS`, those of which less is better


def say(line: str) -> None:
    """Tells how far it is. InterruptedError where a signal has come: what takes long is cut off here."""
    log.say(line)
    if preemption.requested():
        raise InterruptedError(preemption.requested())


def _on_one_device(model: api.Model) -> PyTree:
    """Its weights where one device has them: replicated ones would have every device do all of the work."""
    return jax.device_put(model.weights, model.experiment.mesh.devices.flat[0])


def _one_hot(model: api.Model, labels: Int[np.ndarray, " n"]) -> Float[Array, "n k"] | None:
    """Classes as the network is told them; none of -1, which is no class."""
    return jax.nn.one_hot(jnp.asarray(labels), model.num_classes) if model.num_classes else None


# ── Learning and manifold ────────────────────────────────────────────────────────────────────────────────────────────


def explained(
    models: Models,
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    betas: tuple[float, ...],
    seed: int,
) -> dict[float, learning.Explained]:
    """Of each model what it explains of `images`, whose classes it is told, at the noise levels `betas`."""
    found = {}
    for bnr, model in models.items():
        say(f"what the model of BNR {bnr:g} explains of {len(images)} images at {len(betas)} levels")

        def predict(weights, x, t, one_hot=None, model=model):
            return model.experiment.to_sample.predict(weights, x, t, one_hot)

        found[bnr] = learning.explained(
            jax.random.key(seed),
            jax.tree_util.Partial(predict, _on_one_device(model)),
            model.process,
            images,
            betas,
            labels=_one_hot(model, labels),
        )
    return found


def drawn_classes(
    model: api.Model, labels: Int[np.ndarray, " n"], count: int, seed: int
) -> Float[Array, "count k"] | None:
    """For each of `count` runs of the sampler the class of an image drawn at random.

    So classes come as often as in the data, and independently, which the energy distance takes for granted.
    """
    return _one_hot(model, labels[np.random.default_rng(seed).integers(0, len(labels), count)])


def departure(
    models: Models,
    images: Float[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    settings: ConfigDict,
) -> manifold.Manifold:
    """Reverse states of the models against forward states of `images`, by the measures that need no density."""

    def predict_of(params, bnr: float):
        model, (weights, one_hot) = models[bnr], params
        return model.process, lambda x, t: model.experiment.to_sample.predict(weights, x, t, one_hot)

    def params_of(bnr: float, seed: int):
        return _on_one_device(models[bnr]), drawn_classes(models[bnr], labels, settings.count, seed)

    return manifold.manifold(
        predict_of,
        images,
        tuple(models),
        tuple(settings.steps),
        params_of=params_of,
        seeds=tuple(range(settings.repeats)),
        count=settings.count,
        density=False,
        say=say,
    )


# ── Bits a dimension ─────────────────────────────────────────────────────────────────────────────────────────────────


def measured_bits(models: Models, request: bits.Request) -> likelihoods.Likelihoods:
    """The bound of every model on the same images with the same noise. InterruptedError after a signal."""
    parts = {}
    for bnr, model in models.items():
        say(f"bits a dimension of the model of BNR {bnr:g}")
        opened = runs.Run(model.experiment, model.workdir, model.step, ema=model.ema)
        found = bits.measure(request, "bpd", opened, model.step, model.weights)
        if found is None:
            raise InterruptedError(preemption.requested())
        parts[bnr] = likelihoods.Part(found.bits, found.by_level, found.by_ring, found.prior + found.last, found.edges)
    return likelihoods.likelihoods(parts)


# ── Sweep ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How samples are scored: one metric of `eval`, against the reference of `eval`, in a workdir of the analysis."""

    judging: shards.Run
    settings: ConfigDict  # `analysis`
    batch_size: int


def prepare_scoring(config: ConfigDict, workdir: pathlib.Path, source: sources.Source) -> Scoring:
    """Checks what `eval` says. ValueError or OSError where no sweep can be scored by it."""
    config = config.copy_and_resolve_references()
    settings = config.analysis
    metrics = [metric for metric in config.eval.metrics if metric in METRICS]
    if not metrics:
        raise ValueError(f"eval.metrics is {tuple(config.eval.metrics)}; a sweep needs one of {', '.join(METRICS)}")
    config.eval.metrics, config.eval.count = (metrics[0],), settings.samples
    last = config.eval.first + settings.repeats * settings.samples
    if last > 2**32:
        raise ValueError(
            f"eval.first + analysis.repeats × analysis.samples is {last:,}; seeds end at {2**32:,}: lower samples"
        )
    config.eval.reference = config.eval.reference or source.spec
    extractor = reference.load_extractor(config)
    evaluate.check(config, extractor)
    workdirs.check_writable(workdir / "evaluations")
    judging = shards.Run(config, workdir, extractor, source, None, 1, False)
    return Scoring(judging, settings, config.sample.batch_size)


def _draw(model: api.Model, sampler: batches.Sampler, first: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Images of the seeds from `first` on, in batches, with the evaluations that each took."""
    for _, samples in sampler.stream(model.weights, np.arange(first, first + count)):
        yield samples.images, samples.nfe


def _measure(
    scoring: Scoring, against: reference.Reference, models: Models, **settings: Any
) -> Callable[[sweep.Cell], tuple[int, sweep.Scores]]:
    """What one cell scores: of seed k the k-th `analysis.samples` images. A sampler is compiled once for its cells.

    `settings` of `sample`, beside the steps.
    """
    compiled: dict[tuple[float, int], batches.Sampler] = {}

    def measure(cell: sweep.Cell) -> tuple[int, sweep.Scores]:
        plain = {"guidance": 1.0, "guidance_interval": (), "clip": False}
        model = models[cell.bnr].sampled_with(steps=cell.steps, **plain, **settings)
        if (cell.bnr, cell.steps) not in compiled:
            compiled.clear()
            compiled[cell.bnr, cell.steps] = batches.Sampler(model.experiment, scoring.batch_size)
        count, evaluations = scoring.settings.samples, []

        def images() -> Iterator[np.ndarray]:
            first = scoring.judging.config.eval.first + cell.seed * count
            for drawn, nfe in _draw(model, compiled[cell.bnr, cell.steps], first, count):
                evaluations.append(nfe)
                yield drawn
                if preemption.requested():
                    raise InterruptedError(preemption.requested())

        scores = named_scores.score_images(scoring.judging, against, images())
        if not scores:
            metric = scoring.judging.config.eval.metrics[0]
            raise ValueError(f"{against.name} is no reference for {metric}; make one with --mode=stats")
        say(f"BNR {cell.bnr:g}, {cell.steps} steps, seed {cell.seed}: {scores}")
        return evaluations[-1], scores

    return measure


def _unless_stopped(measure: sweep.Measure) -> sweep.Measure:
    def unless_stopped(cell: sweep.Cell) -> tuple[int, sweep.Scores]:
        if preemption.requested():
            raise InterruptedError(preemption.requested())
        return measure(cell)

    return unless_stopped


def _depends(model: api.Model, scoring: Scoring, against: reference.Reference) -> dict[str, Any]:
    """All that a score of a model depends on but for the cell."""
    return {
        "weights": runs.weights_hash(model.weights),
        "process": model.experiment.config.process.to_dict(),
        "bnr": family.sampled_bnr(model.experiment.config),
        "extractor": scoring.judging.extractor.hash,
        "reference": [against.name, against.provenance.data_hash, against.moments.count],
        "metric": scoring.judging.config.eval.metrics[0],
        "samples": [scoring.judging.config.eval.first, scoring.settings.samples],
    }


def score(models: Models, scoring: Scoring, path: pathlib.Path) -> sweep.Sweep:
    """Every model with every number of steps, each finished cell a line of `path`. InterruptedError after a signal."""
    settings, against = scoring.settings, evaluate.find_reference(scoring.judging)
    measure = _unless_stopped(_measure(scoring, against, models, solver="heun", beta_min=None, rho=None))
    seeds: Sequence[int] = tuple(range(settings.repeats))
    bar, rows = log.progress(len(models) * len(settings.sweep_steps) * len(seeds), unit="cell", doing="sweep"), []
    for bnr, model in models.items():
        depends = _depends(model, scoring, against)
        for steps in settings.sweep_steps:
            for row in sweep.sweep(sweep.cells((bnr,), (steps,), seeds), measure, path, depends):
                rows.append(row)
                bar.update()
    bar.close()
    return sweep.collect(rows, next(name for name in rows[0]["scores"] if not name.endswith("_std")))


def score_ways(models: Models, scoring: Scoring, ways: Sequence[solvers.Way], path: pathlib.Path) -> solvers.Table:
    """Every model sampled in every way, as `score` does: a table of the first metric. InterruptedError at a signal."""
    against, rows = evaluate.find_reference(scoring.judging), []
    seeds = tuple(range(scoring.settings.repeats))
    depends = {bnr: _depends(model, scoring, against) for bnr, model in models.items()}
    bar = log.progress(len(models) * len(ways) * len(seeds), unit="cell", doing="solvers")
    for bnr, way in itertools.product(models, sorted(ways, key=lambda way: way.budget)):
        own = {"solver": way.solver, "beta_min": way.beta_min, "rho": way.rho}
        churn = solvers.CHURN._asdict() if way.solver == "stochastic" else {}
        measure = _unless_stopped(_measure(scoring, against, models, **own, **churn))
        given = depends[bnr] | {"way": own | churn}
        for row in sweep.sweep(sweep.cells((bnr,), (way.steps,), seeds), measure, path, given):
            rows.append((way, row))
            bar.update()
    bar.close()
    name = next(name for name in rows[0][1]["scores"] if not name.endswith("_std"))
    return solvers.table(ways, tuple(models), name, iter(rows))
