r"""Radial spectra: DCT power by frequency alone, and the power law that it follows. numpy, float64.

The frequency of the coefficient (k, l) is r = N √((k/H)² + (l/W)²), N = max(H, W): half waves over the longer side.
Ring i = 0 … holds the coefficients whose r rounds to i. Rings 1 … N - 1 reach from axis to axis; beyond them are only
corners, and ring 0 is the mean brightness.

**The spectral slope** of a data set, wherever one is quoted, is `slope` of the mean DCT power of its channels over the
bands 1 … N / 2. The range is a share of N, so that it means the same at every resolution, where k = 1 … 8 is a quarter
of the spectrum at 32 pixels and a sixteenth at 128. It ends at N / 2 because the finest bands are shaped by cameras,
resizing and compression, and fall faster than the scene does. The channels count alike, as the process corrupts them
alike and `bnr.information_lost` counts them; luma would be another number.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64


class Radial(NamedTuple):
    """A radial spectrum over the rings 1 … N - 1."""

    k: Float64[np.ndarray, " bands"]  # frequency, half waves over the longer side
    power: Float64[np.ndarray, " bands"]  # mean of the ring
    count: Int64[np.ndarray, " bands"]  # coefficients in the ring


class Slope(NamedTuple):
    """power ≈ exp(intercept) · k^value on the bands from `first` to `last`, both in.

    `standard_error` of the value is by the images having been drawn by chance (nan where nothing is known of that);
    `misfit` is how far the bands lie off the law, root mean square of ln power.
    """

    value: float
    standard_error: float
    first: int
    last: int
    intercept: float
    misfit: float


def frequencies(height: int, width: int) -> Float64[np.ndarray, "h w"]:
    """r of each coefficient `[height, width]`."""
    return max(height, width) * np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width)


def rings(height: int, width: int) -> Int64[np.ndarray, "h w"]:
    """The ring of each coefficient `[height, width]`: its frequency, rounded."""
    return np.rint(frequencies(height, width)).astype(np.int64)


def ring_means(
    values: Float[np.ndarray, "*b h w"], ring: Int64[np.ndarray, "h w"], last: int
) -> Float64[np.ndarray, "*b {last}"]:
    """The mean of `values` over each ring 1 … `last`; 0 where a ring holds nothing."""

    def sums(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(ring.ravel(), weights, minlength=last + 1)[1 : last + 1]

    found = np.stack([sums(one.ravel()) for one in values.reshape(-1, *ring.shape)])
    return found.reshape(*values.shape[:-2], last) / np.maximum(sums(None), 1)


def radial(power: Float[np.ndarray, "h w"]) -> Radial:
    """The radial spectrum of the DCT power `[h, w]` (`dct.power`); no bands where both sides are 1 pixel."""
    size, ring = max(power.shape), rings(*power.shape)
    count = np.bincount(ring.ravel(), minlength=size)[1:size]
    return Radial(np.arange(1.0, size), ring_means(power, ring, size - 1), count)


def slope(
    power: Float[np.ndarray, "h w"],
    first: int = 1,
    last: int | None = None,
    covariance: Float[np.ndarray, "bands bands"] | None = None,
) -> Slope:
    """The exponent of the power law nearest to the radial spectrum, least squares in ln power; photographs: about -2.

    Without `first` and `last` *the* slope, as defined above.

    A ring is as wide as one step of frequency, and the mean of r^s over the lowest is not k^s (7 % off at k = 1, s =
    -2). So the bands are compared with the ring means of r^s: a pure power law is found exactly. Gauss-Newton.

    Args:
      power: The data's DCT power `[h, w]`.
      first: The first band, ≥ 1.
      last: The last band; None: N / 2, or 3 where that is less.
      covariance: Of the mean power of the bands 1 … N - 1 over the images that it was measured on; it gives the
        standard error.

    Returns:
      All nan where fewer than 3 of the bands have power.
    """
    found = radial(power)
    last = min(last or max(3, max(power.shape) // 2), len(found.k))
    chosen = (found.k >= first) & (found.k <= last) & (found.power > 0)
    if chosen.sum() < 3:
        return Slope(np.nan, np.nan, first, last, np.nan, np.nan)
    r, ring = frequencies(*power.shape), rings(*power.shape)
    r[0, 0] = 1  # in ring 0, which no band holds
    value, target = -2.0, np.log(found.power[chosen])
    for _ in range(50):
        law, derivative = ring_means(np.stack([r**value, r**value * np.log(r)]), ring, len(chosen))[:, chosen]
        derivative = derivative / law
        centred = derivative - derivative.mean()
        weights = centred / np.sum(centred**2)  # what a change of each ln power does to the exponent
        step = weights @ (target - np.log(law))
        value += step
        if abs(step) < 1e-12:
            break
    rest = target - np.log(ring_means(r**value, ring, len(chosen))[chosen])
    error = np.nan
    if covariance is not None:
        weights = weights / found.power[chosen]
        error = np.sqrt(weights @ covariance[np.ix_(chosen, chosen)] @ weights)
    return Slope(float(value), float(error), first, last, float(rest.mean()), float(rest.std()))
