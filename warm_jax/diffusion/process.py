r"""The corruption process: what happens to an image between data and noise, for every system of the family.

Derivation (docs/method.md §3 to §6). Work in the DCT basis, z = dct(x), where blur is a factor for each frequency f.
Every system attenuates frequencies and adds noise,

    z_t[f] = a(t)[f] · z_0[f] + s(t)[f] · ε[f],     ε ~ N(0, I)                                     (1)

The noise of most is white, s(t) one number, and as dct is orthonormal it is white in pixels too. Others give it a
colour, s(t)[f] = n(t) c(t)[f] with a level n and a factor c > 0 for each frequency. Then y = z / c is a state with
white noise: y_t = (a / c) z_0 + n ε. So samplers and networks need to know of white noise only: states are whitened
before them, and tinted after. Blur-noise ("warm") diffusion is t = β and

    a(t)[f] = exp(-α(t)² λ[f] / 2),      s(t) = t,      α(t) = schedule(t) = BNR · t               (2)

that is x_t = B_α x0 + β ε. Hot diffusion (EDM) is the member whose blur is zero. Two things are to be recovered
from x_t,

    D = a x0 (= B_α x0)      the blurred image, by denoising                                         (3)
    R = x0 - D               the detail that blur removed, by deblurring                             (4)

and their posterior means make x̂0 = D̂ + R̂ and ε̂ = (x_t - D̂) / s. With these the ordinary differential equation

    dz/dt = ȧ(t) dct(x̂0) + ṡ(t) dct(ε̂)                                                              (5)

carries the marginals of (1): differentiate (1) at fixed (z_0, ε) and take the mean given z_t, which is the velocity
of the continuity equation of p_t.

| symbol | code | meaning, unit |
|---|---|---|
| x0, x_t | `x0`, `x` | clean and corrupted image, [-1, 1] and unbounded |
| t | `t` | where on the path: 0 is the clean end of every path, where a = 1 and s = 0 |
| α | `process.blur(t)` | standard deviation of the blur, pixels |
| β, n | `process.noise(t)` | level of the noise, its standard deviation where it is white, units of x |
| c | `process.colour(t)` | factor on it for each frequency; None: white |
| s | `process.deviation(t)` | n · c, the standard deviation of the noise of each frequency |
| a | `process.attenuation(t)` | what is left of each frequency, 0 to 1 |
| λ | `dct.squared_frequencies` | squared angular frequency, (radians / pixel)² |
| D, R | `blurred`, `residual` | the two targets |

The systems; the first four are constructed below, the others in `systems.py` and, from `coloured` on, in `coloured.py`:

| constructor | a(t)[f] | s(t) | t | noise | D is at |
|---|---|---|---|---|---|
| `hot` | 1 | t | noise level | Gaussian | t |
| `warm`, `amortised` | exp(-α(t)² λ/2) | t | noise level | Gaussian | t |
| `pfgmpp` | 1 | t | noise level | Student's t | t |
| `ddpm` | √ᾱ(t) | √(1 - ᾱ(t)) | 0 to 1 | Gaussian | t |
| `blurring` | √ᾱ(t) d_t[f] | √(1 - ᾱ(t)) | 0 to 1 | Gaussian | t |
| `ihdm` | exp(-σ_B(t)² λ/2) | 0.02 | 0, 1, …, K | Gaussian | t - 1 |
| `cold` | exp(-σ_B(t)² λ/2) | 0 | 0, 1, …, K | none | t |
| `coloured` | of any other | n(t) c[f] | its | Gaussian | t |
| `heat_flow` | τ τ^(λ/2), τ = 1 - t | t | 0 to 1 | Gaussian | t |
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion import bnr, dct
from warm_jax.diffusion.noise import GAUSSIAN, Noise, student


class Prediction(NamedTuple):
    """What a predictor says of x_t: posterior means of the two targets, equations (3) and (4)."""

    blurred: Float[Array, "*b h w c"]
    residual: Float[Array, "*b h w c"]


Predict = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Prediction]


GAUSSIAN_SOLVERS = (
    "heun",
    "euler",
    "multistep",
    "multistep3",
    "ancestral",
)  # of every system with Gaussian noise and a score


@dataclasses.dataclass(frozen=True)
class Process:
    """A linear corruption (1) with the levels at which it is trained and the grid on which it is sampled.

    Attributes:
      image_shape: (height, width, channels).
      blurs: Whether any level blurs. Where none does, there is nothing to deblur.
      blur: t `[*b]` -> α `[*b]`, pixels.
      noise: t `[*b]` -> n `[*b]`, which is s where the noise is white.
      attenuation: t `[*b]` -> a `[*b, h, w, 1]`.
      draw_levels: (key, n) -> t `[n]`, the levels of a training batch.
      highest: The level from which sampling starts.
      grid: n -> t `[n + 1]`, float64: n levels to sample from, falling, and the end of the path.
      solvers: Those of `sampler.SOLVERS` that can run it, its native one first.
      refusal: Why the others cannot.
      law: Of the noise.
      start: (key, shape) -> a draw of a · x0 at the highest level; None where nothing is left of x0 there.
      target: t `[*b]` -> the level whose blurred image a model is to find; None: t itself.
      draw_bnr: (key, n) -> the BNR `[n]` of each training image, where it is drawn; then also `follow`.
      follow: a BNR schedule -> the process on that schedule.
      colour: t `[*b]` -> c `[*b, h, w, 1]`, finite and > 0, the factor on the noise of each frequency; None: white.
    """

    image_shape: tuple[int, int, int]
    blurs: bool
    blur: Callable[[Array], Array]
    noise: Callable[[Array], Array]
    attenuation: Callable[[Array], Array]
    draw_levels: Callable[[PRNGKeyArray, int], Float[Array, " n"]]
    highest: float
    grid: Callable[[int], np.ndarray]
    solvers: tuple[str, ...] = GAUSSIAN_SOLVERS
    refusal: str = ""
    law: Noise = GAUSSIAN
    start: Callable[[PRNGKeyArray, tuple[int, ...]], Array] | None = None
    target: Callable[[Array], Array] | None = None
    draw_bnr: Callable[[PRNGKeyArray, int], Float[Array, " n"]] | None = None
    follow: Callable[[bnr.Schedule], "Process"] | None = None
    colour: Callable[[Array], Array] | None = None

    def deviation(self, t: Float[Array, "*b"]) -> Float[Array, "*b _ _ 1"]:
        """s(t) for each frequency, `[*b, h, w, 1]`; of white noise `[*b, 1, 1, 1]`."""
        level = self.noise(t)[..., None, None, None]
        return level if self.colour is None else level * self.colour(t)

    def tint(self, y: Float[Array, "*b h w c"], t: Float[Array, "..."]) -> Float[Array, "*b h w c"]:
        """idct(c(t) · dct(y)): white noise in the colour of level `t`, a scalar or of axes that broadcast with *b."""
        return y if self.colour is None else dct.idct2(self.colour(t) * dct.dct2(y))

    def whiten(self, x: Float[Array, "*b h w c"], t: Float[Array, "..."]) -> Float[Array, "*b h w c"]:
        """idct(dct(x) / c(t)), the inverse of `tint`."""
        return x if self.colour is None else dct.idct2(dct.dct2(x) / self.colour(t))

    def attenuate(self, x: Float[Array, "*b h w c"], t: Float[Array, "*b"]) -> Float[Array, "*b h w c"]:
        """idct(a(t) · dct(x)): what level `t` (one value for each image) leaves of `x`."""
        return dct.idct2(self.attenuation(t) * dct.dct2(x))

    def corrupt(
        self, key: PRNGKeyArray, x0: Float[Array, "b h w c"], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Draws x_t, equation (1), and gives the targets with it: (x_t, blurred, residual)."""
        signal = self.attenuate(x0, t)
        noise = self.noise(t)[:, None, None, None] * self.law.draw(key, x0.shape).astype(x0.dtype)
        x = signal + self.tint(noise, t)
        blurred = signal if self.target is None else self.attenuate(x0, self.target(t))
        return x, blurred, x0 - blurred

    def log_noise_to_signal(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """ln(n(t) / a(t)[0]), of the image's mean: the clock of multistep solvers; ln β where nothing is scaled."""
        return jnp.log(self.noise(t)) - jnp.log(self.attenuation(t)[..., 0, 0, 0])

    def levels(self, n: int) -> np.ndarray:
        """The sampling grid: `n` ≥ 1 levels and the end of the path, `[n + 1]`, float64. ValueError where it cannot."""
        if n < 1:
            raise ValueError(f"sampling needs at least 1 step, not {n}")
        return self.grid(n)

    def prior(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """A draw from where sampling starts; shape `image_shape`, or with batch axes before it."""
        t = jnp.asarray(self.highest, jnp.float32)
        if self.start is None:
            return self.tint(self.noise(t) * self.law.draw(key, shape), t)
        start_key, noise_key = jax.random.split(key)
        return self.start(start_key, shape) + self.tint(self.noise(t) * self.law.draw(noise_key, shape), t)


def check_shape(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """`image_shape` as a tuple; ValueError where it is none."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"an image shape is (height, width, channels), each at least 1, not {image_shape}")
    return tuple(image_shape)


def edm_grid(beta_min: float, beta_max: float, rho: float) -> Callable[[int], np.ndarray]:
    """EDM's grid: n -> n levels from `beta_max` down to `beta_min`, evenly spaced in β^(1/ρ), and 0.

    Its lowest level need not be that of the training: the last step returns x̂0 from any. ValueError where it cannot.
    """
    if not 0 < beta_min < beta_max < float("inf"):
        raise ValueError(f"noise levels need 0 < beta_min < beta_max, not beta_min={beta_min}, beta_max={beta_max}")
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho must be finite and above 0, not {rho}")

    def grid(n: int) -> np.ndarray:
        ramp = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
        levels = (beta_max ** (1 / rho) + ramp * (beta_min ** (1 / rho) - beta_max ** (1 / rho))) ** rho
        return np.append(levels, 0.0)

    return grid


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
    image_shape = check_shape(image_shape)
    grid = edm_grid(beta_min, beta_max, rho)
    if not 0 < P_std < float("inf"):
        raise ValueError(f"P_std must be finite and above 0, not {P_std}")
    height, width, _ = image_shape

    return Process(
        image_shape=image_shape,
        blurs=blurs,
        blur=schedule,
        noise=lambda t: t,
        attenuation=lambda t: dct.attenuation(schedule(t), height, width),
        draw_levels=lambda key, n: jnp.exp(P_mean + P_std * jax.random.normal(key, (n,), jnp.float32)),
        highest=beta_max,
        grid=grid,
        solvers=(*GAUSSIAN_SOLVERS, "stochastic"),
    )


def hot(image_shape: tuple[int, int, int], **levels: float) -> Process:
    """EDM: the warm process whose blur is zero. `levels` as for `warm`."""
    return warm(image_shape, bnr.constant(0.0), blurs=False, **levels)


def amortised(
    image_shape: tuple[int, int, int], draw_bnr: Callable[[PRNGKeyArray, int], Array], **levels: float
) -> Process:
    """Warm diffusion whose BNR is drawn anew for each training image, so that one model serves any (α, β).

    Sampling follows any BNR schedule: `process.follow(schedule)`; by default the paper's constant 0.5. `draw_bnr` as
    `bnr.log_uniform` gives it, `levels` as for `warm`.
    """

    def follow(schedule: bnr.Schedule) -> Process:
        return warm(image_shape, schedule, **levels)

    return dataclasses.replace(follow(bnr.constant(0.5)), draw_bnr=draw_bnr, follow=follow)


def pfgmpp(image_shape: tuple[int, int, int], augmented_dims: float, **levels: float) -> Process:
    """PFGM++ (Xu et al. 2023): EDM with heavy-tailed noise, `noise.student(augmented_dims)`; hot as D → ∞.

    Levels are EDM's, aligned by r = σ √D; the ordinary differential equation is EDM's too. `levels` as for `warm`.
    """
    return dataclasses.replace(
        hot(image_shape, **levels),
        law=student(augmented_dims),
        solvers=("heun", "euler", "multistep", "multistep3"),
        refusal="its noise is not Gaussian, so a state with more noise added is not a state of a higher level",
    )
