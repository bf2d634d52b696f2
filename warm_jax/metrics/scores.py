"""Scores of a set of samples, from features, logits or pixels: numpy float64, arrays in, numbers out.

The Fréchet distance has its own file, `frechet`, and so has what nearest neighbours tell, `neighbours`. Everything
random takes a seed and draws from numpy's PCG64, so a score is a function of its arguments. Names:
`frechet.score_name`.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.special
from jaxtyping import Float, Float64, Shaped, UInt8

from warm_jax.diffusion import radial


class Estimate(NamedTuple):
    """A value and the standard deviation over the splits or subsets that it is the mean of."""

    value: float
    std: float


def require_features(samples: np.ndarray, reference: np.ndarray) -> None:
    """Raises ValueError where the two are of different shapes, or hold what is not finite."""
    if samples.shape[1:] != reference.shape[1:]:
        raise ValueError(f"samples have shape {samples.shape[1:]} each, the reference {reference.shape[1:]}")
    for name, array in (("samples", samples), ("reference", reference)):
        if not np.isfinite(array).all():
            raise ValueError(f"the {name} hold NaN or infinite values")


def inception_score(logits: Float[np.ndarray, "n classes"], splits: int = 10, shuffle: int | None = None) -> Estimate:
    """exp E KL(p(y|x) ‖ p(y)) of Salimans et al. (2016), in [1, classes]: mean and std over equal splits.

    The splits are contiguous, as EDM's and the first scores have them, so samples sorted by class score lower. With
    `shuffle`, a seed, they are drawn at random, as torch-fidelity's: for samples whose order is not that of seeds.
    Published scores also leave out the bias of Inception's last layer: pass `logits_unbiased`.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"{n} images cannot be cut into {splits} splits")
    if not np.isfinite(logits).all():
        raise ValueError("the logits hold NaN or infinite values")
    if shuffle is not None:
        logits = logits[np.random.default_rng(shuffle).permutation(n)]
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    scores = []
    for part in (log_p[i * n // splits : (i + 1) * n // splits] for i in range(splits)):
        log_marginal = scipy.special.logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(part) * (part - log_marginal), axis=1))))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> float:
    """Unbiased squared MMD with the kernel k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018, equation 4).

    Its mean is zero for equal distributions at every n, m ≥ 2, so it is negative about half the time then. Memory: n ×
    m floats.
    """
    require_features(samples, reference)
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        raise ValueError(f"the unbiased estimate needs 2 features on both sides, not {n} and {m}")
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kid(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Kernel Inception Distance: `kernel_distance` over random subsets (each without replacement), mean and std.

    The std is that of one subset, as published; the mean's own is smaller. Literature often prints KID × 1000: this is
    not. ValueError if a set is smaller than a subset.
    """
    if subset_size > min(len(samples), len(reference)):
        raise ValueError(f"subsets of {subset_size} need as many: {len(samples)} samples, {len(reference)} references")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        values.append(kernel_distance(x, y))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def sliced_wasserstein(
    samples: Shaped[np.ndarray, "n ..."], reference: Shaped[np.ndarray, "m ..."], projections: int = 512, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015) of flattened images.

    The root of the mean of W₂² over random directions. In units of the input, ≥ 0; a shift of all pixels by v gives
    |v|/√dim. Exact on each line, also for n ≠ m. Not the SWD of Karras et al. (2018), which compares patches of a
    Laplacian pyramid.
    """
    require_features(samples, reference)
    x, y = samples.reshape(len(samples), -1), reference.reshape(len(reference), -1)
    if not len(x) or not len(y) or projections < 1:
        raise ValueError(f"nothing to compare: {len(x)} samples, {len(y)} references, {projections} directions")
    directions = np.random.default_rng(seed).standard_normal((x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    x = np.sort(x.astype(np.float64) @ directions, axis=0)
    y = np.sort(y.astype(np.float64) @ directions, axis=0)
    # Both quantile functions are steps: between consecutive levels of the union of their jumps they are constant. The
    # jumps i/n and j/m are counted in units of 1/(nm), where they are whole numbers.
    n, m = len(x), len(y)
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    gaps = np.square(x[edges[:-1] // m] - y[edges[:-1] // n])
    return float(np.sqrt(np.mean(np.diff(edges) @ gaps / (n * m))))


def radial_power(images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"]) -> Float64[np.ndarray, " bands"]:
    """Mean orthonormal-DCT power in rings of equal frequency, over images and channels; in squared grey levels.

    Band i = 1 … N, N = max(H, W), holds the frequencies that round to i half-periods over the longer side, the last
    also the corners beyond. Band 0, the mean brightness, is left out: entry 0 of the result is band 1.
    """
    n, height, width, _ = images.shape
    if n < 1 or max(height, width) < 2:
        raise ValueError(f"no spectrum of images {images.shape}")
    size = max(height, width)
    band = np.minimum(radial.rings(height, width), size)
    power = np.zeros((height, width))
    for start in range(0, n, 1024):
        chunk = images[start : start + 1024].astype(np.float64)
        power += np.square(scipy.fft.dctn(chunk, axes=(1, 2), norm="ortho")).mean(axis=3).sum(axis=0)
    return radial.ring_means(power / n, band, size)


def decibels(
    power: Float64[np.ndarray, " bands"], reference: Float64[np.ndarray, " others"], floor: float = 1 / 12
) -> Float64[np.ndarray, " bands"]:
    """10 log₁₀ of the ratio of two radial powers, band by band: positive where the samples have too much, in dB.

    `floor`, the power of rounding to whole grey levels, is added to both: below it an 8-bit image tells nothing.
    """
    if power.shape != reference.shape:
        raise ValueError(f"spectra of {power.size} and of {reference.size} bands: the images differ in size")
    return 10 * np.log10((power + floor) / (reference + floor))


def log_spectral_distance(power: Float64[np.ndarray, " bands"], reference: Float64[np.ndarray, " others"]) -> float:
    """Root mean square over bands of `decibels`, in dB, ≥ 0: 3 for half or double the power in every band.

    The log-spectral distance of speech coding (Gray and Markel 1976) on the ring means of image spectra.
    """
    return float(np.sqrt(np.mean(np.square(decibels(power, reference)))))
