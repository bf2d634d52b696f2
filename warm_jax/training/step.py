"""The train step: one pure function of (state, totals, images, labels), jitted over a mesh.

All its randomness is a function of (seed, step).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, PyTree, UInt8
from ml_collections import ConfigDict

from warm_jax.data import augment
from warm_jax.diffusion import ema, loss
from warm_jax.experiments import experiment
from warm_jax.runtime import mesh, pictures

BIN_EDGES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # noise levels between which losses are reported apart


class State(NamedTuple):
    """All that a step hands to the next. `nonfinite` counts the steps in a row whose loss was not finite.

    `averages` has a power-function average of the parameters for each of `train.posthoc_ema`.
    """

    step: Int32[Array, ""]
    params: PyTree[Float[Array, "..."]]
    ema: PyTree[Float[Array, "..."]]
    optimizer: PyTree
    nonfinite: Int32[Array, ""]
    averages: tuple[PyTree[Float[Array, "..."]], ...] = ()


def to_store(state: PyTree) -> dict[str, PyTree]:
    """The items of a checkpoint of a state, or of its shapes; `averages` only where there are some."""
    train = {"step": state.step, "params": state.params, "ema": None}  # `ema` is an item of its own
    train |= {"optimizer": state.optimizer, "nonfinite": state.nonfinite}
    return {"train": train, "ema": state.ema} | ({"averages": state.averages} if state.averages else {})


def from_store(items: dict[str, PyTree]) -> State:
    """The state of a checkpoint's items."""
    return State(**(items["train"] | {"ema": items["ema"]}), averages=items.get("averages", ()))


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
    """Adam without decay; gradients clipped to the norm `train.clip_norm` where it is above 0."""
    settings = config.train
    adam = optax.adam(learning_rate(config), b1=settings.b1, b2=settings.b2, eps=settings.eps)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adam) if settings.clip_norm else adam


def init_state(exp: experiment.Experiment) -> State:
    """The state of step 0, a function of the seed, born on its shardings."""
    init = _initial(exp)
    # A program of a hundred generators of random numbers, run once: on a CPU most of its time goes into making it fast.
    on_cpu = exp.mesh.devices.flat[0].platform == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=mesh.place(exp.mesh, jax.eval_shape(init)), compiler_options=quick)()


def _initial(exp: experiment.Experiment) -> Callable[[], State]:
    def init() -> State:
        params = exp.model.init(jax.random.fold_in(jax.random.key(exp.config.seed), 2**31))
        zero = jnp.zeros((), jnp.int32)
        averages = tuple(jax.tree.map(jnp.zeros_like, params) for _ in experiment.averages(exp.config))
        return State(zero, params, params, optimizer(exp.config).init(params), zero, averages)

    return init


def abstract_state(exp: experiment.Experiment) -> State:
    """Shapes, dtypes and shardings of `init_state`, without computing it."""
    state = jax.eval_shape(_initial(exp))
    where = mesh.place(exp.mesh, state)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, where)


def _finite(gradient: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5)


def _add_errors(totals: Totals, example: loss.Example, s: Array, errors: loss.Errors, norm: Array, ok: Array) -> Totals:
    pixels = math.prod(example.x.shape[1:])
    finite = jnp.isfinite(errors.blurred + errors.residual)
    bins = jax.nn.one_hot(jnp.searchsorted(jnp.asarray(BIN_EDGES), s), len(BIN_EDGES) + 1) * finite[:, None]

    def total(values: Array) -> Array:
        return jnp.sum(bins * jnp.where(finite, values, 0)[:, None], axis=0)

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
    exponents = [ema.gamma(sigma_rel) for sigma_rel in experiment.averages(config)]

    def objective(params: PyTree, example: loss.Example, given: Given, dropout_key: PRNGKeyArray):
        model = exp.model
        if example.bnr is not None:
            model = model.of(loss.following(exp.process, example.bnr))

        def predict(x: Array, t: Array):
            return model.predict(params, x, t, *given, dropout_key=dropout_key)

        around = model.preconditioning
        return loss.two_head(predict, example, around.weight, config.train.residual_weight, around.errors)

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
        grads, ok = jax.tree.map(_finite, grads), jnp.isfinite(value)
        norm = optax.tree.norm(grads)
        updates, optimizer_state = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema.decay(
            state.step, config.train.batch_size, config.train.ema_halflife_images, config.train.ema_rampup_ratio
        )
        plain = optax.incremental_update(params, state.ema, 1 - decay)
        pairs = zip(state.averages, exponents, strict=True)
        averages = tuple(ema.update(average, params, gamma, state.step + 1) for average, gamma in pairs)
        nonfinite = jnp.where(ok, 0, state.nonfinite + 1)
        totals = _add_errors(totals, example, exp.process.noise(example.t), errors, jnp.where(ok, norm, 0), ok)
        return State(state.step + 1, params, plain, optimizer_state, nonfinite, averages), totals, value

    return step


def trace_step(exp: experiment.Experiment) -> jax.stages.Traced:
    """The step as it is jitted over the mesh: batch split over the devices, state donated."""
    same, split, state = mesh.replicated(exp.mesh), mesh.split(exp.mesh), abstract_state(exp)
    where = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(
        make_step(exp),
        in_shardings=(where, same, split, split),
        out_shardings=(where, same, same),
        donate_argnums=(0, 1),
        # Else a compiler may take the bfloat16 of what lies between blocks for float32, and store both on a GPU.
        compiler_options={"xla_allow_excess_precision": False} if exp.config.model.dtype == "bfloat16" else None,
    )
    batch = exp.config.train.batch_size
    totals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), zero_totals())
    images = jax.ShapeDtypeStruct((batch, *exp.process.image_shape), jnp.uint8)
    return jitted.trace(state, totals, images, jax.ShapeDtypeStruct((batch,), jnp.int32))


def compile_step(exp: experiment.Experiment) -> jax.stages.Compiled:
    """The step compiled for the mesh, ahead of time."""
    return trace_step(exp).lower().compile()
