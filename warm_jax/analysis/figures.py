"""Each figure of a run: from its config, images and models to arrays, a picture and a sentence.

What is measured is in `analysis/`, one pure function a figure, drawn by its `plots.py` and `sampling_plots.py`; here a
config becomes their arguments.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from warm_jax.analysis import (
    corruption,
    guided,
    learning,
    manifold,
    memorisation,
    of_samples,
    processes,
    solvers,
    spectra,
    sweep,
    trained_models,
)
from warm_jax.data import sources
from warm_jax.evaluation import bits, reference
from warm_jax.experiments import config_files, experiment, family
from warm_jax.runtime import pictures, rounding

NAMES = ("spectra", "corruption", "process", "learning", "manifold", "sweep", "solvers", "likelihood")
OF_SAMPLES = ("memorisation", "guidance")  # of a checkpoint's samples, as `sample` says; "all" leaves them out
_SHOWN_LEVELS = (0.1, 0.3, 1.0, 3.0)  # noise levels of the spectra
_PICTURE_LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)  # of the corruption of one image
_LEARNED_LEVELS = tuple(np.geomspace(0.02, 20, 10).round(4).tolist())
_EXPLAINED_IMAGES = 256  # by a model, each at every level
_ORACLE_SAMPLES = 128  # of the empirical oracle, for one score of the sweep
_HURRIED_IMAGES = 250  # that the empirical oracle knows, at most, for the solvers: they are many


@dataclasses.dataclass(frozen=True)
class Run:
    """What the figures are of."""

    config: ConfigDict
    workdir: pathlib.Path
    source: sources.Source
    models: trained_models.Models
    scoring: trained_models.Scoring | None = None  # None: models are not scored
    asked: of_samples.Memory | of_samples.Guidance | None = None  # of `OF_SAMPLES`
    measuring: bits.Request | None = None  # for the likelihood


def _images(run: Run, most: int) -> tuple[Float[np.ndarray, "n h w c"], np.ndarray]:
    """At most `most` images of the source, spread over it, on [-1, 1]; and their classes."""
    chosen = reference.spread(len(run.source), most)
    parts = [run.source.read(part) for part in np.array_split(chosen, -(-len(chosen) // 1000))]
    images, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
    return _in_model_units(images), labels


def _in_model_units(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
    return np.asarray(pictures.from_uint8(jnp.asarray(images)))


def _measured(run: Run) -> spectra.Measured:
    chosen = reference.spread(len(run.source), run.config.analysis.images)
    return spectra.measure(run.source.read(part)[0] for part in np.array_split(chosen, -(-len(chosen) // 1000)))


def _spectra(run: Run) -> tuple[Any, str]:
    settings, measured = run.config.analysis, _measured(run)
    made = spectra.spectra(
        measured.power, tuple(settings.bnrs), _SHOWN_LEVELS, settings.budget, covariance=measured.covariance
    )
    return made, (
        f"{spectra.slope_in_words(made.law)}; the largest constant BNR that loses at most {settings.budget:.0%} of "
        f"the information at noise {made.levels[0]:.2g} to {made.levels[1]:.2g}: "
        f"{made.recommended:.2g}"
    )


def _corruption(run: Run) -> tuple[Any, str]:
    settings = run.config.analysis
    image = _in_model_units(run.source.read(np.array([settings.image]))[0])[0]
    bnrs = (*settings.bnrs, math.inf) if max(settings.bnrs) > 0 else tuple(settings.bnrs)
    made = corruption.corruption(jax.random.key(run.config.seed), image, bnrs, _PICTURE_LEVELS)
    return made, f"image {settings.image} of {run.source.spec} at {len(bnrs)} ratios and {len(_PICTURE_LEVELS)} levels"


def shipped_processes(systems: tuple[str, ...]) -> dict[str, ConfigDict]:
    """The `process` sections of these systems, as they are shipped. ValueError for a name that is none."""
    if "own" in systems:
        raise ValueError(
            "analysis.systems names own, which is a file and has no shipped settings: give --config=NAME:own"
        )
    try:
        shipped = str(config_files.SHIPPED / "fashion_mnist.py")
        return {name: config_files.load(f"{shipped}:{name}").process for name in systems}
    except ValueError as error:
        raise ValueError(f"analysis.systems: {str(error).removeprefix(shipped)}") from error


def _processes(run: Run) -> tuple[dict[str, processes.Ratio], str]:
    """The config's own process, and those of `analysis.systems` with the settings that are shipped."""
    config, power, made = run.config, _measured(run).power, {}
    shape = (*experiment.image_side(config), config.data.channels)
    own = " ".join(filter(None, (config.process.system, config.process.get("colour"))))
    settings = {own: config.process} | shipped_processes(tuple(n for n in config.analysis.systems if n != own))
    measured = family.Measured(power, np.zeros((2, 1, 1, shape[2]), np.float32))
    for name, process in settings.items():
        made[name] = processes.ratio(family.SYSTEMS[process.system].build(shape, process, measured), power)
    drowned, k = made[own].drowned, made[own].k
    at = [1, len(k) // 4, len(k) - 1]
    parts = [
        f"{share:.0%} (k = {k[i]:g})" if share == share else f"never (k = {k[i]:g})"
        for i, share in zip(at, drowned[at], strict=True)
    ]
    return made, f"signal and noise of {own} are equal after {', '.join(parts)} of the way from data to noise"


def _learning(run: Run) -> tuple[Any, str]:
    """The linear part of every BNR; of each model what it explains, under its BNR: `explained_0.5_deblurring`, …"""
    settings, bnrs = run.config.analysis, tuple(sorted({*run.config.analysis.bnrs, *run.models}))
    made, found = learning.learning(_measured(run).power, bnrs, _LEARNED_LEVELS), {}
    if run.models:
        images, labels = _images(run, min(settings.images, _EXPLAINED_IMAGES))
        found = trained_models.explained(run.models, images, labels, _LEARNED_LEVELS, run.config.seed)
    at = int(np.argmin(np.abs(np.log(made.betas))))
    parts = [f"{share:.0%} at BNR {bnr:g}" for bnr, share in zip(made.bnrs, made.deblurring[:, at], strict=True)]
    parts += [f"{one.deblurring[at]:.0%} of the model of BNR {bnr:g}" for bnr, one in found.items()]
    what = f"the deblurring head's part of what is to be found, noise {made.betas[at]:.2g}"
    return (made, found), f"{what}: {', '.join(parts)}"


def _oracle(run: Run) -> manifold.Manifold:
    settings = run.config.analysis
    images = jnp.asarray(_images(run, settings.oracle_images)[0])
    return manifold.manifold(
        manifold.empirical,
        images,
        tuple(settings.bnrs),
        tuple(settings.steps),
        params_of=lambda bnr, seed: images,
        seeds=tuple(range(settings.repeats)),
        count=settings.count,
        traced=True,
        say=trained_models.say,
    )


def _sweeps(run: Run) -> Iterator[tuple[str, sweep.Sweep]]:
    """Of Gaussian data, of a data set's exact predictor, and of the models."""
    settings = run.config.analysis
    yield "sweep_gaussian", sweep.gaussian_w2(_measured(run).power, tuple(settings.bnrs), tuple(settings.sweep_steps))
    images, seeds = _images(run, settings.oracle_images)[0], tuple(range(settings.repeats))
    counts = {"bnrs": tuple(settings.bnrs), "steps": tuple(settings.sweep_steps), "seeds": seeds}
    kept = run.workdir / "sweep.jsonl"
    found = sweep.empirical_sweep(images, **counts, count=_ORACLE_SAMPLES, path=kept, say=trained_models.say)
    yield "sweep_empirical", found["energy"]
    if run.models and run.scoring is not None:
        yield "sweep_models", trained_models.score(run.models, run.scoring, kept)


def _solvers(run: Run) -> tuple[list[solvers.Way], list[solvers.Table]]:
    """The ways of sampling, and their tables: of Gaussian data, of a set's exact predictor, and of the models."""
    settings, kept = run.config.analysis, run.workdir / "sweep.jsonl"
    bnrs = tuple(float(bnr) for bnr in settings.solver_bnrs)
    ways, gaussian = solvers.fit(_measured(run).power, bnrs, tuple(settings.solver_nfe), trained_models.say)
    images = _images(run, min(settings.oracle_images, _HURRIED_IMAGES))[0]
    seeds = tuple(range(settings.repeats))
    found = solvers.empirical(images, ways, bnrs, seeds, settings.count, kept, trained_models.say)
    tables = [gaussian, found["strayed"], found["energy"]]
    models = {bnr: model for bnr, model in run.models.items() if bnr in bnrs}
    if run.models and not models:
        trained_models.say(f"no model is sampled at a BNR of analysis.solver_bnrs, {bnrs}: models are left out")
    if models and run.scoring is not None:
        tables.append(trained_models.score_ways(models, run.scoring, ways, kept))
    return ways, tables


def make(run: Run, name: str) -> Iterator[tuple[str, dict[str, np.ndarray], Any, str]]:
    """(file name, arrays, figure, sentence) of each picture that `name` makes."""
    # These need matplotlib, which a report does not need.
    from warm_jax.analysis import likelihood_plots, plots, process_plots, sampling_plots, score_plots, solver_plots

    settings = run.config.analysis
    if name == "spectra":
        made, sentence = _spectra(run)
        yield name, made._asdict(), plots.spectra(made), sentence
    elif name == "corruption":
        made, sentence = _corruption(run)
        yield name, made._asdict(), plots.corruption(made), sentence
    elif name == "process":
        made, sentence = _processes(run)
        arrays = {f"{system}_{field}": value for system, one in made.items() for field, value in one._asdict().items()}
        yield name, arrays, process_plots.processes(made), sentence
    elif name == "learning":
        (made, found), sentence = _learning(run)
        measured = {f"explained_{bnr:g}_{k}": v for bnr, one in found.items() for k, v in one._asdict().items()}
        yield name, made._asdict() | measured, plots.learning(made, tuple(found.values())), sentence
    elif name == "manifold":
        made = _oracle(run)
        yield name, made._asdict(), sampling_plots.manifold(made), _worst(made, "gap", "nats a dimension")
        if run.models:
            images, labels = _images(run, max(settings.oracle_images, settings.count))
            made = trained_models.departure(run.models, images, labels, settings)
            yield "manifold_models", made._asdict(), sampling_plots.manifold(made), _worst(made, "energy", "")
    elif name == "memorisation":
        made = of_samples.memorisation(run.asked, run.source)
        pairs = zip(memorisation.SPACES, made.ratios, made.held_out, strict=True)
        sentence = "\n    ".join(f"{space}: {memorisation.verdict(*ratios)}" for space, *ratios in pairs)
        yield name, made._asdict(), score_plots.memorisation(made), sentence
    elif name == "guidance":
        made = of_samples.guidance(run.asked)
        yield name, made._asdict(), score_plots.guided(made), guided.best(made)
    elif name == "likelihood":
        made = trained_models.measured_bits(run.models, run.measuring)
        yield name, made._asdict(), likelihood_plots.likelihoods(made), likelihood_plots.sentence(made)
    elif name == "solvers":
        ways, tables = _solvers(run)
        arrays = {f"ways_{field}": np.array([way[i] for way in ways]) for i, field in enumerate(solvers.Way._fields)}
        arrays |= {f"{table.metric}_{k}": v for table in tables for k, v in table._asdict().items() if k != "metric"}
        lines = [
            f"by {table.metric}:\n      " + "\n      ".join(solvers.recommendation(ways, table)) for table in tables
        ]
        yield name, arrays, solver_plots.solvers(ways, tables), "\n    ".join(["what is best", *lines])
    else:
        for file, made in _sweeps(run):
            yield file, made._asdict(), sampling_plots.sweep(made), _best(made)


def _worst(made: manifold.Manifold, measure: str, unit: str) -> str:
    row = manifold.MEASURES.index(measure)
    return (
        f"{measure} at NFE {made.nfe[-1]}: "
        + ", ".join(
            f"{rounding.with_error(made.average[row, i, -1], made.average_half[row, i, -1])} at BNR {bnr:g}"
            for i, bnr in enumerate(made.bnrs)
        )
        + (f" ({unit})" if unit else "")
    )


def _best(made: sweep.Sweep) -> str:
    return f"{made.metric}: lowest at BNR " + ", ".join(
        f"{made.bnrs[np.nanargmin(made.mean[:, j])]:g} (NFE {nfe})" for j, nfe in enumerate(made.nfe)
    )
