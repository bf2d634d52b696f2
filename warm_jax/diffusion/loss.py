"""The training loss: draw a level, corrupt, predict, weigh the two heads.

    loss = E_t λ(t) ( |D̂ - D|² + w_R |R̂ - R|² )

with one weight λ for both heads, so that detail counts only where it matters to the sampler. Errors are summed
over pixels and averaged over images, as in EDM. What a system counts as an error is a function:

    squared           λ |D̂ - D|² and λ |R̂ - R|²    EDM's family
    squared_blurred   λ |D̂ - D|²                    one step less blurred (λ = 1); ε, with λ = 1 / s²
    absolute_clean    λ |x̂0 - x0|, of each pixel    cold diffusion
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion.process import Prediction, Process


class Example(NamedTuple):
    """A batch to learn from: corrupted images, their levels, the two targets, and their BNR where it was drawn."""

    x: Float[Array, "*b h w c"]
    t: Float[Array, "*b"]
    blurred: Float[Array, "*b h w c"]
    residual: Float[Array, "*b h w c"]
    bnr: Float[Array, "*b"] | None = None


class Errors(NamedTuple):
    """Weighted errors of each image and head, summed over pixels."""

    blurred: Float[Array, "*b"]
    residual: Float[Array, "*b"]


Weight = Callable[[Array], Array]


def draw(process: Process, key: PRNGKeyArray, x0: Float[Array, "b h w c"]) -> Example:
    """Draws a level for each clean image, and a BNR where the process wants one, and corrupts it."""
    level_key, noise_key = jax.random.split(key)
    t, ratio = process.draw_levels(level_key, x0.shape[0]), None
    if process.draw_bnr is not None:
        ratio = process.draw_bnr(jax.random.fold_in(key, 2), x0.shape[0])
        process = following(process, ratio)
    x, blurred, residual = process.corrupt(noise_key, x0, t)
    return Example(x, t, blurred, residual, ratio)


def following(process: Process, ratio: Float[Array, "*b"]) -> Process:
    """The process of images each at a constant BNR of its own."""
    return process.follow(lambda beta: ratio * beta)


def _total(values: Float[Array, "*b h w c"]) -> Float[Array, "*b"]:
    return jnp.sum(values, axis=(-3, -2, -1))


def squared(prediction: Prediction, example: Example, weight: Weight) -> Errors:
    """λ |D̂ - D|² and λ |R̂ - R|²; `weight` maps levels `[b]` to λ `[b]`."""
    targets = (example.blurred, example.residual)
    return Errors(*(weight(example.t) * _total(jnp.square(p - q)) for p, q in zip(prediction, targets, strict=True)))


def squared_blurred(prediction: Prediction, example: Example, weight: Weight) -> Errors:
    """λ |D̂ - D|² alone, for models that predict nothing else."""
    error = weight(example.t) * _total(jnp.square(prediction.blurred - example.blurred))
    return Errors(error, jnp.zeros_like(error))


def absolute_clean(prediction: Prediction, example: Example, weight: Weight) -> Errors:
    """λ Σ |x̂0 - x0|, counted as the blurred head's."""
    clean = prediction.blurred + prediction.residual
    error = weight(example.t) * _total(jnp.abs(clean - (example.blurred + example.residual)))
    return Errors(error, jnp.zeros_like(error))


def two_head(
    predict: Callable[[Array, Array], Prediction],
    example: Example,
    weight: Weight,
    residual_weight: float = 1.0,
    errors: Callable[[Prediction, Example, Weight], Errors] = squared,
) -> tuple[Float[Array, ""], Errors]:
    """The loss, and the errors it is made of. `residual_weight` is w_R."""
    e = errors(predict(example.x, example.t), example, weight)
    return jnp.mean(e.blurred + residual_weight * e.residual), e
