r"""The corruption process: what happens to an image between data and noise.

Derivation. Work in the DCT basis, z = dct(x), where blur is a factor for each frequency f. Every system of the family
attenuates frequencies and adds white noise,

    z_t[f] = a(t)[f] · z_0[f] + s(t) · ε[f],        ε ~ N(0, I)                                     (1)

and dct is orthonormal, so the noise is white in pixels too. Blur-noise ("warm") diffusion is t = β and

    a(t)[f] = exp(-α(t)² λ[f] / 2),      s(t) = t,      α(t) = schedule(t) = BNR · t               (2)

that is x_t = B_α x0 + β ε. Hot diffusion (EDM) is the member whose blur is zero. Two things are to be recovered
from x_t,

    D = B_α x0      the blurred image, by denoising                                                  (3)
    R = x0 - D      the detail that blur removed, by deblurring                                      (4)

and their posterior means make x̂0 = D̂ + R̂ and ε̂ = (x_t - D̂) / s. With these the ordinary differential equation

    dz/dt = ȧ(t) dct(x̂0) + ṡ(t) dct(ε̂)                                                              (5)

carries the marginals of (1): differentiate (1) at fixed (z_0, ε) and take the mean given z_t, which is the velocity
of the continuity equation of p_t.

| symbol | code | meaning, unit |
|---|---|---|
| x0, x_t | `x0`, `x` | clean and corrupted image, [-1, 1] and unbounded |
| t | `t` | where on the path; here the noise level itself |
| α | `process.blur(t)` | standard deviation of the blur, pixels |
| β, s | `process.noise(t)` | standard deviation of the noise, units of x |
| a | `process.attenuation(t)` | what is left of each frequency, 0 to 1 |
| λ | `dct.squared_frequencies` | squared angular frequency, (radians / pixel)² |
| D, R | `blurred`, `residual` | the two targets |
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion import bnr, dct


class Prediction(NamedTuple):
    """What a predictor says of x_t: posterior means of the two targets, equations (3) and (4)."""

    blurred: Float[Array, "*b h w c"]
    residual: Float[Array, "*b h w c"]


Predict = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Prediction]


@dataclasses.dataclass(frozen=True)
class Process:
    """A linear corruption (1) with the levels at which it is trained and the grid on which it is sampled.

    Attributes:
      image_shape: (height, width, channels).
      blurs: Whether any level blurs. Where none does, the residual is zero and a model needs one head.
      blur: t `[*b]` -> α `[*b]`, pixels.
      noise: t `[*b]` -> s `[*b]`.
      attenuation: t `[*b]` -> a `[*b, h, w, 1]`.
      draw_levels: (key, n) -> t `[n]`, the levels of a training batch.
      grid: n -> t `[n + 1]`, float64: n levels to sample from, falling, and the end of the path.
    """

    image_shape: tuple[int, int, int]
    blurs: bool
    blur: Callable[[Array], Array]
    noise: Callable[[Array], Array]
    attenuation: Callable[[Array], Array]
    draw_levels: Callable[[PRNGKeyArray, int], Float[Array, " n"]]
    grid: Callable[[int], np.ndarray]

    def attenuate(self, x: Float[Array, "*b h w c"], t: Float[Array, "*b"]) -> Float[Array, "*b h w c"]:
        """idct(a(t) · dct(x)): what level `t` (one value for each image) leaves of `x`."""
        return dct.idct2(self.attenuation(t) * dct.dct2(x))

    def corrupt(
        self, key: PRNGKeyArray, x0: Float[Array, "b h w c"], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Draws x_t, equation (1), and gives the targets with it: (x_t, blurred, residual)."""
        blurred = self.attenuate(x0, t)
        noise = jax.random.normal(key, x0.shape, x0.dtype)
        return blurred + self.noise(t)[:, None, None, None] * noise, blurred, x0 - blurred

    def levels(self, n: int) -> np.ndarray:
        """The sampling grid: `n` ≥ 1 levels and the end of the path, `[n + 1]`, float64."""
        if n < 1:
            raise ValueError(f"sampling needs at least 1 step, not {n}")
        return self.grid(n)

    def prior(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """A draw from where sampling starts, N(0, s_max² I); shape `image_shape`, or with batch axes before it."""
        s_max = self.noise(jnp.asarray(self.grid(1)[0], jnp.float32))
        return s_max * jax.random.normal(key, shape, jnp.float32)


def warm(
    image_shape: tuple[int, int, int],
    schedule: bnr.Schedule,
    *,
    beta_min: float = 0.002,
    beta_max: float = 80.0,
    rho: float = 7.0,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    blurs: bool = True,
) -> Process:
    """Blur-noise mixture diffusion, equation (2), with EDM's levels.

    Args:
      image_shape: (height, width, channels), each at least 1.
      schedule: β -> α, see `bnr`.
      beta_min: The lowest noise level of the grid, > 0.
      beta_max: The highest, > `beta_min`.
      rho: How strongly the grid crowds towards `beta_min`, > 0 (EDM, table 1).
      P_mean: Mean of ln β in training.
      P_std: Standard deviation of ln β in training, > 0.
      blurs: False where `schedule` is zero everywhere.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"an image shape is (height, width, channels), each at least 1, not {image_shape}")
    if not 0 < beta_min < beta_max < float("inf"):
        raise ValueError(f"noise levels need 0 < beta_min < beta_max, not beta_min={beta_min}, beta_max={beta_max}")
    for name, value in {"rho": rho, "P_std": P_std}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be finite and above 0, not {value}")
    height, width, _ = image_shape

    def grid(n: int) -> np.ndarray:
        ramp = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
        levels = (beta_max ** (1 / rho) + ramp * (beta_min ** (1 / rho) - beta_max ** (1 / rho))) ** rho
        return np.append(levels, 0.0)

    return Process(
        image_shape=tuple(image_shape),
        blurs=blurs,
        blur=schedule,
        noise=lambda t: t,
        attenuation=lambda t: dct.attenuation(schedule(t), height, width),
        draw_levels=lambda key, n: jnp.exp(P_mean + P_std * jax.random.normal(key, (n,), jnp.float32)),
        grid=grid,
    )


def hot(image_shape: tuple[int, int, int], **levels: float) -> Process:
    """EDM: the warm process whose blur is zero. `levels` as for `warm`."""
    return warm(image_shape, bnr.constant(0.0), blurs=False, **levels)
