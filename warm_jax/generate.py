"""Sampling: from the EMA weights of a checkpoint to PNG files, a grid or one npz.

An image is a function of its seed and the weights: its noise, and its class where there are classes, come from a key of
its own, so it is the same in any order and any grouping.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from warm_jax import checkpoint, experiment, log, mesh, pictures, preemption, store, workdirs
from warm_jax.diffusion import sampler

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_SEEDS = 10_000_000


def parse_seeds(text: str) -> np.ndarray:
    """Text such as 0-63,100 as seeds, each once, in the order given. ValueError names what is wrong."""
    seeds: list[np.ndarray] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ValueError(f"--seeds={text}: {part!r} is neither a number nor a range; write for example 0-63,100")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 2**32 or last - first >= _MOST_SEEDS:
            raise ValueError(
                f"--seeds={text}: {part!r} must rise, stay below 2^32, and name at most {_MOST_SEEDS:,} seeds"
            )
        seeds.append(np.arange(first, last + 1, dtype=np.int64))
    every = np.concatenate(seeds)
    return every[np.sort(np.unique(every, return_index=True)[1])]


class Sampler:
    """A compiled sampling loop for batches of one size; fewer images are padded.

    Args:
      exp: The experiment; its config's `sample` names solver and steps.
      batch_size: Images at a time; rounded up to a multiple of the devices. Default: `sample.batch_size`.
    """

    def __init__(self, exp: experiment.Experiment, batch_size: int | None = None):
        wanted, devices = batch_size or exp.config.sample.batch_size, exp.mesh.size
        self.batch_size = -(-wanted // devices) * devices
        self.compile_seconds = 0.0
        self._exp, self._compiled = exp, None
        self._levels = exp.process.levels(exp.config.sample.steps).astype(np.float32)

    def _draw(self, params: PyTree, seeds: jax.Array, labels: jax.Array, levels: jax.Array):
        exp, classes = self._exp, self._exp.config.data.num_classes
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
        x = jax.vmap(lambda key: exp.process.prior(key, exp.process.image_shape))(keys[:, 0])
        one_hot = None
        if classes:
            own = jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))(keys[:, 1])
            labels = jnp.where(labels < 0, own, labels)
            one_hot = jax.nn.one_hot(labels, classes)

        def predict(x, t):
            return exp.model.predict(params, x, t, one_hot)

        x, record = sampler.sample(predict, exp.process, x, levels, solver=exp.config.sample.solver)
        return pictures.to_uint8(x), labels, jnp.all(jnp.isfinite(x), axis=(1, 2, 3)), record.nfe

    def compile(self, params: PyTree) -> None:
        """Compiles, once; the time it took is `compile_seconds`."""
        if self._compiled is not None:
            return
        started = time.perf_counter()
        same, split = mesh.replicated(self._exp.mesh), mesh.split(self._exp.mesh)
        # The images come out whole on every process, so that any of them can write files.
        jitted = jax.jit(self._draw, in_shardings=(same, split, split, same), out_shardings=same)
        seeds = jax.ShapeDtypeStruct((self.batch_size,), jnp.uint32)
        labels = jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        self._compiled = jitted.lower(shapes, seeds, labels, self._levels).compile()
        self.compile_seconds = time.perf_counter() - started

    def __call__(self, params: PyTree, seeds: np.ndarray, labels: np.ndarray | None = None) -> store.Samples:
        """Draws one image a seed, at most `batch_size`; `labels` of -1, or None, let each seed draw its class.

        FloatingPointError where a sample is not finite.
        """
        self.compile(params)
        count, padding = len(seeds), self.batch_size - len(seeds)
        if padding < 0:
            raise ValueError(f"{count} seeds are more than a batch of {self.batch_size}")
        labels = np.full(count, -1) if labels is None else labels
        rows = tuple(np.pad(a, (0, padding), "edge") for a in (seeds.astype(np.uint32), labels.astype(np.int32)))
        split = mesh.split(self._exp.mesh)
        placed = [jax.make_array_from_callback(a.shape, split, lambda index, a=a: a[index]) for a in rows]
        images, labels, finite, nfe = jax.device_get(self._compiled(params, *placed, self._levels))
        if not finite[:count].all():
            raise FloatingPointError(
                f"{count - finite[:count].sum()} of {count} samples are not finite (the first has seed "
                f"{seeds[np.argmin(finite[:count])]}); the weights are broken: sample from an earlier --checkpoint"
            )
        return store.Samples(images[:count], labels[:count], int(nfe))


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Run:
    """What `prepare` checked and `sample` needs."""

    experiment: experiment.Experiment
    workdir: pathlib.Path
    step: int
    seeds: np.ndarray
    out: pathlib.Path


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in `workdir`, newest first; none where there is no such folder."""
    folder = workdir / "checkpoints"
    return checkpoint.Checkpoints(folder, writable=False).steps() if folder.is_dir() else []


def prepare(config: ConfigDict, workdir: pathlib.Path, seeds: str, out: str, step: int) -> Run:
    """Checks everything that can be checked, compiles nothing. ValueError or OSError for bad input.

    `step` is a checkpoint's, -1 the latest's; `out` a folder, a file.npz or a file.png; empty: `samples/` of the
    workdir.
    """
    experiment.build(config)
    numbers = parse_seeds(seeds)
    found = checkpoint_steps(workdir)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {workdir / 'checkpoints'}; train first, or name another --workdir")
    if step != -1 and step not in found:
        raise FileNotFoundError(f"no checkpoint of step {step} in {workdir}; there are {sorted(found)}")
    workdirs.check_same(config, workdir, workdirs.MODEL_KEYS)
    if config.sample.bnr is not None and config.process.schedule != "constant":
        raise ValueError(
            f"sample.bnr is {config.sample.bnr}, but this network was trained on the {config.process.schedule} "
            "schedule and knows no other; leave sample.bnr unset"
        )
    if config.sample.bnr is not None and config.sample.bnr != config.process.bnr:
        raise ValueError(
            f"sample.bnr is {config.sample.bnr}, but this network was trained at BNR {config.process.bnr} and knows no "
            "other; leave sample.bnr unset, or train with another process.bnr"
        )
    label, classes = config.sample.class_label, config.data.num_classes
    if label is not None and not 0 <= label < classes:
        choices = (
            f"0 to {classes - 1}, or unset for a random class" if classes else "unset: this network knows no classes"
        )
        raise ValueError(f"sample.class_label is {label}; it must be {choices}")
    spectrum = workdirs.load_spectrum(workdir)
    if experiment.needs_spectrum(config) and spectrum is None:
        raise FileNotFoundError(
            f"{workdir / 'spectrum.npz'} is missing; this network needs the spectrum it was trained with"
        )
    target = pathlib.Path(out) if out else workdir / "samples"
    one_file = target.suffix in (".npz", ".png")
    if target.is_dir() if one_file else target.is_file():
        kind = "is a folder" if one_file else "is a file"
        raise ValueError(f"--out={target} {kind}; name FILE.npz, FILE.png or a folder")
    workdirs.check_writable(target.parent if one_file else target)
    if target.is_dir() and not (target / "samples.json").exists() and store.drawn_images(target):
        raise ValueError(f"{target} has images that were not made by --mode=sample; name another --out")
    return Run(experiment.build(config, spectrum), workdir, step, numbers, target)


def load_ema(run: Run) -> tuple[int, PyTree]:
    """The step and the EMA weights of the run's checkpoint, replicated over the mesh."""
    exp = run.experiment
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.replicated(exp.mesh)), shapes
    )
    checkpoints = checkpoint.Checkpoints(run.workdir / "checkpoints", writable=False)
    if run.step >= 0:
        return run.step, checkpoints.restore(run.step, ema=abstract)["ema"]
    step, items = checkpoints.restore_latest(ema=abstract)
    return step, items["ema"]


def made_with(run: Run, step: int, ema: PyTree) -> dict:
    """What a sample depends on besides its seed; stored beside the samples."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(ema)):
        weights.update(np.ascontiguousarray(leaf).data)
    config = run.experiment.config.to_dict()
    settings = {name: config[name] for name in ("model", "process", "sample")}
    if (run.workdir / "spectrum.npz").exists():
        settings["spectrum"] = hashlib.sha256((run.workdir / "spectrum.npz").read_bytes()).hexdigest()
    return json.loads(json.dumps({"checkpoint_step": step, "weights": weights.hexdigest(), **settings}, default=list))


@preemption.noted()
def sample(run: Run) -> int:
    """Draws the seeds that are not there yet and writes them. Returns the exit status."""
    step, ema = load_ema(run)
    settings = run.experiment.config.sample
    kept = (store.File if run.out.suffix in (".npz", ".png") else store.Folder)(run.out, made_with(run, step, ema))
    todo, draw = kept.missing(run.seeds), Sampler(run.experiment)
    log.say(f"checkpoint of step {step}; {len(todo)} of {len(run.seeds)} images to draw, {draw.batch_size} at a time")
    log.say(experiment.precision_policy(run.experiment.config))
    if len(todo):
        draw.compile(ema)
        log.say(f"compiled the sampler in {draw.compile_seconds:.1f} s")
        started, nfe = time.perf_counter(), 0
        label = -1 if settings.class_label is None else settings.class_label
        bar = log.progress(len(todo), unit="image", doing="sampling")
        for first in range(0, len(todo), draw.batch_size):
            if preemption.requested():
                break
            seeds = todo[first : first + draw.batch_size]
            samples = draw(ema, seeds, np.full(len(seeds), label))
            kept.add(seeds, samples)
            nfe = samples.nfe
            bar.update(len(seeds))
        bar.close()
        seconds = time.perf_counter() - started
        log.say(f"NFE {nfe} ({settings.solver}, {settings.steps} steps), {bar.n / seconds:.1f} images/s")
    if preemption.requested() and len(kept.missing(run.seeds)):
        kept.pause()
        log.say(f"{preemption.requested()}: kept what was drawn in {run.out}; the same command goes on from there")
        return preemption.EXIT_AGAIN
    log.say(kept.finish(run.seeds))
    return 0
