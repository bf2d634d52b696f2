"""Predictors made of predictors: guidance, clipping; each is `predict(x, t) -> Prediction` (docs/method.md §13)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from warm_jax.diffusion.process import Predict, Prediction, Process


def within(process: Process, interval: tuple[float | int, ...]) -> Callable[[Float[Array, "*b"]], Bool[Array, "*b"]]:
    """t -> whether its noise-to-signal ratio σ = s(t) / a(t)[0], EDM's σ, has σ_lo < σ ≤ σ_hi.

    The interval in which Kynkäänniemi et al. (2024, arXiv 2404.07724) guide; of the mean colour where a process scales
    or blurs, as the multistep solvers' clock.
    """
    low, high = interval

    def chosen(t: Float[Array, "*b"]) -> Bool[Array, "*b"]:
        # No logarithm and no division, which would move the levels that are the bounds themselves.
        noise, signal = process.noise(t), process.attenuation(t)[..., 0, 0, 0]
        return (noise > low * signal) & (noise <= high * signal)

    return chosen


def guide(
    strong: Predict, weak: Predict, weight: float, chosen: Callable[[Array], Bool[Array, " b"]] | None = None
) -> Predict:
    """weak + weight · (strong - weak), in both heads: weight 1 is `strong`, more moves away from what `weak` says.

    Classifier-free guidance (Ho and Salimans 2022) where `weak` is the same model told no class; autoguidance (Karras
    et al. 2024) where it is a worse model told the same. Two evaluations of a network for each one of a sampler; with
    `chosen`, as `within` gives it, where a level of the batch is chosen, and one elsewhere.
    """
    if weight == 1:
        return strong

    def moved(here: Prediction, x: Array, t: Array) -> Prediction:
        return jax.tree.map(lambda a, b: b + weight * (a - b), here, weak(x, t))

    def predict(x: Array, t: Array) -> Prediction:
        here = strong(x, t)
        if chosen is None:
            return moved(here, x, t)
        which = chosen(t)

        def guided(here: Prediction) -> Prediction:
            mask = which[:, None, None, None]
            return jax.tree.map(lambda a, b: jnp.where(mask, a, b), moved(here, x, t), here)

        return jax.lax.cond(jnp.any(which), guided, lambda here: here, here)

    return predict


def clip(predict: Predict, process: Process) -> Predict:
    """x̂0 brought into [-1, 1], and D̂, R̂ and so ε̂ that go with it, as Ho et al. (2020) sample."""

    def clipped(x: Array, t: Array) -> Prediction:
        prediction = predict(x, t)
        clean = jnp.clip(prediction.blurred + prediction.residual, -1, 1)
        blurred = process.attenuate(clean, t)
        return Prediction(blurred, clean - blurred)

    return clipped
