r"""Which blur and noise a photograph has: as people write it, or estimated from the photograph itself. numpy, float64.

The estimate. Noise is what a wavelet's finest diagonal band holds: median |d| / 0.6745 (Donoho and Johnstone 1994), for
Daubechies' wavelet of four taps. Blur is found in the radial spectrum (`diffusion/radial.py`): photographs have power
A r^s with s near -2.5, blur takes exp(-α² λ) of it, λ = (π r / N)², and noise lays a floor β² under it,

    P(r) = A r^s exp(-α² λ) + β².

A, s, α and β are fitted to ln P over the rings from r = 4 on, robustly, with Gaussian priors: s of -2.5 ± 0.25 (over
few bands slope and blur look alike), and ln β² of the wavelet's ± 0.05. Sharp photographs have by themselves a blur of
about half a pixel, of lens and sampling, and a model's training images had it too: √(α² - 0.5²) is what is reported.

How good that is, measured on the 12 photographs in scikit-image's package, halved to be sharp, blurred (0, 0.5, 1, 1.5,
2 and 3 px), a border cut off, noised and stored in 8 bits, at most 240 pixels a side; 72 estimates a row:

| noise σ, of 255 | mean error of α, px | 90 % below | largest | mean error of ln β |
|---|---|---|---|---|
| 2 | 0.17 | 0.49 | 0.85 | 0.21 (0.02 where α ≥ 1) |
| 10 | 0.19 | 0.45 | 0.87 | 0.05 |
| 25 | 0.26 | 0.58 | 1.18 | 0.04 |
| 50 | 0.31 | 0.72 | 1.13 | 0.07 (clipping at black and white takes some) |

Noise is overestimated where there is little of it over fine texture in a sharp photograph, by a factor of 2 and more at
σ = 2. Both stand on white noise and a Gaussian blur: noise that a camera or JPEG has smoothed is underestimated.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import fft, ndimage, optimize

from warm_jax.diffusion import radial

LEAST_SIDE, MOST_SIDE = 32, 1024  # pixels; of a larger image the middle is looked at
OWN_BLUR = 0.5  # pixels, of photographs that are called sharp
MOST_BLUR = 20.0  # pixels
_DAUBECHIES = np.array([-0.12940952255126037, -0.2241438680420134, 0.8365163037378079, -0.48296291314453416])


class Levels(NamedTuple):
    """A photograph's levels."""

    alpha: float  # standard deviation of the blur, pixels
    beta: float  # standard deviation of the noise, in units of x, where images span [-1, 1]

    def __str__(self) -> str:
        return f"blur {self.alpha:.3g} px, noise {self.beta:.3g} ({self.beta * 127.5:.3g}/255)"


class Given(NamedTuple):
    """Levels that were asked for; None is to be estimated."""

    alpha: float | None
    beta: float | None


AUTO = Given(None, None)


def _number(flag: str, text: str, part: str, what: str, most: float = 1000.0) -> float:
    """`part` of a flag's `text` as a number from 0 to `most`."""
    try:
        value = float(part)
    except ValueError as error:
        raise ValueError(f"--{flag}={text}: {part!r} is no number; give {what}, or auto") from error
    if not 0 <= value <= most:  # also refuses nan
        raise ValueError(f"--{flag}={text}: it must be from 0 to {most:g}; give {what}, or auto")
    return value


def parse(blur: str, noise: str) -> Given:
    """`--blur` in pixels and `--noise` in units of x, or as σ/RANGE (25/255 is 25 of 255 grey levels); each or "auto".

    ValueError names what is wrong.
    """
    alpha = None if blur == "auto" else _number("blur", blur, blur, "its standard deviation in pixels, as 1.5")
    if noise == "auto":
        return Given(alpha, None)
    what = "its standard deviation for pixels in [-1, 1], as 0.2, or in grey levels, as 25/255"
    sigma, slash, full = noise.partition("/")
    if not slash:
        return Given(alpha, _number("noise", noise, sigma, what))
    top = _number("noise", noise, full, what, 65535.0)
    if top == 0:
        raise ValueError(f"--noise={noise}: a range of 0; give {what}, or auto")
    return Given(alpha, 2 * _number("noise", noise, sigma, what, 65535.0) / top)


def wavelet_noise(image: Float[np.ndarray, "h w c"]) -> float:
    """The noise's standard deviation by the median of the finest diagonal wavelet coefficients, rms over channels.

    Where black or white hides all noise, as in the bars of a letterbox, nothing is counted.
    """
    found = []
    for channel in np.moveaxis(np.asarray(image, np.float64), 2, 0):
        d = ndimage.convolve1d(ndimage.convolve1d(channel, _DAUBECHIES, axis=0), _DAUBECHIES, axis=1)
        hidden = [ndimage.minimum_filter(channel == end, 4, origin=-1) for end in (-1, 1)]  # as convolve1d lies
        told = np.abs(d)[2:-2, 2:-2][~(hidden[0] | hidden[1])[2:-2, 2:-2]]
        found.append(np.median(told) / 0.6744897501960817 if told.size else 0.0)
    return float(np.sqrt(np.mean(np.square(found))))


def _middle(image: np.ndarray) -> np.ndarray:
    """At most `MOST_SIDE` pixels of each side, from the middle."""
    top, left = (max(0, n - MOST_SIDE) // 2 for n in image.shape[:2])
    return image[top : top + MOST_SIDE, left : left + MOST_SIDE]


def estimate(image: Float[np.ndarray, "h w c"], given: Given = AUTO, own_blur: float = OWN_BLUR) -> Levels:
    """The blur and the noise of an image in [-1, 1]; what is `given` is taken as it is, and helps with the other.

    `own_blur`: pixels that do not count, of sharp photographs. ValueError for images of less than 32 pixels a side.
    """
    if given.alpha is not None and given.beta is not None:
        return Levels(given.alpha, given.beta)
    if min(image.shape[:2]) < LEAST_SIDE:
        size = f"{image.shape[1]}×{image.shape[0]}"
        raise ValueError(f"{size} pixels tell too little of blur and noise to estimate them; give --blur and --noise")
    middle = _middle(np.asarray(image, np.float64))
    noise = max(wavelet_noise(middle), 1e-4) if given.beta is None else max(given.beta, 1e-6)
    centred = middle - middle.mean((0, 1))
    found = radial.radial(np.mean(fft.dctn(centred, axes=(0, 1), norm="ortho") ** 2, axis=2))
    kept = (found.k >= 4) & (found.power > 1e-12)
    if kept.sum() < 8:  # one colour
        return Levels(given.alpha or 0.0, noise if given.beta is None else given.beta)
    k, ln_power = found.k[kept], np.log(found.power[kept])
    lam, k_middle = (np.pi * k / max(middle.shape[:2])) ** 2, np.exp(np.mean(np.log(k)))
    spread = np.sqrt(4.5 / found.count[kept] + 0.2**2)  # of a ring's mean by chance, and of photographs about the law
    floor = 2 * np.log(noise)

    def misfit(at: np.ndarray) -> np.ndarray:
        intercept, slope, alpha2, ln_beta2 = at
        law = np.logaddexp(intercept + slope * np.log(k / k_middle) - alpha2 * lam, ln_beta2)
        rests = [(slope + 2.5) / 0.25, (ln_beta2 - floor) / (0.05 if given.beta is None else 1e-3)]
        if given.alpha is not None:
            rests.append((alpha2 - given.alpha**2 - own_blur**2) / 1e-3)
        return np.concatenate([(ln_power - law) / spread, rests])

    def fit(alpha: float) -> optimize.OptimizeResult:
        start = [ln_power[0] + 2.5 * np.log(k[0] / k_middle), -2.5, alpha**2, floor]
        # What is given may lie beyond what is looked for.
        bounds = ([-100, -6, 0, -40], [100, 1, max(MOST_BLUR**2, 2 * alpha**2), max(20, floor + 1)])
        return optimize.least_squares(misfit, start, bounds=bounds, x_scale=[1, 0.3, 1, 0.3], loss="soft_l1")

    starts = (0.3, 1.0, 3.0) if given.alpha is None else (max(np.hypot(given.alpha, own_blur), 0.01),)
    best = min((fit(alpha) for alpha in starts), key=lambda result: result.cost).x
    alpha = np.sqrt(max(best[2] - own_blur**2, 0)).item() if given.alpha is None else given.alpha
    return Levels(alpha, np.exp(best[3] / 2).item() if given.beta is None else given.beta)
