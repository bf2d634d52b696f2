r"""Selecting the BNR: where noise swallows the data's spectrum, where blur removes it, and what blur costs.

Images have power ∝ 1/f², noise of level β is flat: it swallows the bands above the frequency where P(k) = β², which is
∝ 1/β. Blur of α pixels halves the power at λ = ln 2 / α², which is ∝ 1/α. So at exactly 1/f² a
constant ratio BNR = α / β keeps the two cut-offs at a constant distance (at another slope they drift apart slowly), and
blur costs little as long as its own lies above the noise's. How little is `bnr.information_lost`.

**The recommended BNR** of a data set is the largest constant ratio whose loss stays within a budget at every level that
matters. The loss grows with α, so it is the least ratio that `bnr.information_budget` allows at any of them. Which
levels matter is an argument. By default `LEVELS`: one standard deviation of ln β about the mean of EDM's training
levels, ln β ~ N(-1.2, 1.2²), β = 0.09 to 1. On images the loss at a constant ratio grows with β over that range, so it
is the upper end that decides, and levels below, where fine detail is drawn, would change nothing. Above it noise has
left only some per cent of the information that it leaves at the lower end (`Spectra.information` has it for each):
there even a blur that takes most of it costs few nats.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from warm_jax.diffusion import bnr, dct
from warm_jax.diffusion.radial import Radial, Slope, radial, ring_means, rings, slope
from warm_jax.runtime import pictures, rounding

__all__ = [
    "LEVELS",
    "Measured",
    "Radial",
    "Slope",
    "Spectra",
    "measure",
    "radial",
    "recommended_bnr",
    "slope",
    "slope_in_words",
    "spectra",
]

LEVELS = (math.exp(-2.4), 1.0)  # EDM's training levels, ln β ~ N(-1.2, 1.2²): mean ± one standard deviation
Numbers = Float[np.ndarray, " n"] | tuple[float | int, ...]
_GRID = np.geomspace(0.01, 80, 91)  # levels of the curves


class Measured(NamedTuple):
    """What a pass over images finds; pixels on [-1, 1]."""

    count: int  # images
    power: Float64[np.ndarray, "h w"]  # mean DCT power
    covariance: Float64[np.ndarray, "bands bands"]  # of the mean powers of the bands 1 … N - 1; nan for one image


class Spectra(NamedTuple):
    """Plain numpy, for `np.savez` and `plots.spectra`. Frequencies k in half waves over the longer side."""

    k: Float64[np.ndarray, " bands"]
    power: Float64[np.ndarray, " bands"]  # the data's radial spectrum
    standard_error: Float64[np.ndarray, " bands"]  # of it, over images; nan if not known
    slope: np.ndarray  # power ≈ exp(intercept) · k^slope …
    slope_error: np.ndarray  # … its standard error; nan if not known
    slope_bands: np.ndarray  # … the first and the last band that it was fitted to
    slope_misfit: np.ndarray  # … root mean square distance of ln power
    intercept: np.ndarray
    bnrs: Float64[np.ndarray, " bnr"]
    betas: Float64[np.ndarray, " beta"]
    blurred: Float64[np.ndarray, "bnr beta bands"]  # spectrum of B_α x0, α = BNR · β; noise is flat at β²
    grid: Float64[np.ndarray, " level"]  # levels β of the curves below
    noise_cutoff: Float64[
        np.ndarray, " level"
    ]  # k where P(k) falls under β²; nan where no band is under it, or all are
    blur_cutoff: Float64[np.ndarray, "bnr level"]  # k of which blur leaves half the power; inf without blur
    information: Float64[np.ndarray, " level"]  # I(β, 0), nats a channel
    lost: Float64[np.ndarray, "bnr level"]  # share of it that blur removes
    budget: np.ndarray
    levels: Float64[np.ndarray, "2"]  # the lowest and the highest level that matter
    scheduled: Float64[np.ndarray, " level"]  # BNR of `bnr.information_budget`
    recommended: np.ndarray  # largest constant BNR within the budget at all levels that matter, or inf
    binding: np.ndarray  # the level at which it spends the budget

    @property
    def law(self) -> Slope:
        """The power law, from the fields that hold it."""
        first, last = self.slope_bands.tolist()
        values = (self.slope, self.slope_error, self.intercept, self.slope_misfit)
        slope, error, intercept, misfit = (value.item() for value in values)
        return Slope(slope, error, first, last, intercept, misfit)


def slope_in_words(law: Slope) -> str:
    """A slope with its error and the bands that it was fitted to; that there is none, where it is nan."""
    if not math.isfinite(law.value):
        return "too few bands for a slope"
    return f"slope {rounding.with_error(law.value, law.standard_error)}, fitted to k = {law.first} to {law.last}"


@jax.jit
def _sums(images: UInt8[Array, "n h w c"]) -> tuple[Float[Array, "h w"], Float[Array, "bands bands"]]:
    """Over images: the sum of DCT power, and of the products of each two band powers."""
    n, height, width, _ = images.shape
    squares = jnp.mean(jnp.square(dct.dct2(pictures.from_uint8(images))), axis=-1)
    ring, bands = rings(height, width), max(height, width) - 1
    share = 1 / np.maximum(np.bincount(ring.ravel(), minlength=bands + 1), 1)[1 : bands + 1]
    total = jax.ops.segment_sum(squares.reshape(n, -1).T, ring.ravel(), int(ring.max()) + 1)[1 : bands + 1]
    means = total * jnp.asarray(share, total.dtype)[:, None]
    return jnp.sum(squares, axis=0), jnp.matmul(means, means.T, precision=jax.lax.Precision.HIGHEST)


def measure(batches: Iterable[UInt8[np.ndarray, "_ h w c"]]) -> Measured:
    """One pass over images of one shape, in batches (say 1000; compiled once for each size of batch).

    The covariance is the scatter of single images about their mean, over their number: no model of the images.
    ValueError where there are none.
    """
    sums, count = [], 0
    for images in batches:
        count += len(images)
        sums.append(_sums(images))
    if not count:
        raise ValueError("no images to measure the spectrum of")
    power, products = (np.sum([np.asarray(s[i], np.float64) for s in sums], axis=0) / count for i in (0, 1))
    mean = radial(power).power
    covariance = (products - np.outer(mean, mean)) / (count - 1) if count > 1 else np.full_like(products, np.nan)
    return Measured(count, power, covariance)


def check_power(power: np.ndarray) -> None:
    """ValueError unless it is the DCT power of something."""
    if power.ndim != 2 or not np.isfinite(power).all() or power.min() < 0 or power.sum() == 0:
        raise ValueError(f"a DCT power has shape [h, w], finite values ≥ 0 and not all 0; this one: {power.shape}")


def check_levels(betas: Numbers) -> Float64[np.ndarray, " n"]:
    """Noise levels as float64; ValueError unless there are some, each finite and above 0."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & np.isfinite(betas)):
        raise ValueError(f"noise levels must be a list of finite numbers above 0, not {betas.tolist()}")
    return betas


def check_ratios(bnrs: Numbers) -> Float64[np.ndarray, " n"]:
    """Blur-to-noise ratios as float64; ValueError unless there are some, each finite and at least 0."""
    ratios = np.asarray(bnrs, np.float64)
    if not len(ratios) or not np.all((ratios >= 0) & np.isfinite(ratios)):
        raise ValueError(f"blur-to-noise ratios must be a list of finite numbers of at least 0, not {ratios.tolist()}")
    return ratios


@functools.partial(jax.jit, static_argnames="budget")
def _blur_within(power: Float[Array, "h w"], betas: Float[Array, " n"], budget: float) -> Float[Array, " n"]:
    return bnr.information_budget(power, budget)(betas)


def _scheduled(power: np.ndarray, budget: float, betas: np.ndarray) -> np.ndarray:
    """BNR(β) of the information budget, which ends at a blur of 2·max(h, w) pixels."""
    alphas = _blur_within(jnp.asarray(power, jnp.float32), jnp.asarray(betas, jnp.float32), budget)
    return np.asarray(alphas, np.float64) / betas


def _allowed(power: np.ndarray, budget: float, betas: np.ndarray) -> np.ndarray:
    """The largest BNR within the budget at each level; inf where all but the mean may be blurred away."""
    snr = power / np.square(betas)[:, None, None]
    all_lost = 1 - np.log1p(snr[:, 0, 0]) / np.sum(np.log1p(snr), axis=(1, 2))
    return np.where(all_lost <= budget, np.inf, _scheduled(power, budget, betas))


def recommended_bnr(power: Float[np.ndarray, "h w"], budget: float, betas: Numbers) -> float:
    """The largest constant BNR that loses no more than the share `budget`, in (0, 1), of the information at any β.

    `betas` are levels above 0; give a range of them as a grid. inf where all but the mean may go at every level.
    """
    check_power(power)
    return float(_allowed(power, budget, check_levels(betas)).min())


def _crossings(found: Radial, betas: np.ndarray) -> np.ndarray:
    """The k above which all bands have less power than β²; nan where all bands have more, or none has.

    Between bands the spectrum is taken as a power law. The last crossing, not the first: a set of symmetric objects has
    less power at k = 1 than at 2.
    """
    cutoffs = np.full(len(betas), np.nan)
    log_k, log_power = np.log(found.k), np.log(np.maximum(found.power, np.finfo(np.float64).tiny))
    for i, level in enumerate(2 * np.log(betas)):
        above = np.flatnonzero(log_power >= level)
        if len(above) and above[-1] + 1 < len(log_k):
            j = above[-1]
            part = (log_power[j] - level) / (log_power[j] - log_power[j + 1])
            cutoffs[i] = np.exp(log_k[j] + part * (log_k[j + 1] - log_k[j]))
    return cutoffs


def spectra(
    power: Float[np.ndarray, "h w"],
    bnrs: Numbers,
    betas: Numbers,
    budget: float = 0.05,
    levels: tuple[float | int, float | int] = LEVELS,
    covariance: Float[np.ndarray, "bands bands"] | None = None,
) -> Spectra:
    """Everything that "selecting the BNR" shows.

    Args:
      power: The data's DCT power (`measure`, `dct.power`), pixels on [-1, 1].
      bnrs: Ratios to compare, finite and ≥ 0.
      betas: The few noise levels at which spectra are shown, > 0.
      budget: Share of the information that blur may cost, in (0, 1).
      levels: The lowest and the highest noise level that matter; see above.
      covariance: `measure`'s, for standard errors.
    """
    check_power(power)
    if power.ravel()[1:].max(initial=0.0) == 0:
        raise ValueError("all images are of plain colours: their spectrum has nothing but the mean")
    betas, ratios, (low, high) = check_levels(betas), check_ratios(bnrs), levels
    if max(power.shape) < 3:
        raise ValueError(
            f"images of {power.shape[0]}×{power.shape[1]} pixels have no spectrum; 3 on a side are the least"
        )
    if not 0 < low < high < math.inf:
        raise ValueError(f"the levels that matter must be 0 < lowest < highest, not {low} and {high}")
    (height, width), size, found = power.shape, max(power.shape), radial(power)
    law = slope(power, covariance=covariance)
    error = np.full(len(found.k), np.nan) if covariance is None else np.sqrt(np.maximum(np.diag(covariance), 0))
    alphas = ratios[:, None] * betas
    left = np.exp(-np.square(alphas)[..., None, None] * dct.squared_frequencies(height, width))
    grid, alpha = _GRID, ratios[:, None] * _GRID
    matter = np.geomspace(low, high, len(_GRID))
    allowed = _allowed(power, budget, matter)
    with np.errstate(divide="ignore"):
        blur_cutoff = size * math.sqrt(math.log(2)) / (math.pi * alpha)
    return Spectra(
        k=found.k,
        power=found.power,
        standard_error=error,
        slope=np.asarray(law.value),
        slope_error=np.asarray(law.standard_error),
        slope_bands=np.asarray([law.first, law.last]),
        slope_misfit=np.asarray(law.misfit),
        intercept=np.asarray(law.intercept),
        bnrs=ratios,
        betas=betas,
        blurred=ring_means(power * left, rings(height, width), size - 1),
        grid=grid,
        noise_cutoff=_crossings(found, grid),
        blur_cutoff=blur_cutoff,
        information=0.5 * np.sum(np.log1p(power / np.square(grid)[:, None, None]), axis=(1, 2)),
        lost=np.asarray(bnr.information_lost(power, jnp.asarray(alpha), jnp.asarray(grid)), np.float64),
        budget=np.asarray(budget),
        levels=np.asarray(levels, np.float64),
        scheduled=_scheduled(power, budget, grid),
        recommended=np.asarray(allowed.min()),
        binding=np.asarray(matter[np.argmin(allowed)]),
    )
