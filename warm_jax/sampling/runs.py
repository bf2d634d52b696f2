"""A run that has checkpoints, opened to be used: which checkpoint, its EMA weights, the model that guides it."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from warm_jax.data import sources
from warm_jax.diffusion import guidance
from warm_jax.experiments import experiment, family, posthoc_ema
from warm_jax.runtime import checkpoint, log, mesh, pod, workdirs
from warm_jax.sampling import batches


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run, of which nothing is loaded yet.

    `step` is the checkpoint's, -1 the latest's; `guide` the weaker run of `sample.guide`; `ema` the σ_rel of the EMA to
    use, None: the plain one.
    """

    experiment: experiment.Experiment
    workdir: pathlib.Path
    step: int
    guide: "Run | None" = None
    ema: float | None = None

    def sampler(self, trajectory: bool = False) -> batches.Sampler:
        """The sampling loop that the config asks for."""
        return batches.Sampler(self.experiment, guide=self.guide and self.guide.experiment, trajectory=trajectory)


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in `workdir`, newest first; none where there is no such folder."""
    folder = workdir / "checkpoints"
    return checkpoint.Checkpoints(folder, writable=False).steps() if folder.is_dir() else []


def require_checkpoint(workdir: pathlib.Path, step: int) -> None:
    """Raises FileNotFoundError where `workdir` has no checkpoint of `step`, or none at all (-1: any will do)."""
    found = checkpoint_steps(workdir)
    if not found:
        flags = () if (workdir / "config.json").exists() else ("--config=NAME",)
        raise FileNotFoundError(
            f"no checkpoint in {workdir / 'checkpoints'}; train first ({workdirs.command(workdir, *flags)}), or name "
            "another --workdir"
        )
    if step != -1 and step not in found:
        raise FileNotFoundError(f"no checkpoint of step {step} in {workdir}; there are {sorted(found)}")


def check_ema(workdir: pathlib.Path, step: int, ema: float | None) -> None:
    """Raises ValueError where the EMA of this σ_rel cannot be made for the checkpoint of `step` (-1: the latest)."""
    if ema is None:
        return
    if step == -1:
        steps = checkpoint_steps(workdir)
        whole = [number for number in steps if (workdir / "checkpoints" / str(number) / "averages").is_dir()]
        step = (whole or steps)[0]
    posthoc_ema.plan(workdir, step, ema)


def open_run(config: ConfigDict, workdir: pathlib.Path, step: int, ema: float | None = None) -> Run:
    """The run in `workdir`, once the config, its checkpoint and what `sample` asks of it were checked.

    ValueError or OSError for what does not fit or is not there. Nothing is compiled.
    """
    experiment.build(config)
    require_checkpoint(workdir, step)
    workdirs.check_same(config, workdir, workdirs.MODEL_KEYS)
    check_ema(workdir, step, ema)
    guide = check_request(config)
    return Run(build(config, measured(config, workdir)), workdir, step, guide, ema)


def build(config: ConfigDict, measured: family.Measured | None) -> experiment.Experiment:
    """The experiment on the devices of this process: each draws its own images, and waits for no other."""
    return experiment.on(experiment.build(config, measured), mesh.make_mesh(local=True))


def measured(config: ConfigDict, workdir: pathlib.Path) -> family.Measured | None:
    """What the run measured of its images, where its process stands on that."""
    if not experiment.needs_measuring(config):
        return None
    stored = workdirs.load_measured(workdir)
    if stored is None and experiment.sampling_measures(config):  # which training needed nothing for
        side, channels = experiment.image_side(config), config.data.channels
        return experiment.measure(config, sources.open_source(config.data.source, image_size=side, channels=channels))
    if stored is None:
        raise FileNotFoundError(
            f"{workdir / 'measured.npz'} is missing; this network needs what was measured of its training images"
        )
    return family.Measured(**stored)


def check_request(config: ConfigDict) -> "Run | None":
    """Raises ValueError or OSError where `sample` asks for what no such network can; the guide, if there is one."""
    label, classes = config.sample.class_label, config.data.num_classes
    if label is not None and not 0 <= label < classes:
        choices = (
            f"0 to {classes - 1}, or unset for a random class" if classes else "unset: this network knows no classes"
        )
        raise ValueError(f"sample.class_label is {label}; it must be {choices}")
    _check_interval(config)
    return _prepare_guide(config)


def _check_interval(config: ConfigDict) -> None:
    """Raises ValueError where `sample.guidance_interval` would change nothing."""
    interval = experiment.guidance_interval(config)
    if not interval:
        return
    if config.sample.guidance == 1:
        raise ValueError(
            f"sample.guidance_interval is {interval} but sample.guidance is 1, so it would do nothing; give a weight, "
            "as 1.5"
        )
    process = experiment.build(config).sampled
    levels = process.levels(config.sample.steps)[:-1].astype(np.float32)
    if not np.any(guidance.within(process, interval)(jnp.asarray(levels))):
        ratios = np.exp(process.log_noise_to_signal(jnp.asarray(levels[[0, -1]])))
        raise ValueError(
            f"sample.guidance_interval is {interval}, and none of the {len(levels)} levels lies in it: noise/signal "
            f"goes from {ratios[0]:.3g} to {ratios[1]:.3g}"
        )


def _prepare_guide(config: ConfigDict) -> "Run | None":
    """The weaker model of `sample.guide`; None where there is none. ValueError where nothing can guide as asked."""
    settings, classes = config.sample, config.data.num_classes
    if settings.guidance == 1:
        if settings.guide:
            raise ValueError(
                "sample.guide is set but sample.guidance is 1, so it would do nothing; give a weight, as 1.5"
            )
        return None
    if not settings.guide:
        if not classes:
            raise ValueError(
                f"sample.guidance is {settings.guidance}, but this network knows no classes to be guided by; leave it "
                "at 1, or name the workdir of a weaker model with sample.guide"
            )
        if classes == 1:
            raise ValueError(
                f"sample.guidance is {settings.guidance}, but this network knows one class only, which tells it "
                "nothing; leave it at 1, or name the workdir of a weaker model with sample.guide"
            )
        if not config.data.label_dropout:
            raise ValueError(
                f"sample.guidance is {settings.guidance}, but this network never saw an image without its class "
                "(data.label_dropout is 0); train with label_dropout=0.1, or name a weaker model with sample.guide"
            )
        return None
    workdir = workdirs.local(settings.guide)
    own = workdirs.load_config(workdir, config)
    try:
        workdirs.check_same(config, workdir, ("data.image_size", "data.channels", "data.num_classes", "process"))
    except ValueError as error:
        raise ValueError(f"sample.guide must be of the same process and images; {error}") from error
    with own.unlocked():
        own.sample = config.sample
    return other_run(own, workdir, settings.guide_checkpoint, "the guide")


def other_run(config: ConfigDict, workdir: pathlib.Path, step: int, what: str) -> Run:
    """The run in another workdir, `what` it is to this one, by its own config: to load its weights."""
    steps = checkpoint_steps(workdir)
    if step not in (-1, *steps) or not steps:
        raise FileNotFoundError(f"no checkpoint {step} in {what} {workdir}; there are {steps}")
    return Run(build(config, measured(config, workdir)), workdir, step)


def load_ema(run: Run) -> tuple[int, PyTree]:
    """The step and the EMA weights of the run's checkpoint, replicated over the mesh; one step for all processes.

    The plain EMA, or of `run.ema` the one that is made of stored averages. Of the latest checkpoints those that are
    damaged are passed over with a warning. ValueError where no weights can be had.
    """
    exp = run.experiment
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))

    def on(sharding: jax.sharding.Sharding) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    everywhere = mesh.replicated(exp.mesh)
    if run.ema is None:
        step, items = _restore(run, ema=on(everywhere))
        return step, items["ema"]
    step = run.step
    if step < 0:
        lengths = posthoc_ema.check(run.workdir, run.ema, exp.config)
        here = mesh.replicated(mesh.make_mesh(1, local=True))
        step, _ = _restore(run, averages=(on(here),) * len(lengths))
    wanted, made = posthoc_ema.make(run.workdir, step, run.ema, shapes)
    log.say(
        f"EMA of σ_rel {run.ema:g} at step {step}, made of {len(wanted.fit.coefficients)} averages; its profile is off "
        f"by {wanted.fit.error:.2%}"
    )
    return step, jax.device_put(made, everywhere)


def _restore(run: Run, **abstract: PyTree[jax.ShapeDtypeStruct]) -> tuple[int, dict[str, PyTree]]:
    """Step and items of the run's checkpoint; of the latest one that is whole, the same in all processes."""
    checkpoints = checkpoint.Checkpoints(run.workdir / "checkpoints", writable=False)
    if run.step >= 0:
        try:
            return run.step, checkpoints.restore(run.step, **abstract)
        except ValueError as error:
            raise ValueError(f"{error}; name another step, or none for the last that is whole") from error
    newest = []

    def look() -> str:
        newest.append(checkpoints.restore_latest(**abstract))
        return str(newest[0][0])

    step = int(pod.from_first("newest", look))
    return step, newest[0][1] if newest else checkpoints.restore(step, **abstract)


def load_weights(run: Run) -> tuple[int, PyTree]:
    """The step of the run's checkpoint, and what `run.sampler()` is called with: the EMA weights, and the guide's."""
    guide = None if run.guide is None else load_ema(run.guide)[1]
    step, ema = load_ema(run)
    return step, ema if run.guide is None else (ema, guide)


def weights_hash(loaded: PyTree) -> str:
    """sha256 of all numbers of a tree of weights."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(loaded)):
        weights.update(np.ascontiguousarray(leaf).data)
    return weights.hexdigest()


def made_with(run: Run, step: int, loaded: PyTree) -> dict:
    """What a sample depends on besides its seed; stored beside the samples. `loaded` as `load_weights` gives it."""
    config = run.experiment.config.to_dict()
    settings = {name: config[name] for name in ("model", "process", "sample")}
    # Unset keys that older versions did not know say nothing, and must not make their samples stale.
    unset = [key for key in ("beta_min", "rho", "levels") if settings["sample"].get(key) is None]
    unset += [] if experiment.guidance_interval(run.experiment.config) else ["guidance_interval"]
    settings["sample"] = {key: value for key, value in settings["sample"].items() if key not in unset}
    if run.ema is not None:
        settings["ema"] = posthoc_ema.plan(run.workdir, step, run.ema).note()
    folders = {"measured": run.workdir}
    if run.guide is not None:
        settings["guide_model"] = run.guide.experiment.config.model.to_dict()
        folders["guide_measured"] = run.guide.workdir
    for name, folder in folders.items():
        if (folder / "measured.npz").exists():
            settings[name] = hashlib.sha256((folder / "measured.npz").read_bytes()).hexdigest()
    return json.loads(json.dumps({"checkpoint_step": step, "weights": weights_hash(loaded), **settings}, default=list))
