"""Training: the loop around the step.

A step's randomness is a function of (seed, step), and so is its batch: a run that was cut off and resumed ends with the
same bits as one that was not.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jaxtyping import PyTree
from ml_collections import ConfigDict

from warm_jax import (
    checkpoint,
    experiment,
    family,
    log,
    mesh,
    pictures,
    pod,
    posthoc,
    preemption,
    runs,
    sampling,
    speed,
    workdirs,
)
from warm_jax.convert import begin
from warm_jax.data import pipeline, sources
from warm_jax.step import (
    BIN_EDGES,
    State,
    Totals,
    abstract_state,
    from_store,
    init_state,
    learning_rate,
    to_store,
    trace_step,
    zero_totals,
)

PREVIEW_IMAGES = 64
_AHEAD = 2  # steps that may be queued on the device before the host waits


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `train` needs."""

    experiment: experiment.Experiment
    source: sources.Source
    workdir: pathlib.Path
    begins_from: runs.Run | None = None  # whose weights it begins from, if not its own
    profile: bool = False  # whether a few steps are traced


def _open_source(config: ConfigDict) -> sources.Source:
    settings = config.data
    try:
        return sources.open_source(
            settings.source,
            image_size=experiment.image_side(config),
            channels=settings.channels,
            on_error=settings.on_error,
        )
    except FileNotFoundError as error:
        how = (
            f"To get it: {settings.instructions}" if settings.instructions else "Name another with --config.data.source"
        )
        raise FileNotFoundError(f"data.source {settings.source} is not there ({error}). {how}") from error


def prepare(config: ConfigDict, workdir: pathlib.Path, init_from: str = "", profile: bool = False) -> Run:
    """Opens the data, checks everything that can be checked, compiles nothing. ValueError or OSError for bad input.

    `init_from` is a workdir whose weights a run begins from that has no checkpoint yet; with `profile` a few steps are
    traced.
    """
    experiment.for_training(experiment.build(config))
    experiment.check_batch(config, jax.device_count())
    source = _open_source(config)
    if config.data.num_classes not in (0, source.num_classes):
        raise ValueError(
            f"data.num_classes is {config.data.num_classes}, {source.spec} has {source.num_classes} classes; "
            f"set it to {source.num_classes}, or to 0 to ignore classes"
        )
    workdirs.check_writable(workdir)
    if (workdir / workdirs.ORIGIN).exists():
        raise ValueError(
            f"{workdir} holds converted weights, which cannot be trained on in place; choose another --workdir and "
            f"--init_from={workdir}"
        )
    pod.check_shared(workdir)
    begun = bool(runs.checkpoint_steps(workdir))
    begins_from = begin.prepare(config, workdir, init_from, begun)
    if begun:
        workdirs.check_same(config, workdir, workdirs.MODEL_KEYS + workdirs.RUN_KEYS)
        workdirs.check_same_data(source, workdir, config.data.allow_changed)
    measured = None
    if experiment.needs_measuring(config):
        pod.first_then_all("measured", lambda: _measure(config, source, workdir, begun))
        measured = family.Measured(**workdirs.load_measured(workdir))
    return Run(experiment.for_training(experiment.build(config, measured)), source, workdir, begins_from, profile)


def _measure(config: ConfigDict, source: sources.Source, workdir: pathlib.Path, begun: bool) -> None:
    """Writes `measured.npz`, unless it is of a run that goes on: without a checkpoint it may be of other images."""
    if not begun or workdirs.load_measured(workdir) is None:
        measured = experiment.measure(config, source)._asdict()
        workdirs.save_measured({name: array for name, array in measured.items() if array is not None}, workdir)


def _restore(run: Run, checkpoints: checkpoint.Checkpoints) -> State:
    exp = run.experiment
    found = checkpoints.restore_latest(**to_store(abstract_state(exp)))
    said = pod.gather("restored", str(found[0]) if found else "none")
    if len(set(said)) > 1:
        raise OSError(f"the processes read different checkpoints of {checkpoints.folder}: {', '.join(said)}")
    if found is None:
        state = init_state(exp)
        if run.begins_from is None:
            return state
        weights = begin.weights(exp, run.begins_from, run.workdir, state.params)
        # Each its own buffers: the state is donated.
        return state._replace(params=jax.tree.map(jnp.copy, weights), ema=jax.tree.map(jnp.copy, weights))
    step, items = found
    pod.first_then_all("set aside", lambda: checkpoints.set_aside_after(step))
    checkpoints.steps()  # all read anew what is there
    log.say(f"resuming from the checkpoint of step {step} in {checkpoints.folder}")
    return from_store(items)


def _snapshots(run: Run, step: int) -> checkpoint.Checkpoints | None:
    """Where the averages of `train.posthoc_ema` are kept; None where there are none.

    Those of steps after `step`, which a run left that was cut off, are removed: they will come again.
    """
    if not experiment.averages(run.experiment.config):
        return None
    snapshots = checkpoint.Checkpoints(run.workdir / posthoc.FOLDER, keep_last=None)
    pod.first_then_all("later snapshots are gone", lambda: snapshots.remove_after(step))
    snapshots.steps()  # all read anew what is there
    return snapshots


def _save(
    checkpoints: checkpoint.Checkpoints,
    step: int,
    state: State,
    wait: bool = False,
    beside: checkpoint.Checkpoints | None = None,
) -> None:
    """Saves unless the last losses were not finite: the last good checkpoint stays the newest.

    With `beside` it is a snapshot, of the averages alone, where the checkpoints that come to `beside` still fit.
    """
    if int(state.nonfinite) == 0:
        items = whole = to_store(state)
        if beside is not None:
            items = {"train": None, "ema": None, "averages": state.averages}

        def check_room() -> None:
            checkpoints.check_room(items, [] if beside is None else [whole] * beside.to_come())

        pod.first_then_all("room", check_room)
        error = None
        try:
            checkpoints.save(step, **items, wait=wait)
        except OSError as failed:
            error = failed
        said = "; ".join(filter(None, pod.gather("saved", str(error or ""))))
        if said:  # all go on, or none
            raise error or OSError(said)


_LOST = "each later checkpoint is tried; until one is saved, what came since the last is lost if the run ends"
_NOTHING_LOST = "nothing of it is lost; what --ema makes of the averages around this step is less exact"


def _try(work: Callable[[], None], step: int, metrics: log.Log, meaning: str = _LOST) -> None:
    """Saves, or says loudly why that failed and goes on: what is in memory is worth more than what is on disk."""
    try:
        work()
    except OSError as error:
        log.warn(f"step {step}: {error}. Training goes on, and {meaning}. Make room")
        metrics.write(step, {"failed_saves": 1.0})


def scalars(totals: Totals) -> dict[str, float]:
    """Means since the last report, by head, and by head and noise level; per pixel, weighted by λ."""
    totals = jax.tree.map(np.asarray, totals)
    images = totals.images.sum() or math.nan  # nan where no loss was finite
    row = {
        "loss/blurred": float(totals.blurred.sum() / images),
        "loss/residual": float(totals.residual.sum() / images),
        "gradient_norm": float(totals.gradient_norm / np.maximum(totals.steps - totals.nonfinite, 1)),
        "nonfinite_steps": float(totals.nonfinite),
    }
    edges = [0.0, *BIN_EDGES, math.inf]
    for i, count in enumerate(totals.images):
        if count:
            name = f"noise_{edges[i]:g}-{edges[i + 1]:g}"
            row[f"loss_blurred/{name}"] = float(totals.blurred[i] / count)
            row[f"loss_residual/{name}"] = float(totals.residual[i] / count)
    return row


def _report(step: int, row: dict[str, float], two_targets: bool) -> None:
    bins = [name.removeprefix("loss_blurred/noise_") for name in row if name.startswith("loss_blurred/")]
    heads = {"blurred": [row[f"loss_blurred/noise_{name}"] for name in bins]}
    if two_targets:
        heads["residual"] = [row[f"loss_residual/noise_{name}"] for name in bins]
    total = " + ".join(f"{row[f'loss/{head}']:.4f} {head}" for head in heads)
    utilisation = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    lines = [
        f"step {step:>7}  loss {total}  |gradient| {row['gradient_norm']:.2f}  "
        f"{row['images_per_second']:.0f} images/s{utilisation}  lr {row['learning_rate']:.2e}",
        "    noise     " + " ".join(f"{name:>8}" for name in bins),
        *(f"    {head:<10}" + " ".join(f"{value:8.4f}" for value in values) for head, values in heads.items()),
    ]
    if row["nonfinite_steps"]:
        lines.append(f"    {row['nonfinite_steps']:.0f} steps whose loss was not finite: they count for nothing above")
    log.say("\n".join(lines))


def _device_batches(run: Run, start: int) -> Iterator[pipeline.Batch]:
    """Batches on the devices, the next ones on their way while one is used."""
    config = run.experiment.config
    host = pipeline.batches(
        run.source,
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=config.data.num_workers,
    )
    return pipeline.to_device(host, mesh.split(run.experiment.mesh))


class Preview:
    """Samples while training: one compilation, the same noise and classes every time, a PNG a step in `grids/`."""

    def __init__(self, exp: experiment.Experiment, workdir: pathlib.Path):
        self.folder, self.classes = workdir / "grids", exp.config.data.num_classes
        # A column a class, so that rows can be compared at a glance.
        self.columns = self.classes if 1 < self.classes <= 16 else math.isqrt(PREVIEW_IMAGES)
        count = min(PREVIEW_IMAGES, exp.config.sample.batch_size) // self.columns * self.columns or self.columns
        self.seeds = np.arange(count)
        self.labels = np.arange(count) % self.classes if self.classes else None
        self.draw = sampling.Sampler(exp, batch_size=count)

    def __call__(self, step: int, ema: PyTree) -> str:
        """Draws with the weights `ema` and writes the grid of step `step`; says where it is, or why there is none."""
        try:
            ema = mesh.whole(self.draw.mesh, ema)
            self.draw.compile(ema)
            pod.gather("preview", "")
            images = self.draw(ema, self.seeds, self.labels).images
        except FloatingPointError as error:  # a picture is not worth a run
            return f"none: {error}"
        path = self.folder / f"{step:08d}.png"
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(exist_ok=True)
                pictures.save_png(path, pictures.grid(images, self.columns), scale=pictures.scale_for_people(images))
            except OSError as error:  # as of a full disk
                return f"none: {error}"
        return str(path)


def _introduce(run: Run, state: State, compiled_seconds: float, measure: speed.Speed) -> None:
    exp = run.experiment
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    if jax.process_index() == 0:
        workdirs.write_atomically(run.workdir / "parameters.txt", table.encode())
    count = sum(x.size for x in jax.tree.leaves(state.params))
    log.say(f"data: {run.source.spec}, {len(run.source)} images {'×'.join(map(str, run.source.image_shape))}")
    log.say(f"network: {exp.config.model.architecture}, {count:,} parameters ({run.workdir / 'parameters.txt'})")
    log.say(f"devices: {mesh.describe(exp.mesh)}; batch {exp.config.train.batch_size}")
    log.say(experiment.precision_policy(exp.config))
    work = measure.flops / exp.mesh.size / 1e9
    log.say(f"compiled the train step in {compiled_seconds:.1f} s; {work:.1f} GFLOP a step and device")


def _stop_if_lost(state: State, limit: int, step: int, checkpoints: checkpoint.Checkpoints) -> None:
    if int(state.nonfinite) >= limit:
        steps = checkpoints.steps()
        kept = f"the checkpoint of step {steps[0]} is kept" if steps else "no checkpoint was good"
        raise FloatingPointError(
            f"the loss has not been finite for {int(state.nonfinite)} steps (train.max_nonfinite_steps is {limit}) at "
            f"step {step}; {kept}. Lower train.learning_rate, or use --config.model.dtype=float32"
        )


@preemption.noted()
def train(run: Run, final_grid: bool = True) -> int:
    """Trains to `train.steps`, resuming by itself, and ends with a grid of samples. Returns the exit status."""
    exp, settings = run.experiment, run.experiment.config.train
    checkpoints = checkpoint.Checkpoints(
        run.workdir / "checkpoints", keep_last=settings.keep_last, keep_every=settings.keep_every
    )
    state = _restore(run, checkpoints)
    if jax.process_index() == 0:
        workdirs.save_config(exp.config, run.workdir)
        workdirs.save_data(run.source, run.workdir)
    step, preview = int(state.step), Preview(exp, run.workdir)
    snapshots, metrics = _snapshots(run, step), log.Log(run.workdir, step)
    try:
        if step < settings.steps:
            state, step = _loop(run, state, checkpoints, snapshots, metrics, preview)
        _try(checkpoints.wait, step, metrics)
        _save(checkpoints, step, state, wait=True)  # this one must not fail
        if step < settings.steps or pod.any_requested():
            known = checkpoints.steps()
            saved = f"step {known[0]} of {settings.steps} is saved" if known else "nothing was saved"
            log.say(f"{preemption.requested()}: {saved}; the same command goes on from there")
            return preemption.EXIT_AGAIN
        log.say(f"trained to step {step}" + (f"; samples: {preview(step, state.ema)}" if final_grid else ""))
        return 0
    finally:
        metrics.close()
        if snapshots is not None:
            snapshots.close()
        checkpoints.close()


def _loop(
    run: Run,
    state: State,
    checkpoints: checkpoint.Checkpoints,
    snapshots: checkpoint.Checkpoints | None,
    metrics: log.Log,
    preview: Preview,
) -> tuple[State, int]:
    """Steps until the last one or a signal; the host waits for the device only to report, to save and to keep pace."""
    exp, settings = run.experiment, run.experiment.config.train
    started = time.perf_counter()
    traced = trace_step(exp)
    compiled, measure = traced.lower().compile(), speed.of_step(exp, traced)
    pod.gather("compiled", "")  # the first step waits for all, but not for as long as a compiler may take
    _introduce(run, state, time.perf_counter() - started, measure)
    rate, start, stop = learning_rate(exp.config), int(state.step), pod.Stop(_AHEAD)
    put_totals = jax.jit(zero_totals, out_shardings=mesh.replicated(exp.mesh))
    totals, pending, since, reported = put_totals(), collections.deque(), time.perf_counter(), start
    bar = log.progress(settings.steps, initial=start, unit="step", doing="training")
    step, batches = start, _device_batches(run, start)
    profile = speed.Profile(run.workdir / "profile" if run.profile else None, start)
    while True:
        with jax.transfer_guard("disallow"):  # nothing crosses between host and device unasked: it would wait
            state, totals, value = compiled(state, totals, *next(batches))
            step += 1
            pending.append(value)
            if len(pending) > _AHEAD:
                pending.popleft().block_until_ready()
        bar.update()
        profile.after(step)
        last = step == settings.steps or stop.reached(step)
        if step % settings.log_every == 0 or last:
            row = scalars(totals)
            now = time.perf_counter()
            row |= measure.row(step - reported, now - since)
            row["learning_rate"] = float(rate(step - 1))
            bar.set_postfix_str(f"{row['images_per_second']:.0f} images/s")
            _report(step, row, row["loss/residual"] > 1e-9)
            metrics.write(step, row)
            # At the end any is too many: what was reached is not saved.
            _stop_if_lost(state, 1 if step == settings.steps else settings.max_nonfinite_steps, step, checkpoints)
            totals, since, reported = put_totals(), time.perf_counter(), step
        paused = time.perf_counter()
        if snapshots is not None and step % settings.posthoc_every == 0:
            _try(checkpoints.wait, step, metrics)  # nothing of the two is saved at one time
            save = functools.partial(_save, snapshots, step, state, wait=True, beside=checkpoints)
            _try(save, step, metrics, _NOTHING_LOST)
        if last:
            break
        if step % settings.checkpoint_every == 0:
            _try(checkpoints.wait, step, metrics)
            _try(functools.partial(_save, checkpoints, step, state), step, metrics)
        if settings.sample_every and step % settings.sample_every == 0:
            log.say(f"samples: {preview(step, state.ema)}")
        since += time.perf_counter() - paused
    bar.close()
    profile.close()
    return state, step
