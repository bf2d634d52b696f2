"""From a network to a predictor: preconditioning, and the model with two heads.

A network F sees a state scaled to unit variance and gives raw outputs of unit variance; preconditioning turns them
into posterior means of the two targets D = B_α x0 and R = x0 - B_α x0. A system that does not blur has no residual,
and its network one head: with EDM's coefficients it *is* EDM.

What a network is asked for is a choice, and each choice a function here (`CHOICES`; docs/method.md §7 and §8):

| | heads | D̂ | R̂ | λ | for |
|---|---|---|---|---|---|
| `edm` | D, R | c_skip x + c_out F_D | c_out F_R | 1 / c_out² | all with noise; the paper's two heads |
| `spectral` | D, R | Wiener + c_D F_D | Wiener + c_R F_R | 1 / c_D² | hot, warm |
| `clean` | x0 | B_α x̂0, x̂0 = c_skip x + c_out F | x̂0 - D̂ | 1 / c_out² | warm: x0 directly, split by blurring it |
| `clean_residual` | x0, R | x̂0 - R̂ | c_out F_R | 1 / c_out² | warm |
| `noise_residual` | ε, R | x - s F_ε | s F_R | 1 / s² | EDM's family |
| `noise` | ε | x - s F | x̂0 - D̂, x̂0 = a⁻¹ D̂ | 1 / s² | ddpm, blurring |
| `one_step` | step | x + F, one level less blurred | not predicted | 1 | ihdm |
| `direct` | x0 | a x̂0, x̂0 = F | x̂0 - D̂ | 1 | cold |
| `velocity` | x0 | a x̂0, x̂0 = F | x̂0 - D̂ | 1, on the error of dx/ds | heat_flow |

Noise with a colour c(t)[f] is white in the state y = x / c, of the images x0 / c. All choices but `spectral`, which has
its own coefficient for each frequency, are those of y: the network sees y and finds D / c and R / c, and that is where
errors are counted (`whitened`).
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from warm_jax.diffusion import dct, loss
from warm_jax.diffusion.bnr import Power
from warm_jax.diffusion.process import Prediction, Process

BLUR_UNIT = 0.01  # pixels; the blur condition resolves blurs from here up
LEAST_NOISE = 0.05  # that the error of a velocity is divided by


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """Scales around a network.

    Attributes:
      heads: How many images the network puts out.
      scale: t `[b]` -> c_in `[b]`.
      weight: t `[b]` -> λ `[b]`, the loss's weight for both targets.
      combine: (x, t, a raw output `[b, h, w, c]` for each head) -> Prediction.
      conditions: t `[b]` -> the one or two numbers `[b]` that tell the network its level.
      errors: What is counted as an error in training, one of `diffusion/loss.py`.
      view: (x, t) -> the state that the network sees, before it is scaled.
    """

    heads: int
    scale: Callable[[Array], Array]
    weight: Callable[[Array], Array]
    combine: Callable[..., Prediction]
    conditions: Callable[[Array], tuple[Array, ...]]
    errors: Callable[..., loss.Errors] = loss.squared
    view: Callable[[Array, Array], Array] = lambda x, t: x


def _images(level: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    return level[:, None, None, None]


def _blur_condition(process: Process, t: Array) -> Array:
    """ln(1 + α / 0.01 px) / 4, finite where there is no blur."""
    return jnp.log1p(process.blur(t) / BLUR_UNIT) / 4


def _noise_and_blur(process: Process) -> Callable[[Array], tuple[Array, ...]]:
    """EDM's c_noise = ln(s / a_0) / 4 and, where the process blurs, the blur."""

    def conditions(t: Array) -> tuple[Array, ...]:
        c_noise = process.log_noise_to_signal(t) / 4
        return (c_noise, _blur_condition(process, t)) if process.blurs else (c_noise,)

    return conditions


@dataclasses.dataclass(frozen=True)
class _Edm:
    """EDM's coefficients (Karras et al. 2022, table 1), for any scale of the process.

    Where the mean colour is scaled by a_0 ≠ 1, y = x / a_0 is a state with noise σ = s / a_0 of the images a x0 / a_0;
    without a scale, y = x and σ = β.
    """

    process: Process
    sigma_data: float

    def __post_init__(self):
        if not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"sigma_data must be finite and above 0, not {self.sigma_data}; EDM uses 0.5")

    def scale(self, t: Array) -> Array:
        """a_0."""
        return self.process.attenuation(t)[:, 0, 0, 0]

    def sigma(self, t: Array) -> Array:
        return self.process.noise(t) / self.scale(t)

    def total(self, t: Array) -> Array:
        return jnp.square(self.sigma(t)) + self.sigma_data**2

    def skip(self, x: Array, t: Array) -> Array:
        """c_skip y."""
        return _images(self.sigma_data**2 / self.total(t) / self.scale(t)) * x

    def out(self, raw: Array, t: Array) -> Array:
        """c_out F."""
        return _images(self.sigma(t) * self.sigma_data / jnp.sqrt(self.total(t))) * raw

    def around(self, heads: int, combine: Callable[..., Prediction]) -> Preconditioning:
        return Preconditioning(
            heads=heads,
            scale=lambda t: jax.lax.rsqrt(self.total(t)) / self.scale(t),
            weight=lambda t: self.total(t) / jnp.square(self.sigma(t) * self.sigma_data),
            combine=combine,
            conditions=_noise_and_blur(self.process),
        )


def edm(process: Process, sigma_data: float = 0.5) -> Preconditioning:
    """EDM's coefficients for both heads, the paper's choice; `sigma_data` > 0 is the data's std.

    D̂ = c_skip x + c_out F_D,  R̂ = c_out F_R,  λ = 1 / c_out², with c_skip = σ_d² / (β² + σ_d²),
    c_out = β σ_d / √(β² + σ_d²), c_in = 1 / √(β² + σ_d²). Of a scaled process these are the heads of y = x / a_0: what
    they give is D̂ / a_0 and x̂0 - D̂ / a_0.
    """
    c = _Edm(process, sigma_data)

    def combine(x: Array, t: Array, raw_blurred: Array, raw_residual: Array | None = None) -> Prediction:
        unscaled = c.skip(x, t) + c.out(raw_blurred, t)
        residual = jnp.zeros_like(x) if raw_residual is None else c.out(raw_residual, t)
        blurred = _images(c.scale(t)) * unscaled
        return Prediction(blurred, residual + (unscaled - blurred))

    return c.around(2 if process.blurs else 1, combine)


def clean(process: Process, sigma_data: float = 0.5) -> Preconditioning:
    """One head for x0, with EDM's coefficients; its blur is D̂, and what blur takes is R̂. Without blur it is `edm`."""
    c = _Edm(process, sigma_data)

    def combine(x: Array, t: Array, raw: Array) -> Prediction:
        x0 = c.skip(x, t) + c.out(raw, t)
        blurred = process.attenuate(x0, t)
        return Prediction(blurred, x0 - blurred)

    return c.around(1, combine)


def clean_residual(process: Process, sigma_data: float = 0.5) -> Preconditioning:
    """Heads for x0 and R, with EDM's coefficients; D̂ = x̂0 - R̂."""
    if not process.blurs:
        return edm(process, sigma_data)
    c = _Edm(process, sigma_data)

    def combine(x: Array, t: Array, raw: Array, raw_residual: Array) -> Prediction:
        residual = c.out(raw_residual, t)
        return Prediction(c.skip(x, t) + c.out(raw, t) - residual, residual)

    return c.around(2, combine)


def noise_residual(process: Process, sigma_data: float = 0.5) -> Preconditioning:
    """Heads for ε and R, both in units of the noise: D̂ = x - s F_ε, R̂ = s F_R, λ = 1 / s²; inputs scaled as EDM's.

    With λ the loss is |F_ε - ε|² + w_R |F_R - R / s|². At high noise an error of ε̂ is multiplied by s on its way to D̂:
    that is what EDM's skip avoids.
    """

    def combine(x: Array, t: Array, raw_noise: Array, raw_residual: Array | None = None) -> Prediction:
        s = _images(process.noise(t))
        return Prediction(x - s * raw_noise, jnp.zeros_like(x) if raw_residual is None else s * raw_residual)

    base = _Edm(process, sigma_data).around(2 if process.blurs else 1, combine)
    return dataclasses.replace(base, weight=lambda t: 1 / jnp.square(process.noise(t)))


def noise(process: Process) -> Preconditioning:
    """One head for ε, of states of unit variance: D̂ = x - s F, and x̂0 = a⁻¹ D̂. λ = 1 / s² makes it |F - ε|².

    Differs from Ho et al.: the network is told ln(s / a_0) / 4, the same level in EDM's units, in place of the step's
    number; that suits sinusoids and Fourier features alike.
    """

    def combine(x: Array, t: Array, raw: Array) -> Prediction:
        blurred = x - _images(process.noise(t)) * raw
        return Prediction(blurred, dct.idct2(dct.dct2(blurred) / process.attenuation(t)) - blurred)

    return Preconditioning(
        heads=1,
        scale=jnp.ones_like,
        weight=lambda t: 1 / jnp.square(process.noise(t)),
        combine=combine,
        conditions=lambda t: (process.log_noise_to_signal(t) / 4,),
        errors=loss.squared_blurred,
    )


def _by_blur(
    process: Process, combine: Callable[..., Prediction], errors: Callable[..., loss.Errors]
) -> Preconditioning:
    """Levels told by their blur, and nothing scaled or weighted."""
    return Preconditioning(
        heads=1,
        scale=jnp.ones_like,
        weight=jnp.ones_like,
        combine=combine,
        conditions=lambda t: (_blur_condition(process, t),),
        errors=errors,
    )


def one_step(process: Process) -> Preconditioning:
    """One head for the step from x to the mean of the next less blurred image, D̂ = x + F. It says nothing of R."""
    return _by_blur(process, lambda x, t, raw: Prediction(x + raw, jnp.zeros_like(x)), loss.squared_blurred)


def direct(process: Process) -> Preconditioning:
    """One head for x0 itself, absolute error; its blur is D̂."""

    def combine(x: Array, t: Array, raw: Array) -> Prediction:
        blurred = process.attenuate(raw, t)
        return Prediction(blurred, raw - blurred)

    return _by_blur(process, combine, loss.absolute_clean)


def velocity(process: Process) -> Preconditioning:
    """One head for x0 itself, judged by the velocity that follows from it, as flow matching with x0 predicted.

    Per unit of noise a state moves by dz/ds = (da/ds) z_0 + ε. With ε̂ = (z - a ẑ_0) / s the error of that is
    w (ẑ_0 - z_0), w = ȧ / ṡ - a / s for each frequency; in a / s noise counts as at least 0.05, where the error of a
    velocity says nothing of x0 any more. Nothing is scaled.
    """

    def errors(prediction: Prediction, example: loss.Example, weight: loss.Weight) -> loss.Errors:
        t, one = example.t, jnp.ones_like(example.t)
        (a, a_dot), (s, s_dot) = (jax.jvp(f, (t,), (one,)) for f in (process.attenuation, process.noise))
        w = a_dot / _images(s_dot) - a / _images(jnp.maximum(s, LEAST_NOISE))
        wrong = prediction.blurred + prediction.residual - (example.blurred + example.residual)
        error = weight(t) * jnp.sum(jnp.square(w * dct.dct2(wrong)), axis=(-3, -2, -1))
        return loss.Errors(error, jnp.zeros_like(error))

    return dataclasses.replace(
        direct(process), conditions=lambda t: (process.log_noise_to_signal(t) / 4,), errors=errors
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
        a, s2 = process.attenuation(t), jnp.square(process.deviation(t))
        return p, a, s2, p * jnp.square(a) + s2

    def mean(values: Array) -> Array:
        return jnp.mean(values, axis=(1, 2, 3))

    def c_blurred(t: Array) -> Array:
        p, a, s2, v = parts(t)
        return jnp.sqrt(mean(p * jnp.square(a) * s2 / v))

    def combine(x: Array, t: Array, raw_blurred: Array, raw_residual: Array | None = None) -> Prediction:
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
        heads=2 if process.blurs else 1,
        scale=lambda t: jax.lax.rsqrt(mean(parts(t)[3])),
        weight=lambda t: 1 / jnp.square(c_blurred(t)),
        combine=combine,
        conditions=_noise_and_blur(process),
    )


def whitened(process: Process, around: Callable[[Process], Preconditioning]) -> Preconditioning:
    """`around` of the whitened states of a process whose noise has a colour: y = x / c is a state of x0 / c.

    With c² ∝ P, the data's power, x0 / c is white too, and this is hot diffusion of whitened images.
    """
    base = around(dataclasses.replace(process, colour=None))

    def tinted(prediction: Prediction, t: Array) -> Prediction:
        return Prediction(*(process.tint(part, t) for part in prediction))

    def errors(prediction: Prediction, example: loss.Example, weight: loss.Weight) -> loss.Errors:
        t = example.t
        white = example._replace(
            x=process.whiten(example.x, t),
            blurred=process.whiten(example.blurred, t),
            residual=process.whiten(example.residual, t),
        )
        return base.errors(Prediction(*(process.whiten(part, t) for part in prediction)), white, weight)

    return dataclasses.replace(
        base,
        view=process.whiten,
        combine=lambda x, t, *raw: tinted(base.combine(process.whiten(x, t), t, *raw), t),
        errors=errors,
    )


CHOICES = {  # by name: (process, σ_data, the data's power) -> Preconditioning
    "edm": lambda process, sigma_data, power: edm(process, sigma_data),
    "spectral": lambda process, sigma_data, power: spectral(process, power),
    "clean": lambda process, sigma_data, power: clean(process, sigma_data),
    "clean_residual": lambda process, sigma_data, power: clean_residual(process, sigma_data),
    "noise_residual": lambda process, sigma_data, power: noise_residual(process, sigma_data),
    "noise": lambda process, sigma_data, power: noise(process),
    "one_step": lambda process, sigma_data, power: one_step(process),
    "direct": lambda process, sigma_data, power: direct(process),
    "velocity": lambda process, sigma_data, power: velocity(process),
}


def choose(name: str, process: Process, sigma_data: float, power: Power) -> Preconditioning:
    """One of `CHOICES`, of whitened states where the noise of `process` has a colour. ValueError where it cannot be."""
    if process.colour is not None and name == "velocity":  # whose whitened state has the colour's derivative in it, too
        raise ValueError(
            "model.preconditioning velocity is of white noise, and this process has a colour: choose clean"
        )
    if process.colour is None or name == "spectral":
        return CHOICES[name](process, sigma_data, power)
    return whitened(process, lambda white: CHOICES[name](white, sigma_data, power))


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network made a predictor of a process: pure functions of the parameters."""

    network: nn.Module
    process: Process
    precondition: Callable[[Process], Preconditioning]

    @property
    def preconditioning(self) -> Preconditioning:
        """The scales around the network."""
        return self.precondition(self.process)

    def of(self, process: Process) -> "Denoiser":
        """The same network on another process of its family: an amortised model at another BNR."""
        return dataclasses.replace(self, process=process)

    def init(self, key: PRNGKeyArray) -> PyTree:
        """Parameters, born from `key`."""
        x = jnp.zeros((1, *self.process.image_shape), jnp.float32)
        t = jnp.full((1,), self.process.highest, jnp.float32)
        return self.network.init(key, x, *self.preconditioning.conditions(t))["params"]

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
        around = self.preconditioning
        raw = self.network.apply(
            {"params": params},
            _images(around.scale(t)) * around.view(x, t),
            *around.conditions(t),
            class_labels=class_labels,
            augment_labels=augment_labels,
            train=dropout_key is not None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
        )
        return around.combine(x, t, *jnp.split(raw, around.heads, axis=-1))
