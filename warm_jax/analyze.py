"""The paper's figures of a data set and of trained models: `figures/NAME.npz`, `figures/NAME.png`, and `report.html`.

What is measured is in `analysis/`, one pure function a figure, drawn by its `plots.py` and `sampling_plots.py`; here a
config becomes their arguments. Without a checkpoint the figures are of the data and of the exact predictors; the models
of `analysis.models`, or the workdir's own, join in where a figure is also of models.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from warm_jax import evaluate, experiment, generate, log, pictures, preemption, reference, trained, workdirs
from warm_jax.analysis import corruption, learning, manifold, report, spectra, sweep
from warm_jax.data import sources

FIGURES = ("spectra", "corruption", "learning", "manifold", "sweep")
NAMES = (*FIGURES, "report", "all")
_SHOWN_LEVELS = (0.1, 0.3, 1.0, 3.0)  # noise levels of the spectra
_PICTURE_LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)  # of the corruption of one image
_LEARNED_LEVELS = tuple(np.geomspace(0.02, 20, 10).round(4).tolist())
_RANGES = {
    "budget": (1e-4, 1 - 1e-4),
    "images": (2, 10**8),
    "image": (0, 10**9),
    "oracle_images": (2, 10**6),
    "samples": (2, 10**7),
    "count": (2, 2**16),
    "repeats": (2, 1000),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `analyze` needs. `source` is None where only the report is asked for."""

    config: ConfigDict
    workdir: pathlib.Path
    names: tuple[str, ...]
    source: sources.Source | None
    models: dict[float, trained.Model]  # by the BNR at which they are sampled


# ── What is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def check(settings: ConfigDict) -> None:
    """Raises ValueError, naming key, value and limit, where the `analysis` section asks for what cannot be."""
    for key, (least, most) in _RANGES.items():
        if not least <= settings[key] <= most:
            raise ValueError(f"analysis.{key} is {settings[key]}; it must be from {least:g} to {most:g}")
    bnrs = tuple(settings.bnrs)
    if not bnrs or len(set(bnrs)) < len(bnrs) or not all(0 <= bnr <= 10_000 for bnr in bnrs):
        raise ValueError(f"analysis.bnrs is {bnrs}; name blur-to-noise ratios from 0 to 10,000, each once")
    for key in ("steps", "sweep_steps"):
        counts = tuple(settings[key])
        if not counts or not all(type(n) is int and 2 <= n <= 10_000 for n in counts) or len(set(counts)) < len(counts):
            raise ValueError(f"analysis.{key} is {counts}; name numbers of steps from 2 to 10,000, each once")


def _models(config: ConfigDict, workdir: pathlib.Path, step: int) -> dict[float, trained.Model]:
    """The models that join in, by the BNR at which they are sampled. ValueError or OSError for what cannot."""
    named = [workdirs.local(folder) for folder in config.analysis.models]
    if not named and step == -1 and not generate.checkpoint_steps(workdir):
        return {}
    if not named:
        generate.require_checkpoint(workdir, step)
        workdirs.check_same(config, workdir, workdirs.MODEL_KEYS)
    found: dict[float, trained.Model] = {}
    for folder in named or [workdir]:
        model = trained.load(folder, -1 if named else step)
        own = model.experiment.config
        if experiment.image_side(own) != experiment.image_side(config) or own.data.channels != config.data.channels:
            raise ValueError(
                f"analysis.models: {folder} makes images of {model.process.image_shape}, this config has "
                f"{(*experiment.image_side(config), config.data.channels)}; analyse it with its own config"
            )
        for bnr in _ratios(own, config.analysis.bnrs):
            if bnr in found:
                raise ValueError(
                    f"analysis.models: {found[bnr].workdir} and {folder} are both of BNR {bnr:g}; name one of them"
                )
            found[bnr] = model.sampled_with(bnr=bnr) if own.process.system == "amortised" else model
        if folder in named and not any(model.workdir == folder for model in found.values()):
            raise ValueError(
                f"analysis.models: {folder} is of {own.process.system}, which has no constant BNR among analysis.bnrs "
                f"{tuple(config.analysis.bnrs)}; name hot, warm or amortised models"
            )
    return dict(sorted(found.items()))


def _ratios(config: ConfigDict, wanted: tuple[float, ...]) -> list[float]:
    """The constant BNRs of a model: its own, or those of `wanted` that an amortised one was trained for."""
    settings = config.process
    if settings.system == "amortised":
        low, high = settings.bnr_min, settings.bnr_max
        return [bnr for bnr in wanted if low <= bnr <= high or (bnr == 0 and settings.bnr_zero > 0)]
    if settings.system == "hot":
        return [0.0]
    return [settings.bnr] if settings.system == "warm" and settings.schedule == "constant" else []


def prepare(config: ConfigDict, workdir: pathlib.Path, name: str, step: int) -> Run:
    """Checks everything that can be checked. ValueError or OSError for bad input; `step` is the own checkpoint's."""
    if name not in NAMES:
        raise ValueError(f"--analysis={name}: choose one of {', '.join(NAMES)}")
    names = (*FIGURES, "report") if name == "all" else (name,)
    if names == ("report",):
        if not workdir.is_dir():
            raise FileNotFoundError(f"{workdir} is not there, so there is nothing to report; name a --workdir")
        return Run(config, workdir, names, None, {})
    experiment.build(config)
    check(config.analysis)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install 'warm_jax[plot]'")
    source = reference.open_images(config, config.data.source, "name another with data.source")
    if config.analysis.image >= len(source):
        raise ValueError(f"analysis.image is {config.analysis.image}; {source.spec} has images 0 to {len(source) - 1}")
    models = _models(config, workdir, step)
    if "sweep" in names and models:
        last = config.copy_and_resolve_references()
        last.eval = _evaluation(config, config.analysis.repeats - 1)
        evaluate.check(last, reference.load_extractor(config))
    workdirs.check_writable(workdir / "figures")
    return Run(config, workdir, names, source, models)


# ── One figure each: arrays, and a sentence ──────────────────────────────────────────────────────────────────────────


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
        f"slope {made.slope:.2f} ± {made.slope_error:.2f}; the largest constant BNR that loses at most "
        f"{settings.budget:.0%} of the information at noise {made.levels[0]:.2g} to {made.levels[1]:.2g}: "
        f"{made.recommended:.2g}"
    )


def _corruption(run: Run) -> tuple[Any, str]:
    settings = run.config.analysis
    image = _in_model_units(run.source.read(np.array([settings.image]))[0])[0]
    bnrs = (*settings.bnrs, math.inf) if max(settings.bnrs) > 0 else tuple(settings.bnrs)
    made = corruption.corruption(jax.random.key(run.config.seed), image, bnrs, _PICTURE_LEVELS)
    return made, f"image {settings.image} of {run.source.spec} at {len(bnrs)} ratios and {len(_PICTURE_LEVELS)} levels"


def _partial(model: trained.Model) -> jax.tree_util.Partial:
    """`Model.predict` with weights as arguments of what it is compiled into; classes come one-hot."""

    def predict(weights, x, t, one_hot=None):
        return model.experiment.to_sample.predict(weights, x, t, one_hot)

    return jax.tree_util.Partial(predict, model.weights)


def _learning(run: Run) -> tuple[Any, str]:
    """The linear part of every BNR; of each model what it explains, under its BNR: `explained_0.5_deblurring`, …"""
    settings = run.config.analysis
    made = learning.learning(_measured(run).power, tuple(settings.bnrs), _LEARNED_LEVELS)
    images, labels = _images(run, min(settings.images, 256))
    found = {}
    for bnr, model in run.models.items():
        log.say(f"what the model of BNR {bnr:g} explains of {len(images)} images at {len(_LEARNED_LEVELS)} levels")
        one_hot = np.eye(model.num_classes, dtype=np.float32)[labels] if model.num_classes else None
        key = jax.random.key(run.config.seed)
        found[bnr] = learning.explained(key, _partial(model), model.process, images, _LEARNED_LEVELS, labels=one_hot)
    at = int(np.argmin(np.abs(np.log(made.betas))))
    parts = ", ".join(
        f"{share:.0%} at BNR {bnr:g}" for bnr, share in zip(made.bnrs, made.deblurring[:, at], strict=True)
    )
    return (made, found), f"the deblurring head's part of what is to be found, noise {made.betas[at]:.2g}: {parts}"


def _oracle(run: Run, say: Callable[[str], None]) -> manifold.Manifold:
    settings = run.config.analysis
    images = jnp.asarray(_images(run, settings.oracle_images)[0])
    return manifold.manifold(
        manifold.empirical,
        images,
        tuple(settings.bnrs),
        tuple(settings.steps),
        params_of=lambda bnr: images,
        seeds=tuple(range(settings.repeats)),
        count=settings.count,
        traced=True,
        say=say,
    )


def _of_models(run: Run) -> manifold.Manifold:
    """Reverse states of the models against forward states of real images, by the measures that need no density."""
    settings = run.config.analysis
    images, _ = _images(run, max(settings.oracle_images, settings.count))

    def predict_of(params, bnr: float):
        model = run.models[bnr]
        weights, one_hot = params
        return model.process, lambda x, t: model.experiment.to_sample.predict(weights, x, t, one_hot)

    def params_of(bnr: float):
        model = run.models[bnr]
        classes = np.arange(settings.count) % max(model.num_classes, 1)
        return model.weights, np.eye(model.num_classes, dtype=np.float32)[classes] if model.num_classes else None

    return manifold.manifold(
        predict_of,
        images,
        tuple(run.models),
        tuple(settings.steps),
        params_of=params_of,
        seeds=tuple(range(settings.repeats)),
        count=settings.count,
        density=False,
        say=log.say,
    )


def _evaluation(config: ConfigDict, seed: int) -> ConfigDict:
    """The `eval` section of one cell."""
    settings, samples = config.eval.copy_and_resolve_references(), config.analysis.samples
    settings.first, settings.count = settings.first + seed * samples, samples
    settings.metrics = settings.metrics[:1]
    settings.reference = settings.reference or config.data.source
    return settings


def _score_cell(run: Run, cell: sweep.Cell) -> tuple[int, dict[str, float]]:
    """A model's scores as `--mode=evaluate` gives them; of seed k the k-th `analysis.samples` images of all."""
    model = run.models[cell.bnr].sampled_with(steps=cell.steps, solver="heun")
    config = model.experiment.config
    config.eval = _evaluation(run.config, cell.seed)
    judging = evaluate.prepare(config, model.workdir, "", model.step, "once", watch=False)
    if evaluate.evaluate(judging):
        raise InterruptedError(f"{preemption.requested()}: the cells that are done are kept")
    row = json.loads((model.workdir / "results.jsonl").read_text().splitlines()[-1])
    return row["nfe"], {name: row[name] for name in row["scores"]}


def _sweep_models(run: Run) -> sweep.Sweep:
    """The first of `eval.metrics` for every model and number of steps; each finished cell stays in `sweep.jsonl`."""
    settings, config = run.config.analysis, run.config.to_dict()
    made = {f"{bnr:g}": (str(model.workdir), model.step) for bnr, model in run.models.items()}
    wanted = sweep.cells(tuple(run.models), tuple(settings.sweep_steps), tuple(range(settings.repeats)))
    bar, rows = log.progress(len(wanted), unit="cell", doing="sweep"), []
    depends = {"models": made, "eval": config["eval"], "samples": settings.samples, "data": config["data"]["source"]}
    for row in sweep.sweep(
        wanted,
        lambda cell: _score_cell(run, cell),
        run.workdir / "sweep.jsonl",
        depends,
        stop=lambda: bool(preemption.requested()),
    ):
        rows.append(row)
        bar.update()
    bar.close()
    if len(rows) < len(wanted):
        raise InterruptedError(f"{preemption.requested()}: the cells that are done are kept")
    return sweep.collect(rows, next(iter(rows[0]["scores"])))


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _made(run: Run, name: str) -> Iterator[tuple[str, dict[str, np.ndarray], Any, str]]:
    """(file name, arrays, figure, sentence) of each picture that `name` makes."""
    from warm_jax.analysis import plots, sampling_plots  # need matplotlib, which a report does not need

    settings = run.config.analysis
    if name == "spectra":
        made, sentence = _spectra(run)
        yield name, made._asdict(), plots.spectra(made), sentence
    elif name == "corruption":
        made, sentence = _corruption(run)
        yield name, made._asdict(), plots.corruption(made), sentence
    elif name == "learning":
        (made, found), sentence = _learning(run)
        measured = {f"explained_{bnr:g}_{k}": v for bnr, one in found.items() for k, v in one._asdict().items()}
        yield name, made._asdict() | measured, plots.learning(made, tuple(found.values())), sentence
    elif name == "manifold":
        made = _oracle(run, log.say)
        yield name, made._asdict(), sampling_plots.manifold(made), _worst(made, "gap", "nats a dimension")
        if run.models:
            made = _of_models(run)
            yield "manifold_models", made._asdict(), sampling_plots.manifold(made), _worst(made, "energy", "")
    else:
        power = _measured(run).power
        made = sweep.gaussian_w2(power, tuple(settings.bnrs), tuple(settings.sweep_steps))
        yield "sweep_gaussian", made._asdict(), sampling_plots.sweep(made), _best(made)
        images, seeds = _images(run, settings.oracle_images)[0], tuple(range(settings.repeats))
        counts = {"bnrs": tuple(settings.bnrs), "steps": tuple(settings.sweep_steps), "seeds": seeds}
        made = sweep.empirical_sweep(images, **counts, path=run.workdir / "sweep.jsonl")["energy"]
        yield "sweep_empirical", made._asdict(), sampling_plots.sweep(made), _best(made)
        if run.models:
            made = _sweep_models(run)
            yield "sweep_models", made._asdict(), sampling_plots.sweep(made), _best(made)


def _worst(made: manifold.Manifold, measure: str, unit: str) -> str:
    row = manifold.MEASURES.index(measure)
    return (
        f"{measure} at NFE {made.nfe[-1]}: "
        + ", ".join(
            f"{made.average[row, i, -1]:.3g} ± {made.average_half[row, i, -1]:.1g} at BNR {bnr:g}"
            for i, bnr in enumerate(made.bnrs)
        )
        + (f" ({unit})" if unit else "")
    )


def _best(made: sweep.Sweep) -> str:
    return f"{made.metric}: lowest at BNR " + ", ".join(
        f"{made.bnrs[np.nanargmin(made.mean[:, j])]:g} (NFE {nfe})" for j, nfe in enumerate(made.nfe)
    )


@preemption.noted()
def analyze(run: Run) -> int:
    """Makes what was asked for, one after the other. Returns the exit status."""
    folder = run.workdir / "figures"
    if run.models:
        log.say("models: " + ", ".join(f"BNR {bnr:g} of {m.workdir} at step {m.step}" for bnr, m in run.models.items()))
    for name in run.names:
        if name == "report":
            log.say(f"report: {report.write(run.workdir)}")
            continue
        started = time.perf_counter()
        try:
            for file, arrays, figure, sentence in _made(run, name):
                np.savez(folder / f"{file}.npz", **arrays)
                figure.savefig(folder / f"{file}.png")
                seconds = time.perf_counter() - started
                log.say(f"{file}: {sentence}\n    {folder / file}.png, .npz; {seconds:.0f} s")
        except InterruptedError as error:
            log.say(str(error))
        if preemption.requested():
            log.say(f"{preemption.requested()}: the same command goes on from there")
            return preemption.EXIT_AGAIN
    return 0
