"""The training loss: draw a level, corrupt, predict, weigh the two heads.

    loss = E_t λ(t) ( |D̂ - D|² + w_R |R̂ - R|² )

with one weight λ for both heads, so that detail counts only where it matters to the sampler. Squares are summed
over pixels and averaged over images, as in EDM.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion.process import Prediction, Process


class Example(NamedTuple):
    """A batch to learn from: corrupted images, their levels, and the two targets."""

    x: Float[Array, "*b h w c"]
    t: Float[Array, "*b"]
    blurred: Float[Array, "*b h w c"]
    residual: Float[Array, "*b h w c"]


class Errors(NamedTuple):
    """Weighted squared errors of each image and head, summed over pixels: λ |D̂ - D|² and λ |R̂ - R|²."""

    blurred: Float[Array, "*b"]
    residual: Float[Array, "*b"]


def draw(process: Process, key: PRNGKeyArray, x0: Float[Array, "b h w c"]) -> Example:
    """Draws a level for each clean image and corrupts it."""
    level_key, noise_key = jax.random.split(key)
    t = process.draw_levels(level_key, x0.shape[0])
    x, blurred, residual = process.corrupt(noise_key, x0, t)
    return Example(x, t, blurred, residual)


def errors(prediction: Prediction, example: Example, weight: Callable[[Array], Array]) -> Errors:
    """The weighted errors of `prediction`; `weight` maps levels `[b]` to λ `[b]`."""
    square = [jnp.sum(jnp.square(p - q), axis=(-3, -2, -1)) for p, q in zip(prediction, example[2:], strict=True)]
    return Errors(*(weight(example.t) * s for s in square))


def two_head(
    predict: Callable[[Array, Array], Prediction],
    example: Example,
    weight: Callable[[Array], Array],
    residual_weight: float = 1.0,
) -> tuple[Float[Array, ""], Errors]:
    """The loss, and the errors it is made of. `residual_weight` is w_R."""
    e = errors(predict(example.x, example.t), example, weight)
    return jnp.mean(e.blurred + residual_weight * e.residual), e
