"""One image along the corruption, for several BNRs: what the network sees, and the two targets that it has to find."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.analysis.spectra import Numbers, check_levels
from warm_jax.diffusion import bnr, process


class Corruption(NamedTuple):
    """Plain numpy, a row for each BNR and a column for each level; residual + blurred is the image."""

    image: Float[np.ndarray, "h w c"]
    bnrs: Float[np.ndarray, " bnr"]  # inf: blur alone
    levels: Float[np.ndarray, " level"]  # the noise levels asked for
    alphas: Float[np.ndarray, "bnr level"]  # blur, pixels
    betas: Float[np.ndarray, "bnr level"]  # noise: `levels`, but 0 for blur alone
    states: Float[np.ndarray, "bnr level h w c"]  # x = B_α x0 + β ε
    blurred: Float[np.ndarray, "bnr level h w c"]  # D = B_α x0
    residual: Float[np.ndarray, "bnr level h w c"]  # R = x0 - D


def corruption(
    key: PRNGKeyArray,
    image: Float[np.ndarray, "h w c"] | Float[Array, "h w c"],
    bnrs: Numbers,
    betas: Numbers,
) -> Corruption:
    """`image` (on [-1, 1]) at each BNR and noise level, by `Process.corrupt`; the same noise in each row.

    BNR ∞ is blur without noise. A level then says nothing of the blur, so it takes the α of the largest finite BNR of
    the list, and shows what that row's states are without their noise: the limit in which noise vanishes and the blurs
    stay. ValueError where no finite BNR is above 0, or for a BNR that is negative or not a number.
    """
    levels, ratios = check_levels(betas), np.asarray(bnrs, np.float64)
    if not len(ratios) or not np.all(ratios >= 0):
        raise ValueError(f"blur-to-noise ratios must be a list of numbers of at least 0, not {ratios.tolist()}")
    finite = ratios[np.isfinite(ratios)]
    largest = finite.max(initial=0.0)
    if len(finite) < len(ratios) and not largest > 0:
        raise ValueError(f"BNR ∞ blurs as the largest finite BNR does, so one must be above 0: {ratios.tolist()}")
    x0 = jnp.broadcast_to(jnp.asarray(image, jnp.float32), (len(levels), *image.shape))
    t, rows = jnp.asarray(levels, jnp.float32), []
    for ratio in ratios:
        kind = process.warm(image.shape, bnr.constant(float(min(ratio, largest))))
        x, blurred, residual = kind.corrupt(key, x0, t)
        rows.append((x if np.isfinite(ratio) else blurred, blurred, residual))
    states, blurred, residual = (np.stack([np.asarray(row[i]) for row in rows]) for i in range(3))
    return Corruption(
        image=np.asarray(image),
        bnrs=ratios,
        levels=levels,
        alphas=np.minimum(ratios, largest)[:, None] * levels,
        betas=np.where(np.isfinite(ratios)[:, None], levels, 0.0),
        states=states,
        blurred=blurred,
        residual=residual,
    )
