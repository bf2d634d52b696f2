"""The sampling loop of a trained model, compiled once for batches of one size, over all devices.

An image is a function of its seed and the weights: its noise, and its class where there are classes, come from a key of
its own, so it is the same in any order and any grouping.
"""

import collections
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from warm_jax.diffusion import guidance, sampler
from warm_jax.diffusion.process import Predict
from warm_jax.experiments import experiment
from warm_jax.runtime import mesh, pictures
from warm_jax.sampling import store, trajectories


class Begun(NamedTuple):
    """A batch that the devices draw: its seeds and, of each program, what it gives."""

    seeds: np.ndarray
    drawn: list[PyTree[jax.Array]]


class Sampler:
    """A compiled sampling loop for batches of one size; fewer images are padded.

    It is called with a tree of weights: the model's, or the pair of the model's and its guide's.

    Args:
      exp: The experiment; its config's `sample` names solver, steps and guidance.
      batch_size: Images at a time; rounded up to a multiple of the devices. Default: `sample.batch_size`.
      guide: The weaker experiment of `sample.guide`.
      trajectory: Whether samples come with their `trajectories.Trajectory`, at `kept` of the levels.
      apart: Whether each device runs a program of its own. None: where its TPUs are a part of a slice, for the compiler
        refuses a program for several chips of a large one.
    """

    def __init__(
        self,
        exp: experiment.Experiment,
        batch_size: int | None = None,
        guide: experiment.Experiment | None = None,
        trajectory: bool = False,
        apart: bool | None = None,
    ):
        wanted, devices = batch_size or exp.config.sample.batch_size, exp.mesh.size
        self.batch_size = -(-wanted // devices) * devices
        self.compile_seconds = 0.0
        self._exp, self._guide, self._compiled = exp, guide, []
        of_all = len({device.process_index for device in exp.mesh.devices.flat}) == jax.process_count()
        if apart is None:
            apart = exp.mesh.devices.flat[0].platform == "tpu" and not of_all
        self._meshes = [mesh.over([device]) for device in exp.mesh.devices.flat] if apart else [exp.mesh]
        self.levels = exp.sampled.levels(exp.config.sample.steps).astype(np.float32)
        self.kept = trajectories.spread(len(self.levels), trajectories.FRAMES) if trajectory else None
        if trajectory:
            self._scales = trajectories.scales(exp.sampled, self.levels[self.kept], exp.config.model.sigma_data)

    def _predictors(self, weights: PyTree, one_hot: jax.Array | None) -> tuple[Predict, sampler.Guided | None]:
        """The model, clipped as `sample` says, and guided as it says; None: not."""
        exp, settings, guide = self._exp, self._exp.config.sample, self._guide
        own, other = weights if guide else (weights, None)

        def predict(x, t):
            return exp.to_sample.predict(own, x, t, one_hot)

        def weak(x, t):
            if guide:
                return guide.to_sample.predict(other, x, t, one_hot)
            return exp.to_sample.predict(own, x, t, jnp.zeros_like(one_hot))

        # Previews while training: without `sample.guide`, or classes that were never hidden, there is no guidance.
        by_class = one_hot is not None and exp.config.data.label_dropout > 0 and not settings.guide

        def finished(predict: Predict) -> Predict:
            return guidance.clip(predict, exp.sampled) if settings.clip else predict

        if settings.guidance == 1 or not (guide or by_class):
            return finished(predict), None
        interval = experiment.guidance_interval(exp.config)
        chosen = guidance.within(exp.sampled, interval) if interval else None

        def cost(t: jax.Array) -> jax.Array | int:
            return 2 if chosen is None else 1 + chosen(t).astype(jnp.int32)

        moved = guidance.guide(predict, weak, settings.guidance, chosen)
        return finished(predict), sampler.Guided(finished(moved), cost, chosen)

    def draw(self, weights: PyTree, seeds: jax.Array, labels: jax.Array, levels: jax.Array):
        """The pure function that is compiled: (images, their labels, whether each is finite, evaluations)."""
        return self._draw(weights, seeds, labels, levels, trajectory=False)[0]

    def follow(self, weights: PyTree, seeds: jax.Array, labels: jax.Array, levels: jax.Array):
        """(What `draw` gives, (states, clean)), of the `kept` levels alone and as `Trajectory` has them."""
        drawn, start, x, record = self._draw(weights, seeds, labels, levels, trajectory=True)
        before, kept = self.kept[:-1], self.kept
        states = jnp.concatenate([start[None], record.states[kept[1:] - 1]]) * self._scales[:, None, None, None, None]
        clean = jnp.concatenate([record.clean[before], x[None]])
        return drawn, tuple(pictures.to_uint8(jnp.moveaxis(which, 0, 1)) for which in (states, clean))

    def _draw(self, weights: PyTree, seeds: jax.Array, labels: jax.Array, levels: jax.Array, trajectory: bool):
        """(What `draw` gives, x at the start, x at the end, the solver's record)."""
        exp, classes, settings = self._exp, self._exp.config.data.num_classes, self._exp.config.sample
        own = jax.vmap(jax.random.key)(seeds)
        keys = jax.vmap(jax.random.split)(own)
        start = jax.vmap(lambda key: exp.sampled.prior(key, exp.process.image_shape))(keys[:, 0])
        one_hot = None
        if classes:
            drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))(keys[:, 1])
            labels = jnp.where(labels < 0, drawn, labels)
            one_hot = jax.nn.one_hot(labels, classes)
        predict, guided = self._predictors(weights, one_hot)
        x, record = sampler.sample(
            predict,
            exp.sampled,
            start,
            levels,
            solver=settings.solver,
            keys=jax.vmap(lambda key: jax.random.fold_in(key, 2))(own),
            churn=sampler.Churn(*(settings[name] for name in sampler.Churn._fields)),
            trajectory=trajectory,
            guided=guided,
        )
        finite = jnp.all(jnp.isfinite(x), axis=(1, 2, 3))
        return (pictures.to_uint8(x), labels, finite, record.nfe), start, x, record

    def trace(self, weights: PyTree) -> jax.stages.Traced:
        """The loop as it is jitted, for `weights` of these shapes: the batch split over the devices, or one's part."""
        return self._trace(weights, self._meshes[0])

    def _trace(self, weights: PyTree, where: jax.sharding.Mesh) -> jax.stages.Traced:
        same, split, size = mesh.replicated(where), mesh.split(where), self.batch_size // len(self._meshes)
        # On the devices of several processes images come out whole on each, so that any can write files.
        several = len({device.process_index for device in where.devices.flat}) > 1
        outs = same if several else (split, split, split, same)
        program, outs = (self.draw, outs) if self.kept is None else (self.follow, (outs, split))
        jitted = jax.jit(program, in_shardings=(same, split, split, same), out_shardings=outs)
        seeds = jax.ShapeDtypeStruct((size,), jnp.uint32)
        labels = jax.ShapeDtypeStruct((size,), jnp.int32)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), weights)
        return jitted.trace(shapes, seeds, labels, self.levels)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """Where it runs, and its weights are replicated."""
        return self._exp.mesh

    def compile(self, weights: PyTree) -> None:
        """Compiles, once; the time it took is `compile_seconds`."""
        if self._compiled:
            return
        started = time.perf_counter()
        self._compiled = [self._trace(weights, where).lower().compile() for where in self._meshes]
        self.compile_seconds = time.perf_counter() - started

    def __call__(self, weights: PyTree, seeds: np.ndarray, labels: np.ndarray | None = None) -> store.Samples:
        """Draws one image a seed, at most `batch_size`; `labels` of -1, or None, let each seed draw its class.

        FloatingPointError where a sample is not finite.
        """
        return self._fetch(self.begin(weights, seeds, labels))

    def stream(
        self,
        weights: PyTree,
        seeds: np.ndarray,
        labels: np.ndarray | None = None,
        stop: Callable[[], object] = lambda: False,
    ) -> Iterator[tuple[np.ndarray, store.Samples]]:
        """The seeds, a batch at a time, and their samples, as a call gives them; of any number of seeds.

        The devices have the next batch, at most one, when the host fetches one. Once `stop()` says so no more are
        begun; those that are begun still come.
        """
        begun: collections.deque[Begun] = collections.deque()
        for first in range(0, len(seeds), self.batch_size):
            if stop():
                break
            part = slice(first, first + self.batch_size)
            begun.append(self.begin(weights, seeds[part], None if labels is None else labels[part]))
            if len(begun) > 1:
                yield begun[0].seeds, self._fetch(begun.popleft())
        while begun:
            yield begun[0].seeds, self._fetch(begun.popleft())

    def begin(self, weights: PyTree, seeds: np.ndarray, labels: np.ndarray | None = None) -> Begun:
        """Hands a batch to the devices, and waits for nothing."""
        self.compile(weights)
        count, padding = len(seeds), self.batch_size - len(seeds)
        if padding < 0:
            raise ValueError(f"{count} seeds are more than a batch of {self.batch_size}")
        labels = np.full(count, -1) if labels is None else labels
        rows = tuple(np.pad(a, (0, padding), "edge") for a in (seeds.astype(np.uint32), labels.astype(np.int32)))
        drawn, programs = [], len(self._meshes)
        size = self.batch_size // programs
        for i, (where, compiled) in enumerate(zip(self._meshes, self._compiled, strict=True)):
            own, split = [a[i * size : (i + 1) * size] for a in rows], mesh.split(where)
            placed = [jax.make_array_from_callback(a.shape, split, lambda index, a=a: a[index]) for a in own]
            drawn.append(compiled(weights if programs == 1 else mesh.part(where, weights), *placed, self.levels))
        for array in jax.tree.leaves(drawn):
            array.copy_to_host_async()
        return Begun(seeds, drawn)

    def _fetch(self, begun: Begun) -> store.Samples:
        """The samples, on the host, once they are drawn; FloatingPointError where one is not finite."""
        seeds, count = begun.seeds, len(begun.seeds)
        parts = jax.device_get(begun.drawn)
        found = jax.tree.map(lambda *one: np.concatenate(one) if one[0].ndim else one[0], *parts)
        (images, labels, finite, nfe), followed = (found, None) if self.kept is None else found
        if not finite[:count].all():
            raise FloatingPointError(
                f"{count - finite[:count].sum()} of {count} samples are not finite (the first has seed "
                f"{seeds[np.argmin(finite[:count])]}); the weights are broken: sample from an earlier --checkpoint"
            )
        path = followed and trajectories.Trajectory(*(which[:count] for which in followed))
        return store.Samples(images[:count], labels[:count], int(nfe), path)
