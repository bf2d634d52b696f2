"""Training: the loop around the step.

A step's randomness is a function of (seed, step), and so is its batch: a run that was cut off and resumed ends with the
same bits as one that was not.
"""

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jaxtyping import PyTree
from ml_collections import ConfigDict

from warm_jax.convert import warm_start
from warm_jax.data import pipeline, sources
from warm_jax.experiments import experiment, family, posthoc_ema
from warm_jax.runtime import checkpoint, environment, log, mesh, pod, preemption, workdirs
from warm_jax.sampling import runs
from warm_jax.training import preview, progress, saving, throughput
from warm_jax.training.step import (
    State,
    abstract_state,
    from_store,
    init_state,
    learning_rate,
    to_store,
    trace_step,
    zero_totals,
)

Score = Callable[[int, PyTree], dict[str, float]]  # of a step and its EMA weights; called in all processes
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
    experiment.check_classes(config, source)
    workdirs.check_writable(workdir)
    if (workdir / workdirs.ORIGIN).exists():
        raise ValueError(
            f"{workdir} holds converted weights, which cannot be trained on in place; choose another --workdir and "
            f"--init_from={workdir}"
        )
    pod.check_shared(workdir)
    begun = bool(runs.checkpoint_steps(workdir))
    begins_from = warm_start.prepare(config, workdir, init_from, begun)
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
        weights = warm_start.weights(exp, run.begins_from, run.workdir, state.params)
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
    snapshots = checkpoint.Checkpoints(run.workdir / posthoc_ema.FOLDER, keep_last=None)
    pod.first_then_all("later snapshots are gone", lambda: snapshots.remove_after(step))
    snapshots.steps()  # all read anew what is there
    return snapshots


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


def _introduce(run: Run, state: State, compiled_seconds: float, measure: throughput.Speed) -> None:
    exp = run.experiment
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    if jax.process_index() == 0:
        workdirs.write_atomically(run.workdir / "parameters.txt", table.encode())
    count = sum(x.size for x in jax.tree.leaves(state.params))
    log.say(f"data: {run.source.spec}, {len(run.source)} images {'×'.join(map(str, run.source.image_shape))}")
    log.say(f"network: {exp.config.model.architecture}, {count:,} parameters ({run.workdir / 'parameters.txt'})")
    log.say(f"devices: {mesh.describe(exp.mesh)}; batch {exp.config.train.batch_size}")
    log.say(experiment.precision_policy(exp))
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


def _write_score(score: Score | None, step: int, state: State, metrics: log.Log, every: int) -> None:
    """Scores where the step is one to be scored: to the console, `metrics.jsonl` and TensorBoard, as `score/NAME`."""
    if score is not None and step % every == 0:
        found = score(step, state.ema)
        if found:
            log.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
            metrics.write(step, {f"score/{name}": value for name, value in found.items()})


@preemption.noted()
def train(
    run: Run,
    final_grid: bool = True,
    score: Score | None = None,
    at_end: Callable[[pathlib.Path], object] | None = None,
) -> int:
    """Trains to `train.steps`, resuming by itself, and ends with a grid of samples. Returns the exit status.

    `score` is called every `train.evaluate_every` steps; `at_end`, with the workdir, in the first process when the last
    step is reached, and where it fails that is said and no more.
    """
    exp, settings = run.experiment, run.experiment.config.train
    checkpoints = checkpoint.Checkpoints(
        run.workdir / "checkpoints", keep_last=settings.keep_last, keep_every=settings.keep_every
    )
    with preemption.at_once("no step was done yet; the same command goes on from what is saved"):
        state = _restore(run, checkpoints)
    if jax.process_index() == 0:
        workdirs.save_config(exp.config, run.workdir)
        workdirs.save_data(run.source, run.workdir)
        environment.save(run.workdir, int(state.step))
    begun, draw = int(state.step), preview.Preview(exp, run.workdir)
    step = begun
    snapshots, metrics = _snapshots(run, step), log.Log(run.workdir, step)
    try:
        if step < settings.steps:
            state, step = _loop(run, state, checkpoints, snapshots, metrics, draw, score)
        saving.attempt(checkpoints.wait, step, metrics)
        saving.save(checkpoints, step, state, wait=True)  # this one must not fail
        if step < settings.steps or pod.any_requested():
            known = checkpoints.steps()
            saved = f"step {known[0]} of {settings.steps} is saved" if known else "nothing was saved"
            log.say(f"{preemption.requested()}: {saved}; the same command goes on from there")
            return preemption.EXIT_AGAIN
        log.say(f"trained to step {step}" + (f"; samples: {draw(step, state.ema)}" if final_grid else ""))
        if begun < step:
            _write_score(score, step, state, metrics, settings.evaluate_every)
        if at_end is not None and jax.process_index() == 0:
            try:
                log.say(f"report: {at_end(run.workdir)}")
            except (OSError, ValueError) as error:
                log.warn(f"no report was written ({error}); --mode=analyze --analysis=report writes it")
        if final_grid:
            log.say(f"draw more: {workdirs.command(run.workdir, '--mode=sample', '--seeds=0-99')}")
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
    draw: preview.Preview,
    score: Score | None,
) -> tuple[State, int]:
    """Steps until the last one or a signal; the host waits for the device only to report, to save and to keep pace."""
    exp, settings = run.experiment, run.experiment.config.train
    started = time.perf_counter()
    done = f"step {int(state.step)} of {settings.steps} is saved" if int(state.step) else "no step was done yet"
    with preemption.at_once(f"while compiling; {done}; the same command goes on from there"):
        traced = trace_step(exp)
        compiled, measure = traced.lower().compile(), throughput.of_step(exp, traced)
    pod.gather("compiled", "")  # the first step waits for all, but not for as long as a compiler may take
    _introduce(run, state, time.perf_counter() - started, measure)
    rate, start, stop = learning_rate(exp.config), int(state.step), pod.Stop(_AHEAD)
    put_totals = jax.jit(zero_totals, out_shardings=mesh.replicated(exp.mesh))
    totals, pending, since, reported = put_totals(), collections.deque(), time.perf_counter(), start
    bar = log.progress(settings.steps, initial=start, unit="step", doing="training")
    step, batches = start, _device_batches(run, start)
    profile = throughput.Profile(run.workdir / "profile" if run.profile else None, start)
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
            row = progress.scalars(totals)
            now = time.perf_counter()
            row |= measure.row(step - reported, now - since)
            row["learning_rate"] = float(rate(step - 1))
            bar.set_postfix_str(f"{row['images_per_second']:.0f} images/s")
            log.say(progress.text(step, row, two_targets=row["loss/residual"] > 1e-9))
            metrics.write(step, row)
            # At the end any is too many: what was reached is not saved.
            _stop_if_lost(state, 1 if step == settings.steps else settings.max_nonfinite_steps, step, checkpoints)
            totals, since, reported = put_totals(), time.perf_counter(), step
        paused = time.perf_counter()
        if snapshots is not None and step % settings.posthoc_every == 0:
            saving.attempt(checkpoints.wait, step, metrics)  # nothing of the two is saved at one time
            save = functools.partial(saving.save, snapshots, step, state, wait=True, beside=checkpoints)
            saving.attempt(save, step, metrics, saving.NOTHING_LOST)
        if last:
            break
        if step % settings.checkpoint_every == 0:
            saving.attempt(checkpoints.wait, step, metrics)
            saving.attempt(functools.partial(saving.save, checkpoints, step, state), step, metrics)
        if settings.sample_every and step % settings.sample_every == 0:
            log.say(f"samples: {draw(step, state.ema)}")
        _write_score(score, step, state, metrics, settings.evaluate_every)
        since += time.perf_counter() - paused
    bar.close()
    profile.close()
    return state, step
