"""Laws of the noise that a process adds: Gaussian, or with the heavy tails of PFGM++.

A law is of one image; its scale is one, and a process multiplies it by s(t). PFGM++ (Xu et al. 2023, arXiv 2302.04265)
perturbs along a direction u uniform on the sphere of the N pixel values by a radius R with

    R² / (σ² D) = b / (1 - b),   b ~ Beta(N/2, D/2),   that is   R² = σ² D · G(N/2) / G(D/2)

with independent unit-scale gamma variables G. A Gaussian vector g has a uniform direction and |g|² / 2 = G(N/2), so

    R u = σ g √( (D/2) / G(D/2) ):

noise of PFGM++ is Gaussian noise divided by one number an image, Student's t distribution with D degrees of freedom in
N dimensions. As D → ∞ that number is 1 and the noise Gaussian. The gamma is drawn in log space: at D below 1 it
underflows, and a beta variable at N = 196,608 rounds to 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class Noise(NamedTuple):
    """A law of unit scale.

    Attributes:
      draw: (key, shape `(*b, h, w, c)`) -> noise of that shape, float32, independent from image to image.
      log_density: (|x - mean|² `[*b]`, scale s `[*b]`, dimension N) -> ln p `[*b]` in nats.
    """

    draw: Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "*b h w c"]]
    log_density: Callable[[Array, Array, int], Array]


def _gaussian_log_density(squared_distance: Array, scale: Array, dimension: int) -> Array:
    return -squared_distance / (2 * jnp.square(scale)) - dimension / 2 * jnp.log(2 * jnp.pi * jnp.square(scale))


GAUSSIAN = Noise(lambda key, shape: jax.random.normal(key, shape, jnp.float32), _gaussian_log_density)


def student(augmented_dims: float) -> Noise:
    """PFGM++'s noise; `augmented_dims` is D, finite and above 0: 128 and 2048 are used on images."""
    if not 0 < augmented_dims < float("inf"):
        raise ValueError(
            f"PFGM++ needs D (augmented_dims) above 0 and finite, not {augmented_dims}; 128 or 2048 are used"
        )
    half = augmented_dims / 2

    def draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "*b h w c"]:
        normal_key, gamma_key = jax.random.split(key)
        log_gamma = jax.random.loggamma(gamma_key, half, shape[:-3], jnp.float32)
        shrink = jnp.exp((math.log(half) - log_gamma) / 2)
        return shrink[..., None, None, None] * jax.random.normal(normal_key, shape, jnp.float32)

    def log_density(squared_distance: Array, scale: Array, dimension: int) -> Array:
        # In float64 on the host: at D = 10⁷ each of the large terms is rounded to whole nats in float32.
        constant = math.lgamma(half + dimension / 2) - math.lgamma(half)
        constant -= dimension / 2 * math.log(math.pi * augmented_dims)
        ratio = squared_distance / (augmented_dims * jnp.square(scale))
        return constant - dimension * jnp.log(scale) - (half + dimension / 2) * jnp.log1p(ratio)

    return Noise(draw, log_density)
