"""Exact predictors: the posterior means in closed form, to test against without training (docs/method.md §15)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from warm_jax.diffusion import dct
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.process import Predict, Prediction, Process


def gaussian(process: Process, power: Power) -> Predict:
    """The predictor for images whose DCT coefficients are independent N(0, power[f]): a Wiener filter.

    x̂0 = P a / (P a² + s²) · x for each frequency, D̂ = a x̂0, R̂ = (1 - a) x̂0.
    """

    def predict(x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Prediction:
        p = jnp.asarray(power, x.dtype)[..., None]
        a, s = process.attenuation(t), process.deviation(t)
        clean = p * a / (p * jnp.square(a) + jnp.square(s)) * dct.dct2(x)
        return Prediction(dct.idct2(a * clean), dct.idct2((1 - a) * clean))

    return predict


def _posterior(process: Process, images: Array, x: Array, t: Array) -> tuple[Array, Array]:
    """Weights over `images` for one state at one level, `[n]` summing to 1, and ln Σ_i p(x | x_i, t).

    Squares of differences, not products: at low noise the exponents need all of float32. The best image's weight before
    normalisation is 1 by decree: XLA may compute an exponent once for the maximum and again for the subtraction, and
    far from the data the two roundings differ by more than an exponential holds. Each image is one row: over four axes
    XLA's CPU loop runs along the channels, which for grey images is 35 times as slow.
    """
    a = jnp.broadcast_to(process.attenuation(t), x.shape).ravel()
    difference = a * images.reshape(len(images), -1) - dct.dct2(x).ravel()
    if process.colour is not None:
        colour = jnp.broadcast_to(process.colour(t), x.shape).ravel()
        difference = difference / colour
    distance = jnp.sum(jnp.square(difference), axis=1)
    exponent = process.law.log_density(distance, process.noise(t), x.size)
    if process.colour is not None:
        exponent = exponent - jnp.sum(jnp.log(colour))
    best = jnp.argmax(exponent)
    weights = jnp.exp(jnp.minimum(exponent - exponent[best], 0)).at[best].set(1)
    total = jnp.sum(weights)
    return weights / total, exponent[best] + jnp.log(total)


def empirical(process: Process, images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"]) -> Predict:
    """The predictor for a data set of exactly these `images`.

    Posterior weights w_i ∝ p(x | x_i, t), which is exp(-|x - B_α x_i|² / 2s²) for white Gaussian noise;
    D̂ = Σ w_i B_α x_i, R̂ = Σ w_i (x_i - B_α x_i). Needs s(t) > 0.
    """
    coefficients = dct.dct2(jnp.asarray(images))

    def predict(x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Prediction:
        def one(state: tuple[Array, Array]) -> Array:
            weights, _ = _posterior(process, coefficients, *state)
            return jnp.einsum("n,nhwc->hwc", weights, coefficients, precision=jax.lax.Precision.HIGHEST)

        clean, a = jax.lax.map(one, (x, t)), process.attenuation(t)
        return Prediction(dct.idct2(a * clean), dct.idct2((1 - a) * clean))

    return predict


def log_density(
    process: Process, images: Float[Array, "n h w c"] | Float[np.ndarray, "n h w c"]
) -> Callable[[Array, Array], Float[Array, " b"]]:
    """log p_t(x) in nats of the corrupted data set: a mixture of n noise laws around the blurred images.

    Returns a function of (x `[b, h, w, c]`, t `[b]`) with s(t) > 0.
    """
    coefficients = dct.dct2(jnp.asarray(images))

    def density(x: Float[Array, "b h w c"], t: Float[Array, " b"]) -> Float[Array, " b"]:
        return jax.lax.map(lambda state: _posterior(process, coefficients, *state)[1], (x, t)) - jnp.log(len(images))

    return density
