"""Did a model learn its images by heart: its samples beside the training images nearest to them.

In a space of features and in pixels each sample has a ratio, its distance to the nearest training image over the
distance from there to the next training image (`metrics/neighbours.py`): far below 1 it is a copy. How many ratios are
below 1 says nothing by itself, as a third to two thirds of fresh images have such a ratio; held-out images, which the
model has not seen, say how many it should be.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from warm_jax.data import sources
from warm_jax.evaluation import reference, shards
from warm_jax.metrics import extract, neighbours
from warm_jax.runtime import log, preemption, workdirs
from warm_jax.sampling import runs

MOST = 200_000  # training images, spread over a larger set: their features are all in memory
COPIES = 0.5  # ratios below are no accident in a space of many dimensions
SHOWN, NEIGHBOURS = 10, 3  # samples in the picture; training images beside each, a space
SPACES = ("features", "pixels")


class Memorisation(NamedTuple):
    """What was found. Axes: s spaces (`SPACES`), n samples, m held-out images, r shown samples, k neighbours.

    Attributes:
      ratios: `[s, n]`.
      held_out: `[s, m]`; m = 0 where there are no held-out images.
      shown: Which samples the picture shows, numbers from 0: the lowest ratios of each space, then the first seeds.
      samples: Those, `[r, h, w, c]`.
      numbers: Of the training images nearest to them, `[s, r, k]`, in the source.
      nearest: Those, `[s, r, k, h, w, c]`.
      training_images: How many training images were compared with.
    """

    ratios: Float[np.ndarray, "s n"]
    held_out: Float[np.ndarray, "s m"]
    shown: Int[np.ndarray, " r"]
    samples: UInt8[np.ndarray, "r h w c"]
    numbers: Int[np.ndarray, "s r k"]
    nearest: UInt8[np.ndarray, "s r k h w c"]
    training_images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `prepare` checked: how samples are drawn and told apart, and the held-out images, if any."""

    judging: shards.Run
    held_out: sources.Source | None


def prepare(config: ConfigDict, workdir: pathlib.Path, source: sources.Source, step: int, ema: float | None) -> Asked:
    """Checks everything that can be checked. ValueError or OSError for bad input."""
    sampling = runs.open_run(config, workdir, step, ema)
    seen = workdirs.seen_data(workdir)
    if seen not in (None, source.fingerprint):
        raise ValueError(
            f"{workdir} was trained on other images than {source.spec}; name its own with data.source: a copy is of a "
            "training image"
        )
    if len(source) <= NEIGHBOURS:
        raise ValueError(f"{source.spec} has {len(source)} images; {NEIGHBOURS} neighbours need more")
    extractor, spec = reference.load_extractor(config), config.analysis.get("held_out", "")
    reference.check_images(config, extractor)
    held_out = reference.open_images(config, spec, "name another with analysis.held_out") if spec else None
    if held_out is not None and held_out.fingerprint == source.fingerprint:
        raise ValueError(f"analysis.held_out is {spec}, the training images themselves; name images that are not among")
    workdirs.check_writable(workdir / "evaluations")
    emas = () if ema is None else (ema,)
    return Asked(shards.Run(config, workdir, extractor, None, sampling, 1, False, emas), held_out)


def _features(asked: Asked, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """Of images in memory."""
    chunks = (images[i : i + 1000] for i in range(0, len(images), 1000))
    found = []
    for batch in reference.features_of(asked.judging.extractor, chunks, asked.judging.config.eval.batch_size):
        if preemption.requested():
            raise InterruptedError(preemption.requested())
        found.append(batch)
    return extract.collect(found).pool


def _read(source: sources.Source, most: int) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
    """At most `most` images, spread over the source, and their numbers."""
    chosen = reference.spread(len(source), most)
    parts = np.array_split(chosen, -(-len(chosen) // 256))
    return np.concatenate([source.read(part)[0] for part in parts]), chosen


def _draw(asked: Asked) -> UInt8[np.ndarray, "n h w c"]:
    """`analysis.samples` samples of the seeds from `eval.first` on."""
    run, drawn = asked.judging, []
    images = shards.Images(run, run.sampling.step, run.sampling.ema)
    count = run.config.analysis.samples
    bar = log.progress(count, unit="image", doing="sampling")
    for chunk in images.chunks(run.config.eval.first, count):
        if preemption.requested():
            raise InterruptedError(preemption.requested())
        drawn.append(chunk)
        bar.update(len(chunk))
    bar.close()
    return np.concatenate(drawn)


def memorisation(asked: Asked, source: sources.Source) -> Memorisation:
    """Draws samples and looks for the training images nearest to them. InterruptedError where a signal comes."""
    samples = _draw(asked)
    training, numbers = _read(source, MOST)
    held_out = samples[:0] if asked.held_out is None else _read(asked.held_out, len(samples))[0]
    log.say(f"nearest of {len(training):,} training images to {len(samples)} samples, {len(held_out)} held-out images")

    def spaces(images: np.ndarray) -> list[np.ndarray]:
        if not len(images):
            return [np.zeros((0, asked.judging.extractor.dim)), np.zeros((0, training[0].size))]
        return [_features(asked, images), images.reshape(len(images), -1)]

    return compare(samples, training, numbers, *map(spaces, (samples, training, held_out)))


def compare(
    samples: UInt8[np.ndarray, "n h w c"],
    training: UInt8[np.ndarray, "t h w c"],
    numbers: Int[np.ndarray, " t"],
    samples_in: list[np.ndarray],
    training_in: list[np.ndarray],
    held_out_in: list[np.ndarray],
) -> Memorisation:
    """The same from images and, of each space, where samples, training images and held-out ones lie in it."""
    found = [neighbours.nearest(x, y, NEIGHBOURS) for x, y in zip(samples_in, training_in, strict=True)]
    held = [
        neighbours.nearest(x, y).ratios if len(x) else np.zeros(0)
        for x, y in zip(held_out_in, training_in, strict=True)
    ]
    lowest = [one.ratios.argsort(kind="stable")[: SHOWN * 2 // 5] for one in found]
    order = np.concatenate([*lowest, np.arange(len(samples))])
    shown = order[np.sort(np.unique(order, return_index=True)[1])][:SHOWN]
    nearest = np.stack([one.indices[shown] for one in found])
    return Memorisation(
        np.stack([one.ratios for one in found]),
        np.stack(held),
        shown,
        samples[shown],
        numbers[nearest],
        training[nearest],
        np.array(len(training)),
    )


def share(ratios: np.ndarray, below: float = 1.0) -> tuple[float, float]:
    """The share of `ratios` below a bound, and its standard error."""
    value = float(np.mean(ratios < below))
    return value, float(np.sqrt(value * (1 - value) / len(ratios)))


def verdict(samples: np.ndarray, held_out: np.ndarray) -> str:
    """What the ratios of one space say, in a few words."""
    (closer, error), copies = share(samples), int(np.sum(samples < COPIES))
    said = f"{closer:.1%} ± {error:.1%} of {len(samples)} samples are closer to a training image than its next is"
    if not len(held_out):
        return f"{said}, {copies} by half; name analysis.held_out to see of how many that would be so anyway"
    (control, its), tail = share(held_out), share(held_out, COPIES)
    said = f"{said}, of held-out images {control:.1%} ± {its:.1%}"
    low, lows = share(samples, COPIES)
    more = closer - control > 2 * np.hypot(error, its) or low - tail[0] > 2 * max(np.hypot(lows, tail[1]), 1e-9)
    return f"{said}; closer by half: {low:.1%} and {tail[0]:.1%}: {'copies' if more else 'no sign of copying'}"
