r"""What the two heads have to learn: the energy of their targets, and how much of it is explained.

The image is x0 = D + R, and the state x = D + β ε. In the DCT basis, with a = a_α[f] and the data's power P[f], the
targets have the energies (Parseval)

    E|D|² = Σ a² P      E|R|² = Σ (1 - a)² P      2 E<D, R> = Σ 2 a (1 - a) P      their sum: E|x0|² = Σ P        (1)

but energy is not work: at low noise x itself says nearly all of D. What the best linear prediction K_D x, K_R x
(Wiener filters) cannot say is, with V = P β² / (P a² + β²), the posterior variance of x0 for Gaussian data,

    E|D - K_D x|² = Σ a² V      E|R - K_R x|² = Σ (1 - a)² V      E|x0 - (K_D + K_R) x|² = Σ V                  (2)

**The task** at a level is that last sum, what is not known of x0 when x is seen, and a head's part of it is the
covariance of the head's error with the whole error, which adds up to all of it:

    denoising: Σ a V / Σ V      deblurring: Σ (1 - a) V / Σ V                                                   (3)

A predictor of any kind has the same numbers, measured on corrupted images: `explained`. Energies are means over pixels
and channels, and about zero: who knows the mean image explains some, and a linear guess does not know it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from warm_jax.analysis.spectra import Numbers, check_levels, check_power, check_ratios
from warm_jax.diffusion import dct
from warm_jax.diffusion.process import Predict, Process


class Learning(NamedTuple):
    """The linear part, in closed form; plain numpy. Means over pixels and channels."""

    bnrs: Float64[np.ndarray, " bnr"]
    betas: Float64[np.ndarray, " beta"]
    clean: np.ndarray  # E|x0|²
    blurred: Float64[np.ndarray, "bnr beta"]  # E|D|²
    residual: Float64[np.ndarray, "bnr beta"]  # E|R|²
    cross: Float64[np.ndarray, "bnr beta"]  # 2 E<D, R>
    clean_error: Float64[np.ndarray, "bnr beta"]  # left of x0 by linear prediction (2)
    blurred_error: Float64[np.ndarray, "bnr beta"]  # left of D
    residual_error: Float64[np.ndarray, "bnr beta"]  # left of R
    blurred_explained: Float64[np.ndarray, "bnr beta"]  # 1 - error / energy
    residual_explained: Float64[np.ndarray, "bnr beta"]  # nan where R is 0
    deblurring: Float64[np.ndarray, "bnr beta"]  # part of the task that is the deblurring head's (3); 0 to 1


class Explained(NamedTuple):
    """The same of a predictor, measured; a value for each noise level. `_se`: standard error over the images."""

    count: np.ndarray  # images
    alphas: Float64[np.ndarray, " beta"]  # blur, pixels; BNR = alphas / betas
    betas: Float64[np.ndarray, " beta"]  # noise
    blurred: Float64[np.ndarray, " beta"]
    residual: Float64[np.ndarray, " beta"]
    clean_error: Float64[np.ndarray, " beta"]
    blurred_error: Float64[np.ndarray, " beta"]
    residual_error: Float64[np.ndarray, " beta"]
    blurred_explained: Float64[np.ndarray, " beta"]
    blurred_explained_se: Float64[np.ndarray, " beta"]
    residual_explained: Float64[np.ndarray, " beta"]  # nan where R is 0; below 0: worse than to say nothing
    residual_explained_se: Float64[np.ndarray, " beta"]
    deblurring: Float64[np.ndarray, " beta"]
    deblurring_se: Float64[np.ndarray, " beta"]


_ROUNDING = 1e-12  # share of the image's energy below which a float32 residual is the rounding of two DCTs


def _over(part: np.ndarray, whole: np.ndarray, least: float | np.ndarray = 0.0) -> np.ndarray:
    """part / whole, nan where the whole is not above `least`."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > least)


def learning(
    power: Float[np.ndarray, "h w"],
    bnrs: Numbers,
    betas: Numbers,
) -> Learning:
    """Equations (1) to (3) in float64, for constant BNRs (finite, ≥ 0) at noise levels > 0; `power` as `dct.power`."""
    check_power(power)
    betas, ratios = check_levels(betas), check_ratios(bnrs)
    exponent = np.square(ratios[:, None] * betas)[..., None, None] * dct.squared_frequencies(*power.shape) / 2
    a, gone = np.exp(-exponent), -np.expm1(-exponent)  # 1 - a without cancellation
    noise, p = np.square(betas)[:, None, None], np.asarray(power, np.float64)
    variance = p * noise / (p * a**2 + noise)

    def mean(values: np.ndarray) -> np.ndarray:
        return values.mean(axis=(-2, -1))

    blurred, residual = mean(a**2 * p), mean(gone**2 * p)
    blurred_error, residual_error = mean(a**2 * variance), mean(gone**2 * variance)
    return Learning(
        bnrs=ratios,
        betas=betas,
        clean=np.asarray(p.mean()),
        blurred=blurred,
        residual=residual,
        cross=mean(2 * a * gone * p),
        clean_error=mean(variance),
        blurred_error=blurred_error,
        residual_error=residual_error,
        blurred_explained=1 - _over(blurred_error, blurred),
        residual_explained=1 - _over(residual_error, residual),
        deblurring=mean(gone * variance) / mean(variance),
    )


def _ratio(part: np.ndarray, whole: np.ndarray, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Σ part / Σ whole over images (the last axis), and its standard error by the delta method; `least` as `_over`."""
    ratio = _over(part.mean(-1), whole.mean(-1), least)
    spread = np.sqrt(np.mean(np.square(part - ratio[..., None] * whole), axis=-1) / max(part.shape[-1] - 1, 1))
    return ratio, _over(spread, whole.mean(-1), least)


def explained(
    key: PRNGKeyArray,
    predict: Predict | jax.tree_util.Partial,
    process: Process,
    images: Float[np.ndarray, "n h w c"] | Float[Array, "n h w c"],
    betas: Numbers,
    *,
    labels: Float[np.ndarray, "n classes"] | Float[Array, "n classes"] | None = None,
    batch_size: int = 64,
) -> Explained:
    """Corrupts each image (on [-1, 1]) at each level and sees what `predict` makes of it; compiled once.

    Args:
      key: Of the noise: a function of key, image and level, whatever the batch size.
      predict: Any predictor of `process`. As a `jax.tree_util.Partial` its arrays are handed to the compiled program; a
        plain function's become constants of it, which is slow for a large network.
      process: One whose levels are noise levels (hot, warm, PFGM++, an amortised one at its BNR).
      betas: Noise levels > 0.
      labels: One-hot classes, handed to `predict` as a third argument.
      batch_size: Images at a time.
    """
    betas, n = check_levels(betas), len(images)
    if not n or batch_size < 1:
        raise ValueError(f"nothing to measure: {n} images in batches of {batch_size}")
    size = min(batch_size, n)
    rows = np.minimum(np.arange(-(-n // size) * size), n - 1).reshape(-1, size)  # the last image fills the last batch

    @jax.jit
    def run(predict, key, images, labels, levels):
        def batch(level: Array, level_key: PRNGKeyArray, row: Array) -> Array:
            x0, t = images[row].astype(jnp.float32), jnp.full(size, level)
            keys = jax.vmap(lambda i: jax.random.fold_in(level_key, i))(row)
            one = jax.vmap(lambda k, image, level: process.corrupt(k, image[None], level[None]))
            x, blurred, residual = (part[:, 0] for part in one(keys, x0, t))
            found = predict(x, t) if labels is None else predict(x, t, labels[row])
            in_blurred, in_residual = found.blurred - blurred, found.residual - residual
            error = in_blurred + in_residual
            pairs = [(blurred, blurred), (residual, residual), (error, error)]
            pairs += [(in_blurred, in_blurred), (in_residual, in_residual), (in_residual, error)]
            return jnp.stack([jnp.mean(p * q, axis=(1, 2, 3)) for p, q in pairs])

        def level(inputs: tuple[Array, Array]) -> Array:
            own_key = jax.random.fold_in(key, inputs[1])
            return jax.lax.map(lambda row: batch(inputs[0], own_key, row), jnp.asarray(rows))

        return jax.lax.map(level, (levels, jnp.arange(len(betas))))

    whole = predict if isinstance(predict, jax.tree_util.Partial) else jax.tree_util.Partial(predict)
    t = jnp.asarray(betas, jnp.float32)
    found = np.asarray(run(whole, key, jnp.asarray(images), labels, t), np.float64)
    # [level, batch, quantity, image] -> [quantity, level, image]
    found = np.moveaxis(found, 2, 0).reshape(found.shape[2], len(betas), -1)[..., :n]
    blurred, residual, clean_error, blurred_error, residual_error, shared = found
    blurred_left, blurred_se = _ratio(blurred_error, blurred)
    residual_left, residual_se = _ratio(residual_error, residual, _ROUNDING * float(np.mean(np.square(images))))
    deblurring, deblurring_se = _ratio(shared, clean_error)
    return Explained(
        count=np.asarray(n),
        alphas=np.asarray(process.blur(t), np.float64),
        betas=betas,
        blurred=blurred.mean(-1),
        residual=residual.mean(-1),
        clean_error=clean_error.mean(-1),
        blurred_error=blurred_error.mean(-1),
        residual_error=residual_error.mean(-1),
        blurred_explained=1 - blurred_left,
        blurred_explained_se=blurred_se,
        residual_explained=1 - residual_left,
        residual_explained_se=residual_se,
        deblurring=deblurring,
        deblurring_se=deblurring_se,
    )
