"""Bits a dimension of held-out images: the variational bound `bpd`, and `bpd_ode` by the ODE's own density.

Images are measured in shards that stay on disk, each image with its own noise, so that what was cut off goes on and
ends with the same numbers, and two runs can be compared image by image. `diffusion/likelihood.py` has the mathematics.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, PyTree
from ml_collections import ConfigDict

from warm_jax.data import sources
from warm_jax.diffusion import density, likelihood
from warm_jax.evaluation import adaptive, reference
from warm_jax.experiments import experiment, family
from warm_jax.runtime import log, mesh, pictures, pod, preemption, workdirs
from warm_jax.sampling import runs
from warm_jax.weights import archives

METRICS = ("bpd", "bpd_ode")
SHARD = 500  # images whose numbers are kept in one file
_LEVELS_OF_PIXELS = 127.5  # bytes a unit of x
_RANGES = {
    "count": (2, 10**8),
    "strata": (3, 4096),
    "above": (0, 1e6),
    "seed": (0, 2**32 - 1),
    "batch_size": (1, 2**16),
    "ode_count": (2, 10**8),
    "ode_tolerance": (1e-7, 0.1),
    "ode_probes": (1, 1024),
}


@dataclasses.dataclass(frozen=True)
class Heldout:
    """The images that are measured, and what they are to the training."""

    source: sources.Source
    split: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What `prepare` checked: which metrics, of which images, and the run to compare with."""

    metrics: tuple[str, ...]
    settings: ConfigDict  # `likelihood`
    heldout: Heldout
    workdir: pathlib.Path
    against: runs.Run | None = None


class Measured(NamedTuple):
    """Bits a dimension of each image and what they are made of; of `bpd_ode` only `bits` and `evaluations`."""

    bits: Float64[np.ndarray, " n"]
    by_level: Float64[np.ndarray, "n strata"]  # the integral's strata, the lowest noise first
    by_ring: Float64[np.ndarray, "strata rings"]  # the mean over the images
    prior: Float64[np.ndarray, " n"]
    last: Float64[np.ndarray, " n"]
    edges: Float64[np.ndarray, " edges"]  # of the strata, noise over signal: β in EDM's family
    evaluations: int  # of the network, an image


# ── What is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def wanted(config: ConfigDict) -> tuple[str, ...]:
    """Those of `eval.metrics` that are measured here."""
    return tuple(metric for metric in config.eval.metrics if metric in METRICS)


def check(config: ConfigDict) -> None:
    """Raises ValueError where the `likelihood` section, or the process, is not one whose bits can be measured."""
    for key, (least, most) in _RANGES.items():
        value = experiment.lookup(config, f"likelihood.{key}")
        if not least <= value <= most:
            raise ValueError(f"likelihood.{key} is {value}; it must be from {least:g} to {most:g}")
    try:
        likelihood.check(experiment.build(config).sampled)
    except ValueError as error:
        raise ValueError(f"eval.metrics has {wanted(config)[0]}, but {error}") from error
    if "bpd_ode" in wanted(config):
        adaptive.solver(config.likelihood.ode_tolerance)


def open_heldout(config: ConfigDict) -> Heldout:
    """The images of `likelihood.images`; else the test split of `data.source`; else its own, which is then said."""
    named, trained = config.likelihood.images, config.data.source
    if named:
        source = reference.open_images(config, named, "name another with likelihood.images")
        return Heldout(source, "training images" if named == trained else "named by likelihood.images")
    split = sources.test_split(trained)
    if split:
        return Heldout(reference.open_images(config, split, "name others with likelihood.images"), "test split")
    return Heldout(reference.open_images(config, trained, "name others with likelihood.images"), "training images")


def prepare(config: ConfigDict, workdir: pathlib.Path, against: str = "") -> Request:
    """Checks everything that can be checked but what `check` does. ValueError or OSError for bad input.

    `against` is another workdir, whose latest checkpoint is measured too, on the same images with the same noise.
    """
    if pod.count() > 1:
        raise ValueError(
            f"eval.metrics has {wanted(config)[0]}, which one process measures, and here are {pod.count()}; give "
            "--processes=1"
        )
    heldout = open_heldout(config)
    if len(heldout.source) < 2:
        raise ValueError(f"{heldout.source.spec} has one image; bits a dimension need at least 2, for their error")
    other = None
    if against:
        folder = workdirs.local(against)
        try:
            own = workdirs.load_config(folder, config)
            workdirs.check_same(config, folder, ("data.image_size", "data.channels", "data.num_classes"))
            likelihood.check(experiment.build(own).sampled)
        except (ValueError, OSError) as error:
            raise ValueError(f"--against={against}: {error}") from error
        other = runs.other_run(own, folder, -1, "the run of --against")
    return Request(wanted(config), config.likelihood, heldout, workdir, other)


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _key(request: Request, metric: str, opened: runs.Run, made: dict) -> str:
    """A hash of all that an image's numbers depend on."""
    settings = request.settings.to_dict()
    names = ("strata", "seed") if metric == "bpd" else ("ode_tolerance", "ode_probes", "seed", "batch_size")
    bnr = family.sampled_bnr(opened.experiment.config)
    parts = [metric, request.heldout.source.fingerprint, {name: settings[name] for name in names}, made["weights"], bnr]
    parts += [made["model"], made["process"], made.get("measured"), len(_chosen(request, metric))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:12]


def _chosen(request: Request, metric: str) -> np.ndarray:
    """The numbers of the images to measure, spread over the source."""
    most = request.settings.count if metric == "bpd" else request.settings.ode_count
    return reference.spread(len(request.heldout.source), most)


def strata_of(exp: experiment.Experiment, count: int) -> tuple[likelihood.Strata, Float64[np.ndarray, " edges"]]:
    """The strata of the process that a model is sampled on, and their edges as noise over signal of the mean colour."""
    strata = likelihood.continuous(exp.sampled, count)
    clock = exp.sampled.log_noise_to_signal(jnp.asarray(strata.edges, jnp.float32))
    return strata, np.exp(np.asarray(clock, np.float64))


def _program(
    request: Request, metric: str, exp: experiment.Experiment
) -> Callable[[PyTree, jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]:
    """(weights, bytes, classes, numbers) -> nats of each image by name, to be jitted."""
    settings, process, classes = request.settings, exp.sampled, exp.config.data.num_classes
    key = jax.random.key(settings.seed)
    strata, _ = strata_of(exp, settings.strata)

    def predictor(weights: PyTree, labels: jax.Array):
        one_hot = jax.nn.one_hot(labels, classes) if classes else None
        return lambda x, t: exp.to_sample.predict(weights, x, t, one_hot)

    def bound(weights, images, labels, numbers):
        x0 = pictures.from_uint8(images)
        found = likelihood.bound(predictor(weights, labels), process, strata, key, x0, numbers)
        return {
            "nats": likelihood.total(found),
            "by_level": jnp.sum(found.by_level, axis=2),
            "by_ring": found.by_level,
            "prior": jnp.sum(found.prior, axis=1),
            "last": found.last,
        }

    def ode(weights, images, labels, numbers):
        shape = images.shape[1:]
        u = jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n), shape))(numbers)
        x0 = (images.astype(jnp.float32) + u - 0.5) / _LEVELS_OF_PIXELS - 1
        probe = density.probes(jax.random.fold_in(key, 1), numbers, settings.ode_probes, shape, x0.dtype)
        solve = adaptive.solver(settings.ode_tolerance)
        low = likelihood.lowest(process)
        found = density.log_density(predictor(weights, labels), process, solve, x0, probe, low)
        nats = math.prod(shape) * math.log(_LEVELS_OF_PIXELS) - found.log_density
        return {"nats": nats, "evaluations": jnp.broadcast_to(found.evaluations, nats.shape)}

    return bound if metric == "bpd" else ode


class Meter:
    """A compiled program that measures one metric of one experiment; called with weights and numbers of images."""

    def __init__(self, request: Request, metric: str, exp: experiment.Experiment):
        devices = exp.mesh.size
        self._source = request.heldout.source
        self._size = -(-request.settings.batch_size // devices) * devices
        self._split, same = mesh.split(exp.mesh), mesh.replicated(exp.mesh)
        self._run = jax.jit(
            _program(request, metric, exp), in_shardings=(same, *(self._split,) * 3), out_shardings=self._split
        )

    def __call__(self, weights: PyTree, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Nats of the images `numbers` of the source, float64; of `by_ring` the sum over them."""
        parts: list[dict[str, np.ndarray]] = []
        for first in range(0, len(numbers), self._size):
            part = numbers[first : first + self._size]
            padded = np.pad(part, (0, self._size - len(part)), "edge")
            images, labels = self._source.read(padded)
            placed = jax.device_put((images, labels, padded.astype(np.int32)), self._split)
            found = {name: np.asarray(value, np.float64) for name, value in self._run(weights, *placed).items()}
            kept = {name: value[: len(part)] for name, value in found.items()}
            if "by_ring" in kept:
                kept["by_ring"] = kept["by_ring"].sum(0)[None]
            parts.append(kept)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if "by_ring" in whole:
            whole["by_ring"] = whole["by_ring"].sum(0)
        return whole


def measure(request: Request, metric: str, opened: runs.Run, step: int, weights: PyTree) -> Measured | None:
    """All images' bits, shard by shard; None where a signal came first. FloatingPointError where one is not finite.

    `step` and `weights` as `runs.load_ema(opened)` gives them.
    """
    exp, numbers = opened.experiment, _chosen(request, metric)
    made = runs.made_with(opened, step, weights)
    folder = request.workdir / "evaluations" / f"{metric}-{_key(request, metric, opened, made)}"
    meter = functools.cache(lambda: Meter(request, metric, exp))  # not compiled where all is there
    bar, found = log.progress(len(numbers), unit="image", doing=metric), []
    for first in range(0, len(numbers), SHARD):
        if preemption.requested():
            bar.close()
            return None
        part = numbers[first : first + SHARD]
        path = folder / f"{first:08d}-{len(part)}.npz"
        arrays = _kept(path, len(part))
        if arrays is None:
            arrays = meter()(weights, part)
            if not np.isfinite(arrays["nats"]).all():
                bad = part[np.argmin(np.isfinite(arrays["nats"]))]
                raise FloatingPointError(f"{metric} of image {bad} of {request.heldout.source.spec} is not finite")
            folder.mkdir(parents=True, exist_ok=True)
            archives.write_npz(path, **arrays)
        found.append(arrays)
        bar.update(len(part))
    bar.close()
    return _whole(request, metric, exp, found)


def _kept(path: pathlib.Path, count: int) -> dict[str, np.ndarray] | None:
    """A shard that was measured before; None where it was not, or the file is damaged."""
    if not path.exists():
        return None
    try:
        arrays = archives.read_npz(path)
        if len(arrays["nats"]) == count:
            return arrays
        log.say(f"{path} holds {len(arrays['nats'])} images, not {count}; measured again")
    except (ValueError, KeyError) as error:
        log.say(f"{path} is damaged ({error}); measured again")
    return None


def _whole(request: Request, metric: str, exp: experiment.Experiment, shards: list[dict[str, np.ndarray]]) -> Measured:
    dimensions = math.prod(exp.sampled.image_shape)

    def of(name: str) -> np.ndarray:
        return likelihood.bits(np.concatenate([shard[name] for shard in shards]), dimensions)

    total = of("nats")
    if metric == "bpd_ode":
        evaluations = round(float(np.mean([shard["evaluations"].mean() for shard in shards])))
        none = np.zeros((len(total), 0))
        return Measured(total, none, none[:0], none[:, 0:0].sum(1), none.sum(1), np.zeros(0), evaluations)
    _, edges = strata_of(exp, request.settings.strata)
    rings = likelihood.bits(sum(shard["by_ring"] for shard in shards) / len(total), dimensions)
    return Measured(total, of("by_level"), rings, of("prior"), of("last"), edges, request.settings.strata)
