"""What nearest neighbours in a feature space tell: precision, recall, density, coverage, and whether images are copies.

numpy float64, arrays in, numbers out, as `scores`. Distances are Euclidean; time is n × m × d, memory `batch` × m.

Copies are told by a ratio, after Alaa et al. (2022). Let x be the training image nearest to a sample, and x' the
training image nearest to x that is not the same. Then

    ratio = |sample - x| / |x - x'|,

and a sample with a ratio below 1 is closer to a training image than that one is to any other. `authenticity` is the
share of samples with a ratio of at least 1. For a fresh draw y from the distribution of the training images all n + 1
of them are exchangeable, so a ratio below 1 means that y and x are each other's nearest: with a density in d dimensions
that has a probability of 2/3 (d = 1), 0.6215 (d = 2), falling towards 1/2, and less where a few images are the nearest
of many. So copying is a share *above* that of held-out images, not above 0; and a share far below it says that samples
are far from all images.

The ratio and not the feature likelihood divergence (Jiralerspong et al. 2023), whose kernel density needs held-out
images to be fitted at all and mixes copying with quality in one number: this one needs none, is exact for each sample,
and names the image that was copied.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Shaped

from warm_jax.metrics.scores import require_features

_NUMBERS = 2**25  # of a set that are in float64 at once

Rows = Shaped[np.ndarray, "n d"]


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density ≥ 0, about 1 for the reference's own distribution; coverage, a fraction in [0, 1]."""

    density: float
    coverage: float


class Nearest(NamedTuple):
    """Of each sample the nearest training images.

    Attributes:
      indices: `[n, k]`, the nearest first.
      distances: To them, `[n, k]`.
      own: The distance of the nearest training image to the nearest one that is not the same, `[n]`; 0: all are.
    """

    indices: Int[np.ndarray, "n k"]
    distances: Float64[np.ndarray, "n k"]
    own: Float64[np.ndarray, " n"]

    @property
    def ratios(self) -> Float64[np.ndarray, " n"]:
        """|sample - x| / |x - x'|, as the head of this file says; 0 of a copy."""
        first = self.distances[:, 0]
        apart = np.divide(first, self.own, out=np.full(len(first), np.inf), where=self.own > 0)
        return np.where(first > 0, apart, 0.0)


def _squared_distances(x: np.ndarray, y: np.ndarray, batch: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of |xᵢ - yⱼ|², at most `batch` of them at a time."""
    y = y.astype(np.float64)
    norms = np.square(y).sum(axis=1)
    for start in range(0, len(x), batch):
        rows = x[start : start + batch].astype(np.float64)
        squared = np.square(rows).sum(axis=1)[:, None] + norms - 2 * rows @ y.T
        yield slice(start, start + len(rows)), np.maximum(squared, 0)


def _radii(x: np.ndarray, k: int, batch: int) -> Float64[np.ndarray, " n"]:
    """Squared distance of each feature to its k-th nearest other."""
    radii = np.empty(len(x))
    for rows, squared in _squared_distances(x, x, batch):
        radii[rows] = np.partition(squared, k, axis=1)[:, k]  # position 0 is the feature itself
    return radii


def _covered(x: np.ndarray, centres: np.ndarray, radii: np.ndarray, batch: int) -> float:
    """Fraction of x inside at least one of the balls."""
    inside = [(squared <= radii).any(axis=1) for _, squared in _squared_distances(x, centres, batch)]
    return float(np.concatenate(inside).mean())


def _require_neighbours(k: int, **counts: int) -> None:
    """Raises ValueError where a set has no `k` neighbours of each of its features."""
    if k < 1 or k >= min(counts.values()):
        found = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"k = {k} neighbours need more features than {found}")


def precision_recall(
    samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"], k: int = 3, batch: int = 1024
) -> PrecisionRecall:
    """Improved precision and recall of Kynkäänniemi et al. (2019), with k-nearest-neighbour balls.

    Precision: the fraction of samples inside the ball of some reference image; recall: of reference images inside the
    ball of some sample. Both depend on the counts: published ones use 50k and k = 3.
    """
    require_features(samples, reference)
    _require_neighbours(k, samples=len(samples), references=len(reference))
    precision = _covered(samples, reference, _radii(reference, k, batch), batch)
    recall = _covered(reference, samples, _radii(samples, k, batch), batch)
    return PrecisionRecall(precision, recall)


def density_coverage(
    samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"], k: int = 5, batch: int = 1024
) -> DensityCoverage:
    """Density and coverage of Naeem et al. (2020), equations 5 and 6, with open balls as in their code.

    Density: the number of reference images in whose balls a sample lies, on average, over k; a crowd of samples at one
    outlier counts little, as that is in few balls. Coverage: the fraction of reference images with a sample in their
    ball. Of two sets of equal size from one distribution coverage is about 1 - 2^-k. Both depend on the counts.
    """
    require_features(samples, reference)
    _require_neighbours(k, references=len(reference))
    if not len(samples):
        raise ValueError("density and coverage need samples, not 0")
    radii, inside, reached = _radii(reference, k, batch), 0, np.zeros(len(reference), bool)
    for _, squared in _squared_distances(samples, reference, batch):
        within = squared < radii
        inside += int(within.sum())
        reached |= within.any(axis=0)
    return DensityCoverage(inside / (k * len(samples)), float(reached.mean()))


def nearest(samples: Rows, training: Shaped[np.ndarray, "m d"], k: int = 1, batch: int = 512) -> Nearest:
    """The k training images nearest to each sample, and how far the first of them is from the rest.

    Which is nearest is found by |x|² + |y|² - 2 xy, and distances are then those of the differences themselves, so that
    a copy is at 0. ValueError where there are fewer than k, or than two, training images.
    """
    require_features(samples, training)
    _require_neighbours(max(k, 1), **{"training images": len(training)})
    indices = _search(samples, training, k, batch, np.full((len(samples), 1), -1.0))
    distances = np.stack([_apart(samples, training[indices[:, i]]) for i in range(k)], axis=1)
    order = distances.argsort(axis=1, kind="stable")
    indices, distances = (np.take_along_axis(array, order, axis=1) for array in (indices, distances))
    found, which = np.unique(indices[:, 0], return_inverse=True)
    centres = training[found]
    same = 1e-12 * np.square(centres.astype(np.float64)).sum(axis=1, keepdims=True)  # rounding of |x|² + |y|² - 2 xy
    own = _apart(centres, training[_search(centres, training, 1, batch, same)[:, 0]])
    return Nearest(indices, distances, own[which])


def _search(x: np.ndarray, y: np.ndarray, k: int, batch: int, same: np.ndarray) -> Int[np.ndarray, "n k"]:
    """Which k rows of `y` are nearest to each row of `x`, of those whose squared distance is above `same` `[n, 1]`."""
    least, numbers = np.full((len(x), k), np.inf), np.zeros((len(x), k), np.int64)
    block = max(k, _NUMBERS // x.shape[1])
    for start in range(0, len(y), block):
        for rows, squared in _squared_distances(x, y[start : start + block], batch):
            squared[squared <= same[rows]] = np.inf
            here = np.broadcast_to(start + np.arange(squared.shape[1]), squared.shape)
            squared, here = (np.concatenate(pair, axis=1) for pair in ((least[rows], squared), (numbers[rows], here)))
            some = np.argpartition(squared, k - 1, axis=1)[:, :k]
            least[rows], numbers[rows] = (np.take_along_axis(array, some, axis=1) for array in (squared, here))
    return numbers


def _apart(x: np.ndarray, y: np.ndarray) -> Float64[np.ndarray, " n"]:
    """|xᵢ - yᵢ|, 1,000 at a time."""
    parts = [
        np.linalg.norm(x[i : i + 1000].astype(np.float64) - y[i : i + 1000].astype(np.float64), axis=1)
        for i in range(0, len(x), 1000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def authenticity(samples: Float[np.ndarray, "n d"], training: Float[np.ndarray, "m d"], batch: int = 512) -> float:
    """The share of samples whose ratio is at least 1, in [0, 1]: no closer to a training image than its next is."""
    return float((nearest(samples, training, batch=batch).ratios >= 1).mean())
