"""What processes do to a data set's frequencies: the signal-to-noise ratio by frequency and level, a table each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from warm_jax.diffusion import radial
from warm_jax.diffusion.process import Process

_LEVELS = 65
_CLEAR = 1e6  # at and above it a frequency counts as clear; also where there is no noise at all


class Ratio(NamedTuple):
    """P a² / s² of one process.

    Attributes:
      levels: t from 0, the clean end, to where sampling starts, evenly spread over the process's own grid.
      k: Frequencies, half waves over the longer side; a ring each, 0 the mean colour.
      ratio: Of the mean power of signal and noise in each ring; at most 10⁶, at least 10⁻⁶.
      drowned: Share of the way from data to noise at which each ring has ratio 1; nan where it never has.
    """

    levels: Float[np.ndarray, " t"]
    k: Float[np.ndarray, " k"]
    ratio: Float[np.ndarray, "t k"]
    drowned: Float[np.ndarray, " k"]


def _levels(process: Process) -> np.ndarray:
    """65 levels, rising; those of a grid that takes no other number of steps are chosen from it."""
    for steps in (_LEVELS - 1, round(process.highest)):
        try:
            return np.interp(np.linspace(0, steps, _LEVELS), np.arange(steps + 1), process.levels(steps)[::-1])
        except ValueError as error:
            reason = error
    raise reason


def ratio(process: Process, power: Float[np.ndarray, "h w"]) -> Ratio:
    """The signal-to-noise ratio of images with the DCT power `power` along `process`."""
    levels = _levels(process)
    t = jnp.asarray(levels, jnp.float32)
    left, noise = (np.asarray(jax.jit(f)(t), np.float64)[..., 0] for f in (process.attenuation, process.deviation))
    height, width = power.shape
    k = np.arange(max(height, width))
    signal, noise = (_rings(values, len(k)) for values in (power * left**2, np.broadcast_to(noise**2, left.shape)))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.clip(np.where(noise > 0, signal / noise, _CLEAR), 1 / _CLEAR, _CLEAR)
    return Ratio(levels, k.astype(np.float64), found, _crossings(np.log(found)))


def _rings(values: Float[np.ndarray, "t h w"], count: int) -> Float[np.ndarray, "t {count}"]:
    rings = radial.ring_means(values, radial.rings(*values.shape[1:]), count - 1)
    return np.concatenate([values[:, :1, 0], rings], axis=1)


def _crossings(log_ratio: Float[np.ndarray, "t k"]) -> Float[np.ndarray, " k"]:
    """Where each column falls through 0, as a share of the rows."""
    share = np.linspace(0, 1, len(log_ratio))
    found = np.full(log_ratio.shape[1], np.nan)
    for j, column in enumerate(log_ratio.T):
        if column.max() >= 0 > column.min():
            i = int(np.argmax(column < 0))  # the first row below; the one before is at 0 or above
            weight = column[i - 1] / (column[i - 1] - column[i])
            found[j] = share[i - 1] + weight * (share[i] - share[i - 1])
    return found
