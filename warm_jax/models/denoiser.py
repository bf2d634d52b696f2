"""From a network to a predictor: preconditioning, and the model with two heads.

A network F sees a state scaled to unit variance and gives raw outputs of unit variance; preconditioning turns them
into posterior means of the two targets D = B_α x0 and R = x0 - B_α x0. A system that does not blur has no residual,
and its network one head: with EDM's coefficients it *is* EDM.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from warm_jax.diffusion import dct
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.process import Prediction, Process

BLUR_UNIT = 0.01  # pixels; the blur condition resolves blurs from here up


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """Scales around a network.

    Attributes:
      scale: t `[b]` -> c_in `[b]`.
      weight: t `[b]` -> λ `[b]`, the loss's weight for both heads.
      combine: (x, t, raw D `[b, h, w, c]`, raw R or None) -> Prediction.
    """

    scale: Callable[[Array], Array]
    weight: Callable[[Array], Array]
    combine: Callable[[Array, Array, Array, Array | None], Prediction]


def _images(level: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    return level[:, None, None, None]


def edm(process: Process, sigma_data: float = 0.5) -> Preconditioning:
    """EDM's coefficients (Karras et al. 2022, table 1) for both heads; `sigma_data` > 0 is the data's std.

    D̂ = c_skip x + c_out F_D,  R̂ = c_out F_R,  λ = 1 / c_out², with c_skip = σ_d² / (β² + σ_d²),
    c_out = β σ_d / √(β² + σ_d²), c_in = 1 / √(β² + σ_d²).
    """
    if not 0 < sigma_data < float("inf"):
        raise ValueError(f"sigma_data must be finite and above 0, not {sigma_data}; EDM uses 0.5")

    def total(t: Array) -> Array:
        return jnp.square(process.noise(t)) + sigma_data**2

    def combine(x: Array, t: Array, raw_blurred: Array, raw_residual: Array | None) -> Prediction:
        c_skip = _images(sigma_data**2 / total(t))
        c_out = _images(process.noise(t) * sigma_data / jnp.sqrt(total(t)))
        blurred = c_skip * x + c_out * raw_blurred
        return Prediction(blurred, jnp.zeros_like(x) if raw_residual is None else c_out * raw_residual)

    return Preconditioning(
        scale=lambda t: jax.lax.rsqrt(total(t)),
        weight=lambda t: total(t) / jnp.square(process.noise(t) * sigma_data),
        combine=combine,
    )


def spectral(process: Process, power: Power) -> Preconditioning:
    """Wiener filters in place of the linear skip; the network learns what they leave. (Ours, an option.)

    With P the data's DCT power, a = a(t), s = s(t) and V = P a² + s²,

        D̂ = idct(P a² / V · dct(x)) + c_D F_D,        c_D² = mean_f(P a² s² / V)
        R̂ = idct(P a (1 - a) / V · dct(x)) + c_R F_R, c_R² = mean_f(P (1 - a)² s² / V)

    c_in = 1 / √mean_f(V) and λ = 1 / c_D² for both heads. For flat P = σ_d² and no blur it is EDM's.
    It learns faster at low and middle noise and worse at high noise, where a linear guess is wrong for bounded
    pixels.
    """
    if power.shape != process.image_shape[:2]:
        raise ValueError(f"the spectrum is {power.shape}, the images are {process.image_shape[:2]}; measure it again")

    def parts(t: Array) -> tuple[Array, Array, Array, Array]:
        p = jnp.asarray(power, t.dtype)[..., None]
        a, s2 = process.attenuation(t), jnp.square(_images(process.noise(t)))
        return p, a, s2, p * jnp.square(a) + s2

    def mean(values: Array) -> Array:
        return jnp.mean(values, axis=(1, 2, 3))

    def c_blurred(t: Array) -> Array:
        p, a, s2, v = parts(t)
        return jnp.sqrt(mean(p * jnp.square(a) * s2 / v))

    def combine(x: Array, t: Array, raw_blurred: Array, raw_residual: Array | None) -> Prediction:
        p, a, s2, v = parts(t)
        z = dct.dct2(x)
        blurred = dct.idct2(p * jnp.square(a) / v * z) + _images(c_blurred(t)) * raw_blurred
        if raw_residual is None:
            return Prediction(blurred, jnp.zeros_like(x))
        # 1 - a from the exponent loses digits where a ≈ 1, but there c_R is small beside c_D.
        c_residual = jnp.sqrt(mean(p * jnp.square(1 - a) * s2 / v))
        residual = dct.idct2(p * a * (1 - a) / v * z) + _images(c_residual) * raw_residual
        return Prediction(blurred, residual)

    return Preconditioning(
        scale=lambda t: jax.lax.rsqrt(mean(parts(t)[3])),
        weight=lambda t: 1 / jnp.square(c_blurred(t)),
        combine=combine,
    )


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network made a predictor: pure functions of the parameters.

    The network is conditioned on c_noise = ln(s) / 4 and, where the process blurs, on ln(1 + α / 0.01 px) / 4.
    """

    network: nn.Module
    process: Process
    preconditioning: Preconditioning

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Parameters, born from `key`."""
        x = jnp.zeros((1, *self.process.image_shape), jnp.float32)
        t = jnp.ones((1,), jnp.float32)
        return self.network.init(key, x, t, t if self.process.blurs else None)["params"]

    def predict(
        self,
        params: PyTree,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        class_labels: Float[Array, "b k"] | None = None,
        augment_labels: Float[Array, "b n"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Prediction:
        """Posterior means of the two targets for states `x` at levels `t`. Dropout acts where its key is given."""
        raw = self.network.apply(
            {"params": params},
            _images(self.preconditioning.scale(t)) * x,
            jnp.log(self.process.noise(t)) / 4,
            jnp.log1p(self.process.blur(t) / BLUR_UNIT) / 4 if self.process.blurs else None,
            class_labels=class_labels,
            augment_labels=augment_labels,
            train=dropout_key is not None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
        )
        blurred, residual = jnp.split(raw, 2, axis=-1) if self.process.blurs else (raw, None)
        return self.preconditioning.combine(x, t, blurred, residual)
