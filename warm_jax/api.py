"""A trained model in a script or a notebook: what `import warm_jax` offers.

model = warm_jax.load("runs/fashion_mnist")
images = warm_jax.sample(model, range(16), steps=18)                  # uint8 [16, 28, 28, 1]
blurred, residual = model.predict(x, t)                               # the function that every solver takes
better = model.guided(1.5, by=warm_jax.load("runs/weaker"))           # or by the model itself, told no class

What a call compiles is kept with the model: the next one with the same settings and number of images compiles nothing.
The first call sets what the command line sets, if JAX has not looked at its devices yet: the cache of compiled programs
and, on a CPU, as many devices as cores.

`load`, `sample`, `fit` and `score` do the same under any settings of JAX (`runtime/jax_settings.py`); `predict`, which
the caller traces, follows the caller's.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8
from ml_collections import ConfigDict

from warm_jax.diffusion.process import Prediction, Process
from warm_jax.evaluation import evaluate
from warm_jax.experiments import automatic, experiment
from warm_jax.runtime import host, jax_settings, jsonl, log, workdirs
from warm_jax.sampling import batches, runs
from warm_jax.training import train

_KEPT = 16  # compiled samplers a model


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """The EMA weights of a checkpoint, and what they mean.

    Attributes:
      experiment: The config made real; its `sample` section says how samples are drawn.
      weights: The EMA weights, on the devices.
      step: Of the checkpoint.
      workdir: Where it lives.
      ema: The σ_rel of the EMA; None: the plain one.
      guide: The weaker model that guides it, on this one's process; None: none, or itself.
    """

    experiment: experiment.Experiment
    weights: PyTree
    step: int
    workdir: pathlib.Path
    ema: float | None = None
    guide: "Model | None" = None
    _kept: dict[str, batches.Sampler] = dataclasses.field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.experiment.process.image_shape))
        count = sum(leaf.size for leaf in jax.tree.leaves(self.weights))
        kind = f"{self.experiment.config.process.system} {shape}"
        return f"Model({str(self.workdir)!r}, step {self.step}: {kind}, {self.num_classes} classes, {count:,} weights)"

    @property
    def process(self) -> Process:
        """The process that it is sampled on."""
        return self.experiment.sampled

    @property
    def num_classes(self) -> int:
        """0 where it knows no classes."""
        return self.experiment.config.data.num_classes

    def predict(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        labels: Int[Array, " b"] | Int[np.ndarray, " b"] | None = None,
    ) -> Prediction:
        """(D̂, R̂) of states `x` at levels `t`, pure, to be jitted; classes of -1, or None, are hidden from it."""
        one_hot = None
        if self.num_classes:
            labels = jnp.full(x.shape[:1], -1) if labels is None else jnp.asarray(labels)
            one_hot = jax.nn.one_hot(labels, self.num_classes)
        return self.experiment.to_sample.predict(self.weights, x, t, one_hot)

    def sampled_with(self, **settings: Any) -> "Model":
        """The same weights with other values of the config's `sample` section, as bnr=2.0, steps=40, solver="heun".

        ValueError where there is no such setting, or the model cannot be sampled so.
        """
        config = self.experiment.config.copy_and_resolve_references()
        for name, value in settings.items():
            if name not in config.sample:
                raise ValueError(f"sample has no {name}; it has {', '.join(sorted(config.sample))}")
            with config.ignore_type():
                config.sample[name] = value
        if "guide" in settings or "guide_checkpoint" in settings:
            raise ValueError("a model that another one guides is made by guided(weight, by=MODEL)")
        return self._with(config, self.guide)

    def _with(self, config: ConfigDict, guide: "Model | None") -> "Model":
        """The same weights with another config, `guide` on its process. ValueError where it cannot be sampled so."""
        try:
            weak = runs.check_request(config)
            made = experiment.build(config, runs.measured(config, self.workdir))
        except TypeError as error:
            raise ValueError(f"a setting of sample has the wrong type: {error}") from error
        if weak is not None:
            guide = dataclasses.replace(guide, experiment=experiment.on(weak.experiment, self.experiment.mesh))
        return dataclasses.replace(self, experiment=experiment.on(made, self.experiment.mesh), guide=guide)

    def guided(self, weight: float, by: "Model | None" = None, interval: tuple[float | int, ...] = ()) -> "Model":
        """The same weights, guided: `weight` times from the prediction of `by` to this model's; 1 is none.

        Args:
          weight: As `sample.guidance`, from 0 to 100.
          by: A weaker model of the same images and process (autoguidance); None: this one, told no class, where it has
            learnt that with `data.label_dropout`.
          interval: σ_lo and σ_hi, as `sample.guidance_interval`; (): all levels are guided.

        ValueError where they do not fit, or the model can be guided by nothing.
        """
        config = self.experiment.config.copy_and_resolve_references()
        with config.ignore_type():
            config.sample.guidance, config.sample.guide = weight, "" if by is None else str(by.workdir)
            config.sample.guide_checkpoint = -1 if by is None else by.step
            config.sample.guidance_interval = tuple(interval)
        return self._with(config, by)

    def sampler(self, batch_size: int | None = None) -> batches.Sampler:
        """The sampling loop for batches of `batch_size`, rounded up to a multiple of the devices; compiled once.

        It is called with `sampler_weights`, seeds uint32 `[n]` and labels int32 `[n]` (-1: drawn by the seed).
        """
        size = batch_size or self.experiment.config.sample.batch_size
        settings = self.experiment.config.to_dict()
        about = {name: settings[name] for name in ("data", "model", "process", "sample")}
        key = json.dumps([size, self.guide and self.guide.step, about], sort_keys=True, default=list)
        if key not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = batches.Sampler(self.experiment, size, self.guide and self.guide.experiment)
        return self._kept[key]

    @property
    def sampler_weights(self) -> PyTree:
        """What `sampler()` is called with: the weights, or the pair of them and the guide's."""
        return self.weights if self.guide is None else (self.weights, self.guide.weights)


@jax_settings.pinned()
def load(
    workdir: str | pathlib.Path,
    checkpoint: int = -1,
    ema: float | None = None,
    process_file: str | pathlib.Path = "",
    **settings: Any,
) -> Model:
    """The model of a workdir, from its checkpoint of a step (-1: the latest); `settings` as for `sampled_with`.

    `ema` is the σ_rel of an EMA that is made of stored averages (`experiments/posthoc_ema.py`); None: the plain one.
    Of a model that another one guides (`sample.guide`) it is this one alone. `process_file` is the file of a process of
    one's own, where the run has one: Python code, which is run only when it is named here, too. FileNotFoundError where
    there is none, ValueError where it cannot be read.
    """
    workdir = workdirs.local(str(workdir))
    config = workdirs.load_config(workdir)
    _set_up(config)
    lacking = [name for name in ("data", "process", "model", "train", "sample") if name not in config]
    if lacking:
        raise ValueError(f"{workdir / 'config.json'} has no {', '.join(lacking)}; restore it")
    if process_file:
        config.process.file = str(process_file)
    if config.sample.guide:
        config.sample.guidance, config.sample.guide, config.sample.guidance_interval = 1.0, "", ()
    runs.require_checkpoint(workdir, checkpoint)
    exp = runs.build(config, runs.measured(config, workdir))
    run = runs.Run(exp, workdir, checkpoint, ema=ema)
    step, weights = runs.load_ema(run)
    model = Model(exp, weights, step, workdir, ema)
    return model.sampled_with(**settings) if settings else model


@jax_settings.pinned()
def sample(
    model: Model, seeds: Iterable[int], labels: Iterable[int] | int | np.integer | None = None, **settings: Any
) -> UInt8[np.ndarray, "n h w c"]:
    """One image a seed, as `--mode=sample` draws it; `labels`: its class, one for all or one each.

    Other `settings` of the config's `sample` section as for `Model.sampled_with`. Compiled once for each of them and of
    the numbers of images, up to `sample.batch_size`. ValueError where the arguments are not such.
    """
    if not isinstance(model, Model):
        raise ValueError(f"{model!r} is no model; give what warm_jax.load returns")
    model = model.sampled_with(**settings) if settings else model
    numbers = np.asarray(list(seeds) if isinstance(seeds, Iterable) else [])
    if not len(numbers) or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(f"seeds are {seeds!r}; give at least one whole number from 0 to 2^32 - 1, as range(16)")
    chosen = _classes(model, len(numbers), labels)
    draw = model.sampler(min(len(numbers), model.experiment.config.sample.batch_size))
    bar, images = log.progress(len(numbers), unit="image", doing="sampling"), []
    for _, samples in draw.stream(model.sampler_weights, numbers, chosen):
        images.append(samples.images)
        bar.update(len(samples.images))
    bar.close()
    return np.concatenate(images)


def _classes(model: Model, count: int, labels: Iterable[int] | int | np.integer | None) -> Int[np.ndarray, " n"]:
    """A class for each image; -1: its seed draws it. ValueError where the model knows no such class."""
    asked = model.experiment.config.sample.class_label if labels is None else labels
    given = np.asarray(-1 if asked is None else asked if np.ndim(asked) == 0 else list(asked))
    if given.ndim and len(given) != count:
        raise ValueError(f"{len(given)} labels for {count} seeds; give one for all, or one each")
    if asked is not None and not (model.num_classes and np.all((given >= -1) & (given < model.num_classes))):
        raise ValueError(f"labels are {asked}; this model knows {model.num_classes} classes, from 0")
    return np.broadcast_to(given, (count,))


def _set_up(config: ConfigDict) -> None:
    """What the command line sets before JAX looks at its devices; where it has looked, they stay as they are."""
    host.keep_programs()
    with contextlib.suppress(RuntimeError):
        fsdp = config.mesh.fsdp if "mesh" in config else 1
        host.share_cores(config.train.batch_size, config.train.accumulation, fsdp)


def _settled(config: ConfigDict, workdir: str | pathlib.Path) -> tuple[ConfigDict, pathlib.Path]:
    """A copy of `config` in which nothing is left to be chosen, and the workdir. ValueError where it is no config."""
    if not isinstance(config, ConfigDict) or "train" not in config:
        raise ValueError(f"{type(config).__name__} is no config; give what a file of configs/ returns by get_config()")
    config, folder = config.copy_and_resolve_references(), workdirs.local(str(workdir))
    _set_up(config)
    automatic.fetch(config)
    automatic.settle(config, folder)
    return config, folder


@jax_settings.pinned()
def fit(config: ConfigDict, workdir: str | pathlib.Path) -> Model:
    """Trains as `--mode=train` does, or goes on where it was cut off, and loads the result.

    InterruptedError where a signal stopped it; what was reached is saved. ValueError or OSError, with the command
    line's messages, for what cannot be trained.
    """
    config, workdir = _settled(config, workdir)
    if train.train(train.prepare(config, workdir)):
        raise InterruptedError("training was stopped by a signal; what was reached is saved, and fit goes on from it")
    return load(workdir)


@jax_settings.pinned()
def score(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, float]:
    """Scores the latest checkpoint as `--mode=evaluate` does; the scores by name, also a row of `results.jsonl`."""
    config, workdir = _settled(config, workdir)
    if evaluate.evaluate(evaluate.prepare(config, workdir, "", -1, "once", watch=False)):
        raise InterruptedError("evaluating was stopped by a signal; finished shards are kept, and score goes on")
    row = jsonl.read(workdir / "results.jsonl")[-1]
    return {name: row[name] for name in row["scores"]}
