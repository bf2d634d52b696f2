"""The paper's figures of a data set and of trained models: `figures/NAME.npz`, `figures/NAME.png`, and `report.html`.

Without a checkpoint the figures are of the data and of exact predictors; the models of `analysis.models`, or the
workdir's own, join in where a figure is also of models. `figures.py` makes each of them.
"""

import dataclasses
import importlib.util
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from warm_jax import evaluate, experiment, figures, generate, log, preemption, reference, trained, workdirs
from warm_jax.analysis import report

NAMES = (*figures.NAMES, "report", "all")
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
    bnrs = tuple(settings.bnrs)
    if not bnrs or len(set(bnrs)) < len(bnrs) or not all(0 <= bnr <= 10_000 for bnr in bnrs):
        raise ValueError(f"analysis.bnrs is {bnrs}; name blur-to-noise ratios from 0 to 10,000, each once")
    for key in ("steps", "sweep_steps"):
        counts = tuple(settings[key])
        if not counts or not all(type(n) is int and 2 <= n <= 10_000 for n in counts) or len(set(counts)) < len(counts):
            raise ValueError(f"analysis.{key} is {counts}; name numbers of steps from 2 to 10,000, each once")


def _models(config: ConfigDict, workdir: pathlib.Path, step: int) -> dict[float, trained.Model]:
    """The models that join in, by the BNR at which they are sampled. ValueError or OSError for what cannot."""
    named = [pathlib.Path(folder) for folder in config.analysis.models]
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
    names = (*figures.NAMES, "report") if name == "all" else (name,)
    if names == ("report",):
        if not workdir.is_dir():
            raise FileNotFoundError(f"{workdir} is not there, so there is nothing to report; name a --workdir")
        return Run(workdir, names, None)
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
        last.eval = figures.evaluation(config, config.analysis.repeats - 1)
        evaluate.check(last, reference.load_extractor(config))
    workdirs.check_writable(workdir / "figures")
    return Run(workdir, names, figures.Run(config, workdir, source, models))


@preemption.noted()
def analyze(run: Run) -> int:
    """Makes what was asked for, one after the other. Returns the exit status."""
    folder = run.workdir / "figures"
    if run.subject and run.subject.models:
        models = run.subject.models.items()
        log.say("models: " + ", ".join(f"BNR {bnr:g} of {model.workdir} at step {model.step}" for bnr, model in models))
    for name in run.names:
        if name == "report":
            log.say(f"report: {report.write(run.workdir)}")
            continue
        started = time.perf_counter()
        try:
            for file, arrays, figure, sentence in figures.make(run.subject, name):
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
