r"""Fréchet distance of two sets of features (Heusel et al. 2017, equation 6), its bias at finite counts, its name.

Between Gaussians with the same moments,

    d² = |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½ ,

and with Σ₂ = LLᵀ the last trace is the sum of the square roots of the eigenvalues of the symmetric LᵀΣ₁L, which are
those of Σ₁Σ₂. So a Cholesky factor and one symmetric eigenproblem do, no matrix square root, no complex numbers and no
ε on the diagonal of singular covariances. FID is d² (not d) with the features of Inception-v3 of 2015-12-05; with any
other features it is another number.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from warm_jax.metrics.moments import Moments, moments

INCEPTION = "inception_2015_12_05"


def score_name(metric: str, extractor: str, count: int) -> str:
    """`fid50k` for ("fid", INCEPTION, 50_000); with another extractor `fd_<extractor>_50k`, `kid_<extractor>_50k`."""
    if count < 1:
        raise ValueError(f"a score of {count} images has no name")
    counted = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    if extractor == INCEPTION:
        return f"{metric}{counted}"
    return f"{'fd' if metric == 'fid' else metric}_{extractor}_{counted}"


def _factor(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """L with LLᵀ = Σ: Cholesky's, or, of a singular Σ, that of the eigenvectors at ten times the cost."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        pass
    values, vectors = scipy.linalg.eigh(covariance, driver="evd")
    if values[0] < -1e-3 * abs(values[-1]):
        raise ValueError(f"not a covariance: its eigenvalues reach from {values[0]:.3g} to {values[-1]:.3g}")
    return vectors * np.sqrt(np.clip(values, 0, None))


def _distance(a: Moments, b: Moments, factor: Float64[np.ndarray, "d d"]) -> float:
    values = scipy.linalg.eigvalsh(factor.T @ a.covariance @ factor, driver="evd")
    cross = np.sqrt(np.clip(values, 0, None)).sum()
    squared = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(squared), 0.0)  # equal moments leave a rounding error of either sign


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance d² ≥ 0, in squared units of the features; symmetric."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of dimension {a.mean.size} and of {b.mean.size} have no distance")
    return _distance(a, b, _factor(b.covariance))


def expected_bias(population: Moments, count: int) -> float:
    r"""What a *perfect* sampler scores on average at `count` images, to first order in 1/n: the floor of a score.

    Σ̂ = Σ + H differs from Σ by d² ≈ ½ Σᵢⱼ Hᵢⱼ²/(λᵢ+λⱼ) in the eigenbasis of Σ, and Gaussian features have
    E Hᵢⱼ² = λᵢλⱼ(1 + δᵢⱼ)/n, so

        E d² ≈ (1/n) [ tr Σ + ½ Σᵢⱼ λᵢλⱼ (1 + δᵢⱼ) / (λᵢ + λⱼ) ] .

    The expansion needs n well above the dimension, and features with heavier tails than a Gaussian's have a higher
    floor. A reference of finite count adds the same with its own n.
    """
    if count < 2:
        raise ValueError(f"the bias of {count} images is not defined")
    values = np.clip(scipy.linalg.eigvalsh(population.covariance, driver="evd"), 0, None)
    sums = values[:, None] + values
    pairs = np.divide(np.outer(values, values), sums, out=np.zeros_like(sums), where=sums > 0)
    return float((values.sum() + 0.5 * (pairs.sum() + np.trace(pairs))) / count)


class Extrapolated(NamedTuple):
    """The value at infinitely many images, the slope in 1/n (d² ≈ value + slope/n), and the fit's RMS residual."""

    value: float
    slope: float
    residual: float


def frechet_infinity(
    features: Float[np.ndarray, "n d"], reference: Moments, points: int = 15, seed: int = 0
) -> Extrapolated:
    """FID∞ of Chong and Forsyth (2020): a line through d² over 1/n for random subsets of n/10 … n images.

    Needs 20 images at least, and far more than the dimension to mean something. Removes the bias of the sample's
    count, not that of the reference's.
    """
    n = len(features)
    if n < 20 or points < 2:
        raise ValueError(f"an extrapolation needs at least 20 images and 2 points, not {n} and {points}")
    rng = np.random.default_rng(seed)
    factor = _factor(reference.covariance)
    counts = np.linspace(n // 10, n, points).round().astype(int)
    values = [_distance(moments(features[rng.choice(n, m, replace=False)]), reference, factor) for m in counts]
    slope, value = np.polyfit(1 / counts, values, 1)
    residual = np.sqrt(np.mean((np.polyval([slope, value], 1 / counts) - values) ** 2))
    return Extrapolated(float(value), float(slope), float(residual))


def cautions(samples: Moments, reference: Moments) -> list[str]:
    """Sentences that must stand beside the distance: few images, images all alike, a silent reference. Often none."""
    said = []
    dim = samples.mean.size
    if np.trace(samples.covariance) <= 1e-12 * max(np.trace(reference.covariance), 1e-300):
        said.append("all samples have the same features: are the images identical?")
    if samples.count is not None and samples.count <= dim:
        said.append(
            f"{samples.count} images for {dim} features: the covariance is singular and the distance biased upwards;"
            " prefer the kernel distance"
        )
    elif samples.count is not None and samples.count < 10 * dim:
        floor = expected_bias(reference, samples.count)
        if reference.count is not None:
            floor += expected_bias(reference, reference.count)
        said.append(f"a perfect sampler would score about {floor:.3g} at {samples.count} images")
    if reference.count is None:
        said.append("the reference does not say its count or its extractor")
    return said
