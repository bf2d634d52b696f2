"""Training: one pure step, jitted over a mesh, and the loop around it.

All randomness of a step is a function of (seed, step), and so is its batch: a run that was cut off and resumed ends
with the same bits as one that was not.
"""

import collections
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, PyTree, UInt8
from ml_collections import ConfigDict

from warm_jax import checkpoint, experiment, generate, log, mesh, pictures, preemption
from warm_jax.data import augment, pipeline, sources
from warm_jax.diffusion import loss

BIN_EDGES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # noise levels between which losses are reported apart
PREVIEW_IMAGES = 64
_AHEAD = 2  # steps that may be queued on the device before the host waits


class State(NamedTuple):
    """All that a step hands to the next. `nonfinite` counts the steps in a row whose loss was not finite."""

    step: Int32[Array, ""]
    params: PyTree[Float[Array, "..."]]
    ema: PyTree[Float[Array, "..."]]
    optimizer: PyTree
    nonfinite: Int32[Array, ""]


class Totals(NamedTuple):
    """Sums since the last report, kept on the device: by noise-level bin, and over steps."""

    images: Float[Array, " bins"]
    blurred: Float[Array, " bins"]
    residual: Float[Array, " bins"]
    gradient_norm: Float[Array, ""]
    nonfinite: Float[Array, ""]
    steps: Float[Array, ""]


def zero_totals() -> Totals:
    """Nothing summed yet."""
    bins, number = np.zeros(len(BIN_EDGES) + 1, np.float32), np.zeros((), np.float32)
    return Totals(bins, bins, bins, number, number, number)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear over the first `warmup_images` (0 at the first step), then constant, or a half cosine to 0 at the end."""
    settings = config.train
    warmup = max(settings.warmup_images / settings.batch_size, 1e-8)

    def rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum(step / warmup, 1) if settings.warmup_images else 1.0
        decay = (1 + jnp.cos(jnp.pi * jnp.minimum(step / settings.steps, 1))) / 2 if settings.decay == "cosine" else 1.0
        return jnp.asarray(settings.learning_rate * ramp * decay, jnp.float32)

    return rate


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam without decay or clipping."""
    return optax.adam(learning_rate(config), b1=config.train.b1, b2=config.train.b2, eps=config.train.eps)


def init_state(exp: experiment.Experiment) -> State:
    """The state of step 0, a function of the seed, born on its shardings."""

    def init() -> State:
        params = exp.model.init(jax.random.fold_in(jax.random.key(exp.config.seed), 2**31))
        zero = jnp.zeros((), jnp.int32)
        return State(zero, params, params, optimizer(exp.config).init(params), zero)

    return jax.jit(init, out_shardings=mesh.replicated(exp.mesh))()


def abstract_state(exp: experiment.Experiment) -> State:
    """Shapes, dtypes and shardings of `init_state`, without computing it."""
    state = jax.eval_shape(lambda: init_state(exp))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.replicated(exp.mesh)), state)


def _ema_decay(config: ConfigDict, step: Int32[Array, ""]) -> Float[Array, ""]:
    """0.5^(batch / half-life), the half-life in images, at most a share of the images seen so far."""
    settings = config.train
    seen = step.astype(jnp.float32) * settings.batch_size
    halflife = jnp.minimum(settings.ema_halflife_images, settings.ema_rampup_ratio * seen)
    return jnp.exp2(-settings.batch_size / jnp.maximum(halflife, 1e-8))


def _finite(gradient: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5)


def _add_errors(totals: Totals, example: loss.Example, s: Array, errors: loss.Errors, norm: Array, ok: Array) -> Totals:
    pixels = math.prod(example.x.shape[1:])
    bins = jax.nn.one_hot(jnp.searchsorted(jnp.asarray(BIN_EDGES), s), len(BIN_EDGES) + 1)

    def total(values: Array) -> Array:
        return jnp.sum(bins * jnp.nan_to_num(values, posinf=0.0, neginf=0.0)[:, None], axis=0)

    step = Totals(
        images=jnp.sum(bins, axis=0),
        blurred=total(errors.blurred / pixels),
        residual=total(errors.residual / pixels),
        gradient_norm=norm,
        nonfinite=1 - ok.astype(jnp.float32),
        steps=jnp.ones(()),
    )
    return jax.tree.map(jnp.add, totals, step)


class Given(NamedTuple):
    """What the network is told besides a state and its level: a class `[b, k]`, an augmentation `[b, 9]`."""

    class_labels: Float[Array, "b k"] | None
    augment_labels: Float[Array, "b n"] | None


def clean_batch(
    config: ConfigDict, key: PRNGKeyArray, images: UInt8[Array, "b h w c"], labels: Int32[Array, " b"]
) -> tuple[Float[Array, "b h w c"], Given]:
    """Bytes to augmented images in [-1, 1], and what the network is told of them; a label of -1 is no class."""
    augment_key, label_key = jax.random.split(key)
    x0, augmented, one_hot = pictures.from_uint8(images), None, None
    if config.data.augment == "edm":
        x0, augmented = augment.augment(augment_key, x0, config.data.augment_probability)
    elif config.data.augment == "flip":
        x0 = augment.flip(augment_key, x0)
    if config.data.num_classes:
        kept = jax.random.uniform(label_key, labels.shape) >= config.data.label_dropout
        one_hot = jax.nn.one_hot(labels, config.data.num_classes) * kept[:, None]
    return x0, Given(one_hot, augmented)


Step = Callable[[State, Totals, UInt8[Array, "b h w c"], Int32[Array, " b"]], tuple[State, Totals, Float[Array, ""]]]


def make_step(exp: experiment.Experiment) -> Step:
    """The pure train step (state, totals, images, labels) -> (state, totals, loss). Nothing in it is jitted yet."""
    config, parts, tx = exp.config, exp.config.train.accumulation, optimizer(exp.config)

    def objective(params: PyTree, example: loss.Example, given: Given, dropout_key: PRNGKeyArray):
        def predict(x: Array, t: Array):
            return exp.model.predict(params, x, t, *given, dropout_key=dropout_key)

        return loss.two_head(predict, example, exp.model.preconditioning.weight, config.train.residual_weight)

    def gradients(params: PyTree, example: loss.Example, given: Given, dropout_key: PRNGKeyArray):
        """Loss, errors and gradients of the whole batch, `parts` slices of it at a time."""
        differentiate = jax.value_and_grad(objective, has_aux=True)

        def slice_of_each(batch: Array) -> Array:
            # Image i goes to slice i % parts: every slice is spread over all devices as the batch is.
            return batch.reshape(-1, parts, *batch.shape[1:]).swapaxes(0, 1)

        def one_slice(total: tuple[Array, PyTree], part: tuple):
            batch, labels, number = part
            (value, errors), grads = differentiate(params, batch, labels, jax.random.fold_in(dropout_key, number))
            return jax.tree.map(lambda a, b: a + b / parts, total, (value, grads)), errors

        if parts == 1:
            (value, errors), grads = differentiate(params, example, given, dropout_key)
            return value, errors, grads
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sliced = jax.tree.map(slice_of_each, (example, given))
        (value, grads), errors = jax.lax.scan(one_slice, zero, (*sliced, jnp.arange(parts)))
        return value, jax.tree.map(lambda e: e.swapaxes(0, 1).reshape(-1), errors), grads

    def step(state: State, totals: Totals, images: Array, labels: Array) -> tuple[State, Totals, Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        data_key, draw_key, dropout_key = jax.random.split(key, 3)
        x0, given = clean_batch(config, data_key, images, labels)
        example = loss.draw(exp.process, draw_key, x0)
        value, errors, grads = gradients(state.params, example, given, dropout_key)
        norm, ok = optax.global_norm(grads), jnp.isfinite(value)
        updates, optimizer_state = tx.update(jax.tree.map(_finite, grads), state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - _ema_decay(config, state.step))
        nonfinite = jnp.where(ok, 0, state.nonfinite + 1)
        totals = _add_errors(totals, example, exp.process.noise(example.t), errors, jnp.where(ok, norm, 0), ok)
        return State(state.step + 1, params, ema, optimizer_state, nonfinite), totals, value

    return step


def compile_step(exp: experiment.Experiment) -> jax.stages.Compiled:
    """The step compiled for the mesh, ahead of time: batch split over the devices, state donated."""
    same, split = mesh.replicated(exp.mesh), mesh.split(exp.mesh)
    jitted = jax.jit(
        make_step(exp), in_shardings=(same, same, split, split), out_shardings=(same, same, same), donate_argnums=(0, 1)
    )
    batch = exp.config.train.batch_size
    totals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), zero_totals())
    images = jax.ShapeDtypeStruct((batch, *exp.process.image_shape), jnp.uint8)
    return jitted.lower(abstract_state(exp), totals, images, jax.ShapeDtypeStruct((batch,), jnp.int32)).compile()


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `train` needs."""

    experiment: experiment.Experiment
    source: sources.Source
    workdir: pathlib.Path


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


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Opens the data, checks everything that can be checked, compiles nothing. ValueError or OSError for bad input."""
    experiment.build(config)
    experiment.check_batch(config, jax.device_count())
    source = _open_source(config)
    if config.data.num_classes not in (0, source.num_classes):
        raise ValueError(
            f"data.num_classes is {config.data.num_classes}, {source.spec} has {source.num_classes} classes; "
            f"set it to {source.num_classes}, or to 0 to ignore classes"
        )
    experiment.check_writable(workdir)
    begun = any((workdir / "checkpoints").glob("[0-9]*"))
    if begun:
        experiment.check_same(config, workdir, experiment.MODEL_KEYS + experiment.RUN_KEYS)
        experiment.check_same_data(source, workdir, config.data.allow_changed)
    spectrum = None
    if experiment.needs_spectrum(config):
        # One that a run left without a checkpoint may be of other images.
        spectrum = experiment.load_spectrum(config, workdir) if begun else None
        if spectrum is None:
            spectrum = experiment.measure_spectrum(source)
            experiment.save_spectrum(spectrum, workdir)
    return Run(experiment.build(config, spectrum), source, workdir)


def _restore(exp: experiment.Experiment, checkpoints: checkpoint.Checkpoints) -> State:
    abstract = abstract_state(exp)
    found = checkpoints.restore_latest(train=abstract._replace(ema=None), ema=abstract.ema)
    if found is None:
        return init_state(exp)
    step, items = found
    checkpoints.remove_after(step)
    log.say(f"resuming from the checkpoint of step {step} in {checkpoints.folder}")
    return State(*items["train"])._replace(ema=items["ema"])


def _save(checkpoints: checkpoint.Checkpoints, step: int, state: State, wait: bool = False) -> None:
    """Saves unless the last losses were not finite: the last good checkpoint stays the newest."""
    if int(state.nonfinite) == 0:
        checkpoints.save(step, state._replace(ema=None), state.ema, wait=wait)


def scalars(totals: Totals) -> dict[str, float]:
    """Means since the last report, by head, and by head and noise level; per pixel, weighted by λ."""
    totals = jax.tree.map(np.asarray, totals)
    images = np.maximum(totals.images.sum(), 1)
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


def _report(step: int, row: dict[str, float], blurs: bool) -> None:
    bins = [name.removeprefix("loss_blurred/noise_") for name in row if name.startswith("loss_blurred/")]
    heads = {"blurred": [row[f"loss_blurred/noise_{name}"] for name in bins]}
    if blurs:
        heads["residual"] = [row[f"loss_residual/noise_{name}"] for name in bins]
    total = " + ".join(f"{row[f'loss/{head}']:.4f} {head}" for head in heads)
    lines = [
        f"step {step:>7}  loss {total}  |gradient| {row['gradient_norm']:.2f}  "
        f"{row['images_per_second']:.0f} images/s  lr {row['learning_rate']:.2e}",
        "    noise     " + " ".join(f"{name:>8}" for name in bins),
        *(f"    {head:<10}" + " ".join(f"{value:8.4f}" for value in values) for head, values in heads.items()),
    ]
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
        self.draw = generate.Sampler(exp, batch_size=count)

    def __call__(self, step: int, ema: PyTree) -> pathlib.Path:
        """Draws with the weights `ema` and writes the grid of step `step`."""
        images = self.draw(ema, self.seeds, self.labels).images
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{step:08d}.png"
        image = pictures.grid(images, self.columns)
        if jax.process_index() == 0:
            pictures.save_png(path, image, scale=max(1, round(64 / images.shape[1])))
        return path


def _introduce(run: Run, state: State, compiled_seconds: float, compiled: jax.stages.Compiled) -> None:
    exp = run.experiment
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    experiment.write_atomically(run.workdir / "parameters.txt", table.encode())
    count = sum(x.size for x in jax.tree.leaves(state.params))
    flops = (compiled.cost_analysis() or {}).get("flops", 0)
    log.say(f"data: {run.source.spec}, {len(run.source)} images {'×'.join(map(str, run.source.image_shape))}")
    log.say(f"network: {exp.config.model.architecture}, {count:,} parameters ({run.workdir / 'parameters.txt'})")
    log.say(f"devices: {mesh.describe(exp.mesh)}; batch {exp.config.train.batch_size}")
    log.say(experiment.precision_policy(exp.config))
    log.say(f"compiled the train step in {compiled_seconds:.1f} s; {flops / 1e9:.1f} GFLOP a step and device")


def _stop_if_lost(state: State, limit: int, step: int, checkpoints: checkpoint.Checkpoints) -> None:
    if int(state.nonfinite) >= limit:
        steps = checkpoints.steps()
        kept = f"the checkpoint of step {steps[0]} is kept" if steps else "no checkpoint was good"
        raise FloatingPointError(
            f"the loss has not been finite for {int(state.nonfinite)} steps (train.max_nonfinite_steps is {limit}) at "
            f"step {step}; {kept}. Lower train.learning_rate, or use --config.model.dtype=float32"
        )


def train(run: Run) -> int:
    """Trains to `train.steps`, resuming by itself, and ends with a grid of samples. Returns the exit status."""
    exp, settings = run.experiment, run.experiment.config.train
    preemption.install()
    checkpoints = checkpoint.Checkpoints(
        run.workdir / "checkpoints", keep_last=settings.keep_last, keep_every=settings.keep_every
    )
    state = _restore(exp, checkpoints)
    experiment.save_config(exp.config, run.workdir)
    experiment.save_data(run.source, run.workdir)
    step, preview = int(state.step), Preview(exp, run.workdir)
    metrics = log.Log(run.workdir, step)
    try:
        if step < settings.steps:
            state, step = _loop(run, state, checkpoints, metrics, preview)
        _save(checkpoints, step, state, wait=True)
        if preemption.requested():
            log.say(
                f"{preemption.requested()}: saved step {step} of {settings.steps}; the same command goes on from there"
            )
            return preemption.EXIT_AGAIN
        log.say(f"trained to step {step}; samples: {preview(step, state.ema)}")
        return 0
    finally:
        metrics.close()
        checkpoints.close()


def _loop(run: Run, state: State, checkpoints: checkpoint.Checkpoints, metrics: log.Log, preview: Preview):
    """Steps until the last one or a signal; the host waits for the device only to report, to save and to keep pace."""
    exp, settings = run.experiment, run.experiment.config.train
    started = time.perf_counter()
    compiled = compile_step(exp)
    _introduce(run, state, time.perf_counter() - started, compiled)
    rate, start = learning_rate(exp.config), int(state.step)
    put_totals = lambda: jax.device_put(zero_totals(), mesh.replicated(exp.mesh))  # noqa: E731
    totals, pending, since, reported = put_totals(), collections.deque(), time.perf_counter(), start
    bar = log.progress(settings.steps, initial=start, unit="step", doing="training")
    step = start
    for images, labels in _device_batches(run, start):
        state, totals, value = compiled(state, totals, images, labels)
        step += 1
        pending.append(value)
        if len(pending) > _AHEAD:
            pending.popleft().block_until_ready()
        bar.update()
        last = step == settings.steps or bool(preemption.requested())
        if step % settings.log_every == 0 or last:
            row = scalars(totals)
            now = time.perf_counter()
            row["images_per_second"] = (step - reported) * settings.batch_size / (now - since)
            row["learning_rate"] = float(rate(step - 1))
            bar.set_postfix_str(f"{row['images_per_second']:.0f} images/s")
            _report(step, row, exp.process.blurs)
            metrics.write(step, row)
            _stop_if_lost(state, settings.max_nonfinite_steps, step, checkpoints)
            totals, since, reported = put_totals(), time.perf_counter(), step
        if last:
            break
        paused = time.perf_counter()
        if step % settings.checkpoint_every == 0:
            _save(checkpoints, step, state)
        if settings.sample_every and step % settings.sample_every == 0:
            log.say(f"samples: {preview(step, state.ema)}")
        since += time.perf_counter() - paused
    bar.close()
    return state, step
