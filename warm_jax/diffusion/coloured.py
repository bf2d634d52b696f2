r"""Processes by their spectrum: noise with a colour, and flow matching along the heat equation.

A colour is a factor c[f] > 0 on the noise of each frequency, s(t)[f] = n(t) c[f]. With P the data's DCT power the
signal-to-noise ratio is SNR_t[f] = a(t)[f]² P[f] / (n(t)² c[f]²), so c decides when a frequency drowns:

| colour | c[f] before scaling | source |
|---|---|---|
| `equal_snr` | √P | every frequency drowns at the same time; Falck et al. 2025, arXiv 2505.11278 |
| `flipped_snr` | √(P[f] / P[reversed f]) | high frequencies last; the same, whose authors could not train it |
| `power_law` | (1 + r)^θ, r = `radial.frequencies` | Scimeca et al. 2025, arXiv 2510.09660 |
| `band` | 1 in a band of frequencies, less outside | the same |

All are scaled so that mean_f(P / c²) = mean_f(P): the mean SNR of every level is that of white noise, and whitened
images x0 / c have the images' own variance. So schedules, σ_d and levels mean in any colour what they mean in white.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from warm_jax.diffusion import bnr, dct, radial
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.process import Process, check_shape

LEAST_POWER = 1e-9  # of the mean: below it a spectrum counts as empty there
Colour = Float64[np.ndarray, "h w"]


def calibrated(colour: Float[np.ndarray, "h w"], power: Power) -> Colour:
    """`colour` times the number with which mean(P / c²) = mean(P)."""
    power = np.asarray(power, np.float64)
    return colour * np.sqrt(np.mean(power / np.square(colour)) / np.mean(power))


def _require_power(power: Power, name: str) -> Float64[np.ndarray, "h w"]:
    power = np.asarray(power, np.float64)
    row, column = np.unravel_index(np.argmin(power), power.shape)
    if not power[row, column] > LEAST_POWER * power.mean():
        raise ValueError(
            f"{name} needs data with power at every frequency; at frequency ({row}, {column}) it is "
            f"{power[row, column]:.3g}, on average {power.mean():.3g}: choose a colour not made of it, as power_law"
        )
    return power


def equal_snr(power: Power) -> Colour:
    """√P. ValueError, naming the frequency, where the data have no power at one."""
    return calibrated(np.sqrt(_require_power(power, "equal_snr")), power)


def flipped_snr(power: Power) -> Colour:
    """√(P[k, l] / P[h-1-k, w-1-l]): each frequency has the SNR that white noise gives its reverse. Errors as above."""
    found = _require_power(power, "flipped_snr")
    return calibrated(np.sqrt(found / found[::-1, ::-1]), power)


def power_law(power: Power, theta: float) -> Colour:
    """(1 + r)^θ, r the frequency in half waves over the longer side. 0 is white, < 0 red; photographs are near -1."""
    return calibrated((1 + radial.frequencies(*power.shape)) ** theta, power)


def band(power: Power, low: float, high: float, floor: float) -> Colour:
    """1 where low ≤ r / N ≤ high, N the longer side, and `floor` in (0, 1] elsewhere; r / N is from 0 to √2.

    0 is no floor: what no noise hides could not be sampled, as it is there in every state.
    """
    if not 0 <= low < high:
        raise ValueError(f"a band needs 0 ≤ band_low < band_high, not band_low={low}, band_high={high}")
    if not 0 < floor <= 1:
        raise ValueError(f"band_floor must lie in (0, 1], not {floor}: without noise a frequency cannot be sampled")
    share = radial.frequencies(*power.shape) / max(power.shape)
    inside = (share >= low) & (share <= high)
    if not inside.any():
        raise ValueError(f"the band from {low} to {high} holds no frequency; those are from 0 to {share.max():.3g}")
    return calibrated(np.where(inside, 1.0, floor), power)


def coloured(white: Process, colour: Float[np.ndarray, "h w"]) -> Process:
    """`white` with its noise in a colour that stays the same along the path; also on another BNR schedule.

    ValueError, naming the frequency, for one that is not finite and above 0.
    """
    if colour.shape != white.image_shape[:2]:
        raise ValueError(f"the colour is of {colour.shape}, the images of {white.image_shape[:2]} frequencies")
    wrong = ~(np.isfinite(colour) & (np.asarray(colour) > 0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"a colour must be finite and above 0; at frequency ({row}, {column}) it is {colour[row, column]}"
        )

    def by_level(t: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(colour, t.dtype)[..., None], (*t.shape, *colour.shape, 1))

    def follow(schedule: bnr.Schedule) -> Process:
        return coloured(white.follow(schedule), colour)

    return dataclasses.replace(white, colour=by_level, follow=None if white.follow is None else follow)


def heat_flow(image_shape: tuple[int, int, int], scale_min: float = 1e-4) -> Process:
    """Heat-dissipation flow matching (arXiv 2605.19371): a = τ τ^(λ/2), s = 1 - τ, with data at τ = 1.

    Here t = 1 - τ, so s = t; a is a scale of 1 - t and a blur of √(-ln(1 - t)) pixels. Levels are uniform, in training
    and on the grid.

    Args:
      image_shape: (height, width, channels).
      scale_min: The least τ, in (0, 1): there sampling starts.
    """
    height, width, _ = image_shape = check_shape(image_shape)
    if not 0 < scale_min < 1:
        raise ValueError(f"scale_min must lie in (0, 1), not {scale_min}; the authors have 1e-4")
    highest = 1 - scale_min

    def attenuation(t: Array) -> Array:
        exponent = 1 + jnp.asarray(dct.squared_frequencies(height, width) / 2, t.dtype)
        return jnp.exp(exponent * jnp.log1p(-t)[..., None, None])[..., None]

    return Process(
        image_shape=image_shape,
        blurs=True,
        blur=lambda t: jnp.sqrt(-jnp.log1p(-t)),
        noise=lambda t: t,
        attenuation=attenuation,
        draw_levels=lambda key, n: highest * (1 - jax.random.uniform(key, (n,), jnp.float32)),
        highest=highest,
        grid=lambda n: np.linspace(highest, 0, n + 1),
    )
