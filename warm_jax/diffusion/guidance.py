"""Predictors made of predictors: guidance, clipping; each is `predict(x, t) -> Prediction` (docs/method.md §13)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from warm_jax.diffusion.process import Predict, Prediction, Process


def guide(strong: Predict, weak: Predict, weight: float) -> Predict:
    """weak + weight · (strong - weak), in both heads: weight 1 is `strong`, more moves away from what `weak` says.

    Classifier-free guidance (Ho and Salimans 2022) where `weak` is the same model told no class; autoguidance (Karras
    et al. 2024) where it is a worse model told the same. Two evaluations of a network for each one of a sampler.
    """
    if weight == 1:
        return strong

    def predict(x: Array, t: Array) -> Prediction:
        return jax.tree.map(lambda a, b: b + weight * (a - b), strong(x, t), weak(x, t))

    return predict


def clip(predict: Predict, process: Process) -> Predict:
    """x̂0 brought into [-1, 1], and D̂, R̂ and so ε̂ that go with it, as Ho et al. (2020) sample."""

    def clipped(x: Array, t: Array) -> Prediction:
        prediction = predict(x, t)
        clean = jnp.clip(prediction.blurred + prediction.residual, -1, 1)
        blurred = process.attenuate(clean, t)
        return Prediction(blurred, clean - blurred)

    return clipped
