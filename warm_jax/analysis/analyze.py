"""The paper's figures of a data set and of trained models: `figures/NAME.npz`, `figures/NAME.png`, and `report.html`.

Without a checkpoint the figures are of the data and of exact predictors; the models of `analysis.models`, or the
workdir's own, join in where a figure is also of models. `figures.py` makes each of them.
"""

import dataclasses
import importlib.util
import io
import json
import pathlib
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from warm_jax import api
from warm_jax.analysis import figures, of_samples, report, trained_models
from warm_jax.evaluation import bits, reference
from warm_jax.experiments import experiment
from warm_jax.runtime import log, preemption, workdirs
from warm_jax.sampling import runs

NAMES = (*figures.NAMES, *figures.OF_SAMPLES, "report", "all")
_OF_MODELS = ("learning", "manifold", "sweep", "solvers", "likelihood", *figures.OF_SAMPLES)
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
    """What `prepare` checked and `analyze` needs. `subject` is None where only the report is asked for."""

    workdir: pathlib.Path
    names: tuple[str, ...]
    subject: figures.Run | None


# ── What is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def check(settings: ConfigDict) -> None:
    """Raises ValueError, naming key, value and limit, where the `analysis` section asks for what cannot be."""
    for key, (least, most) in _RANGES.items():
        if not least <= settings[key] <= most:
            raise ValueError(f"analysis.{key} is {settings[key]}; it must be from {least:g} to {most:g}")
    for key in ("bnrs", "solver_bnrs"):
        bnrs = tuple(settings[key])
        numbers = all(isinstance(bnr, int | float) and 0 <= bnr <= 10_000 for bnr in bnrs)
        if not bnrs or not numbers or list(bnrs) != sorted(set(bnrs)):
            raise ValueError(f"analysis.{key} is {bnrs}; name blur-to-noise ratios from 0 to 10,000, rising")
    for key, what in (("steps", "steps from 2"), ("sweep_steps", "steps from 2"), ("solver_nfe", "evaluations from 3")):
        counts, least = tuple(settings[key]), int(what[-1])
        numbers = all(type(n) is int and least <= n <= 10_000 for n in counts)
        if not counts or not numbers or list(counts) != sorted(set(counts)):
            raise ValueError(f"analysis.{key} is {counts}; name numbers of {what} to 10,000, rising")


def _models(config: ConfigDict, workdir: pathlib.Path, step: int, ema: float | None) -> trained_models.Models:
    """The models that join in, by the BNR at which they are sampled. ValueError or OSError for what cannot."""
    named = [workdirs.local(folder) for folder in config.analysis.models]
    if named and step != -1:
        raise ValueError(f"--checkpoint={step} is of the workdir's own run, but analysis.models names others; give one")
    if named and ema is not None:
        raise ValueError(f"--ema={ema:g} is of the workdir's own run, but analysis.models names others; give one")
    if not named and step == -1 and ema is None and not runs.checkpoint_steps(workdir):
        return {}
    if not named:
        runs.require_checkpoint(workdir, step)
        workdirs.check_same(config, workdir, workdirs.MODEL_KEYS)
    found: trained_models.Models = {}
    for folder in named or [workdir]:
        joining = _joining(config, folder, -1 if named else step, ema)
        if not joining:
            reason = (
                f"{folder} has no constant BNR, or none of analysis.bnrs {tuple(config.analysis.bnrs)}: hot, warm and "
                "amortised models can join in"
            )
            if named:
                raise ValueError(f"analysis.models: {reason}")
            if ema is not None:
                raise ValueError(f"--ema={ema:g}: {reason}; leave --ema out")
            log.say(f"the checkpoint does not join in: {reason}")
        for bnr, model in joining.items():
            if bnr in found:
                raise ValueError(
                    f"analysis.models: {found[bnr].workdir} and {folder} are both of BNR {bnr:g}; name one of them"
                )
            found[bnr] = model
    return dict(sorted(found.items()))


def _joining(config: ConfigDict, folder: pathlib.Path, step: int, ema: float | None) -> trained_models.Models:
    """The model of a workdir at each BNR that it has; ValueError where its images are of another shape."""
    model = api.load(folder, step, ema, class_label=None)
    own = model.experiment.config
    shape = (*experiment.image_side(config), config.data.channels)
    if model.process.image_shape != shape:
        raise ValueError(
            f"analysis.models: {folder} makes images of {model.process.image_shape}, this config has {shape}; analyse "
            "it with its own config"
        )
    if own.process.system != "amortised":
        return {float(bnr): model for bnr in _ratios(own, config.analysis.bnrs)}
    return {bnr: model.sampled_with(bnr=bnr, schedule=None) for bnr in _ratios(own, config.analysis.bnrs)}


def _ratios(config: ConfigDict, wanted: tuple[float, ...]) -> list[float]:
    """The constant BNRs of a model: its own, or those of `wanted` that an amortised one was trained for."""
    settings = config.process
    if settings.system == "amortised":
        low, high = settings.bnr_min, settings.bnr_max
        return [float(bnr) for bnr in wanted if low <= bnr <= high or (bnr == 0 and settings.bnr_zero > 0)]
    if settings.system == "hot":
        return [0.0]
    return [settings.bnr] if settings.system == "warm" and settings.schedule == "constant" else []


def _scoring(run: figures.Run, optional: bool) -> trained_models.Scoring | None:
    """How the sweep scores models. Where that is `optional` and cannot be, it is left out with a line that says why."""
    try:
        allowed = run.config.eval.allow_other_data or run.config.eval.reference
        for model in () if allowed else run.models.values():
            seen = workdirs.seen_data(model.workdir)
            if seen not in (None, run.source.fingerprint):
                raise ValueError(
                    f"{model.workdir} was trained on other images than {run.source.spec}; name its own with "
                    "data.source, or set eval.allow_other_data"
                )
        return trained_models.prepare_scoring(run.config, run.workdir, run.source)
    except (ValueError, OSError) as error:
        if not optional:
            raise
        log.say(f"the sweep leaves the models out: {error}")
        return None


def prepare(config: ConfigDict, workdir: pathlib.Path, name: str, step: int, ema: float | None = None) -> Run:
    """Checks everything that can be checked. ValueError or OSError for bad input.

    `step` is the own checkpoint's, `ema` the σ_rel of its EMA, if not the plain one.
    """
    if name not in NAMES:
        raise ValueError(f"--analysis={name}: choose one of {', '.join(NAMES)}")
    # All but the likelihood, which is of models alone and takes as long as an evaluation.
    every = (*(one for one in figures.NAMES if one != "likelihood"), "report")
    names = every if name == "all" else (name,)
    if ema is not None and not set(names) & set(_OF_MODELS):
        raise ValueError(
            f"--ema={ema:g} is of a model's weights, and --analysis={name} shows no model; leave --ema out, or name "
            f"one of {', '.join(_OF_MODELS)}"
        )
    if names == ("report",):
        report.gather(workdir)  # or it says what is missing
        return Run(workdir, names, None)
    experiment.build(config)
    check(config.analysis)
    figures.shipped_processes(config.analysis.systems)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install 'warm_jax[plot]'")
    source = reference.open_images(config, config.data.source, "name another with data.source")
    if config.analysis.image >= len(source):
        raise ValueError(f"analysis.image is {config.analysis.image}; {source.spec} has images 0 to {len(source) - 1}")
    if len(source) < 2:
        raise ValueError(f"{source.spec} has one image; the figures need at least 2")
    workdirs.check_writable(workdir / "figures")
    if name in figures.OF_SAMPLES:
        if config.analysis.models:
            raise ValueError(f"--analysis={name} is of the workdir's own run; leave analysis.models empty")
        memory = name == "memorisation"
        look = of_samples.prepare_memorisation if memory else of_samples.prepare_guidance
        asked = look(config, workdir, source, step, ema)
        return Run(workdir, names, figures.Run(config, workdir, source, {}, asked=asked))
    models = _models(config, workdir, step, ema) if set(names) & set(_OF_MODELS) else {}
    subject = figures.Run(config, workdir, source, models)
    if models and set(names) & {"sweep", "solvers"}:
        subject = dataclasses.replace(subject, scoring=_scoring(subject, optional=name == "all"))
    if name == "likelihood":
        subject = dataclasses.replace(subject, measuring=_measuring(subject))
    return Run(workdir, names, subject)


def _measuring(run: figures.Run) -> bits.Request:
    """The images whose bits are measured. ValueError or OSError where there is no model, or it has no such bits."""
    if not run.models:
        raise ValueError(
            f"--analysis=likelihood shows trained models, and {run.workdir} has no checkpoint that can join in; train "
            "first, or name workdirs with analysis.models"
        )
    config = run.config.copy_and_resolve_references()
    config.eval.metrics = ("bpd",)
    bits.check(config)
    return bits.prepare(config, run.workdir)


def _write(run: Run, file: str, arrays: dict[str, np.ndarray], figure: Any) -> pathlib.Path:
    """`figures/FILE.npz`, with a note of what it was made of, and `figures/FILE.png`; each whole or not at all."""
    subject, folder = run.subject, run.workdir / "figures"
    models = {
        f"{bnr:g}": [str(model.workdir), model.step, *([] if model.ema is None else [model.ema])]
        for bnr, model in subject.models.items()
    }
    made_of = {"source": subject.source.spec, "fingerprint": subject.source.fingerprint, "models": models}
    made_of |= {"analysis": subject.config.analysis.to_dict()}
    content, picture = io.BytesIO(), io.BytesIO()
    np.savez(content, **arrays, made_of=np.array(json.dumps(made_of, default=list)))
    figure.savefig(picture, format="png")
    workdirs.write_atomically(folder / f"{file}.npz", content.getvalue())
    workdirs.write_atomically(folder / f"{file}.png", picture.getvalue())
    return folder / f"{file}.png"


@preemption.noted()
def analyze(run: Run) -> int:
    """Makes what was asked for, one after the other. Returns the exit status."""
    if run.subject and run.subject.models:
        models = run.subject.models.items()
        log.say("models: " + ", ".join(f"BNR {bnr:g} of {model.workdir} at step {model.step}" for bnr, model in models))
    for name in run.names:
        started = time.perf_counter()
        try:
            if preemption.requested():
                raise InterruptedError(preemption.requested())
            if name == "report":
                log.say(f"report: {report.write(run.workdir)}")
                continue
            for file, arrays, figure, sentence in figures.make(run.subject, name):
                path = _write(run, file, arrays, figure)
                log.say(f"{file}: {sentence}\n    {path} and .npz, {time.perf_counter() - started:.0f} s")
        except InterruptedError as error:
            log.say(f"{error}: {name} is not finished; figures before it are, and a sweep goes on where it was")
            return preemption.EXIT_AGAIN
    return 0
