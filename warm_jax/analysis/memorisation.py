"""Did a model learn its images by heart: its samples beside the training images nearest to them.

In a space of features and in pixels each sample has a ratio, its distance to the nearest training image over the
distance from there to the next training image (`metrics/neighbours.py`): far below 1 it is a copy. How many ratios are
below 1 says nothing by itself, as a third to two thirds of fresh images have such a ratio; held-out images, which the
model has not seen, say how many it should be.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from warm_jax.metrics import neighbours

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
