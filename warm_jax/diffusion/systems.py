r"""The systems beside EDM's family: denoising, blurring, inverse heat dissipation and cold diffusion.

Each is equation (1) of `process.py` with its own a(t) and s(t); what they are trained to find and how they are
sampled natively follows from that:

| system | levels in training | a model predicts | native solver |
|---|---|---|---|
| `ddpm` (Ho et al. 2020) | t = k/K uniform, or t ~ U(0, 1) | ε, squared | ancestral |
| `blurring` (Hoogeboom and Salimans 2022) | t ~ U(0, 1) | ε, squared | ancestral |
| `ihdm` (Rissanen et al. 2022) | k uniform on 1, …, K | one step less blurred, squared | perturb |
| `cold` (Bansal et al. 2022) | k uniform on 1, …, K | x0, absolute | euler |

ε predicted with squared error is D predicted with the weight 1 / s², as D̂ - D = s (ε - ε̂); see `denoiser.noise`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from warm_jax.diffusion import dct
from warm_jax.diffusion.process import Process, check_shape

Start = Callable[[PRNGKeyArray, tuple[int, ...]], Array]
NOTHING_LEFT = 1e-5  # of a frequency: below it a start keeps nothing


def _require(least: int, **values: int | float) -> None:
    for name, value in values.items():
        if not least <= value < float("inf"):
            raise ValueError(f"{name} must be finite and at least {least:g}, not {value}")


def _uniform(n: int) -> np.ndarray:
    return np.linspace(1, 0, n + 1)


# ── Denoising and blurring diffusion ─────────────────────────────────────────────────────────────────────────────────


def cosine_logsnr(t: Float[Array, "*b"], logsnr_max: float = 10.0) -> Float[Array, "*b"]:
    """ln(ᾱ / (1 - ᾱ)) of the cosine schedule at t in [0, 1]: from `logsnr_max` down to -`logsnr_max`."""
    low = np.arctan(np.exp(-logsnr_max / 2)).item()
    high = np.arctan(np.exp(logsnr_max / 2)).item()
    return -2 * jnp.log(jnp.tan(low + t * (high - low)))


def linear_logsnr(t: Float[Array, "*b"], steps: int = 1000) -> Float[Array, "*b"]:
    """ln(ᾱ / (1 - ᾱ)) of DDPM's schedule at t = k / steps, and between: ln ᾱ is interpolated linearly.

    β_1 = 10⁻⁴ to β_K = 0.02 in equal steps, ᾱ_k = Π (1 - β_i), for K = 1000; for other K both ends times 1000 / K.
    """
    betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    log_alpha_bar = np.append(0, np.cumsum(np.log1p(-betas)))
    value = jnp.interp(t * steps, jnp.arange(steps + 1, dtype=t.dtype), jnp.asarray(log_alpha_bar, t.dtype))
    return value - jnp.log(-jnp.expm1(value))


def _variance_preserving(
    image_shape: tuple[int, int, int],
    logsnr: Callable[[Array], Array],
    draw_levels: Callable[[PRNGKeyArray, int], Array],
    blur: Callable[[Array], Array],
    left: Callable[[Array], Array],
    blurs: bool,
) -> Process:
    """a = √ᾱ · left(t)[f], s = √(1 - ᾱ), and a clean end at t = 0."""

    def noise(t: Array) -> Array:
        return jnp.where(t > 0, jnp.sqrt(jax.nn.sigmoid(-logsnr(t))), 0)

    def attenuation(t: Array) -> Array:
        scale = jnp.where(t > 0, jnp.sqrt(jax.nn.sigmoid(logsnr(t))), 1)
        return scale[..., None, None, None] * left(t)

    return Process(image_shape, blurs, blur, noise, attenuation, draw_levels, 1.0, _uniform)


def ddpm(image_shape: tuple[int, int, int], schedule: str = "linear", steps: int = 1000) -> Process:
    """Denoising diffusion, z_t = √ᾱ z_0 + √(1 - ᾱ) ε.

    Args:
      image_shape: (height, width, channels).
      schedule: "linear", Ho et al.'s, trained at the `steps` levels t = k / K; or "cosine", in continuous time.
      steps: K ≥ 1, for the linear schedule.
    """
    image_shape = check_shape(image_shape)
    schedules = {
        "linear": (
            lambda t: linear_logsnr(t, steps),
            lambda key, n: jax.random.randint(key, (n,), 1, steps + 1).astype(jnp.float32) / steps,
        ),
        "cosine": (cosine_logsnr, _continuous),
    }
    if schedule not in schedules:
        raise ValueError(f"unknown schedule {schedule!r} of denoising diffusion; choose one of {', '.join(schedules)}")
    # Fewer steps would need a β above 1 at the end of the path.
    _require(25, steps=steps)
    ones = np.ones((*image_shape[:2], 1), np.float32)
    return _variance_preserving(
        image_shape, *schedules[schedule], jnp.zeros_like, lambda t: jnp.asarray(ones, t.dtype), blurs=False
    )


def _continuous(key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
    """t ~ U(0, 1], never 0."""
    return 1 - jax.random.uniform(key, (n,), jnp.float32)


def blurring(image_shape: tuple[int, int, int], blur_max: float = 20.0, d_min: float = 0.001) -> Process:
    """Blurring diffusion: the cosine schedule, times a blur that leaves at least `d_min` of each frequency.

    a = √ᾱ(t) ((1 - d_min) exp(-σ_B² λ / 2) + d_min), σ_B(t) = blur_max sin²(π t / 2).

    Args:
      image_shape: (height, width, channels).
      blur_max: σ_B at t = 1 in pixels, ≥ 0; with 0 this is denoising diffusion with the cosine schedule.
      d_min: In (0, 1].
    """
    height, width, _ = image_shape = check_shape(image_shape)
    _require(0, blur_max=blur_max)
    if not 0 < d_min <= 1:
        raise ValueError(f"d_min must lie in (0, 1], not {d_min}: what blur leaves must not vanish, or ε has no x0")

    def blur(t: Array) -> Array:
        return blur_max * jnp.square(jnp.sin(jnp.pi / 2 * t))

    def left(t: Array) -> Array:
        return (1 - d_min) * dct.attenuation(blur(t), height, width) + d_min

    return _variance_preserving(image_shape, cosine_logsnr, _continuous, blur, left, blurs=blur_max > 0)


# ── Systems that start from a blurred image ──────────────────────────────────────────────────────────────────────────


def low_frequencies(x: Float[Array, "n h w c"], alpha: float) -> Float[Array, "n k l c"]:
    """The DCT coefficients of images of which a blur of `alpha` pixels leaves anything; enough to draw a start from."""
    left = np.asarray(dct.attenuation(jnp.asarray(alpha, jnp.float32), *x.shape[1:3]))[..., 0] > NOTHING_LEFT
    return dct.dct2(x)[:, : left[:, 0].sum(), : left[0].sum()]


def blurred_images(image_shape: tuple[int, int, int], low: Float[np.ndarray, "n k l c"], alpha: float) -> Start:
    """Draws one of n images, blurred by `alpha` pixels; `low` is `low_frequencies` of them."""
    height, width, _ = image_shape
    left = np.asarray(dct.attenuation(jnp.asarray(alpha, jnp.float32), height, width))
    rows, columns = low.shape[1:3]
    low = np.asarray(low, np.float32) * left[:rows, :columns]

    def draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        index = jax.random.randint(key, shape[:-3], 0, len(low))
        edges = [(0, 0)] * (len(shape) - 3) + [(0, height - rows), (0, width - columns), (0, 0)]
        return dct.idct2(jnp.pad(jnp.asarray(low)[index], edges))

    return draw


def mean_colours(image_shape: tuple[int, int, int], low: Float[np.ndarray, "n k l c"]) -> Start:
    """Draws images of one colour each, from the Gaussian fitted to the mean colours of n images."""
    height, width, channels = image_shape
    colours = np.asarray(low[:, 0, 0], np.float64) / np.sqrt(height * width)  # dct2 is orthonormal
    mean = colours.mean(0).astype(np.float32)
    covariance = (
        np.cov(colours, rowvar=False).reshape(channels, channels) if len(colours) > 1 else np.zeros((channels,) * 2)
    )
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)

    def draw(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        normal = jax.random.normal(key, (*shape[:-3], channels), jnp.float32)
        colour = mean + jnp.einsum("ij,...j->...i", root, normal, precision=jax.lax.Precision.HIGHEST)
        return jnp.broadcast_to(colour[..., None, None, :], shape)

    return draw


def _steps_of(steps: int) -> Callable[[PRNGKeyArray, int], Array]:
    return lambda key, n: jax.random.randint(key, (n,), 1, steps + 1).astype(jnp.float32)


def ihdm_blurs(steps: int, blur_min: float, blur_max: float) -> np.ndarray:
    """σ_B of k = 0, …, K in pixels, float64 `[K + 1]`: 0, then from `blur_min` to `blur_max` in equal ratios."""
    _require(1, steps=steps)
    if not 0 < blur_min <= blur_max < float("inf"):
        raise ValueError(f"blurs need 0 < blur_min ≤ blur_max, not blur_min={blur_min}, blur_max={blur_max}")
    return np.append(0, np.geomspace(blur_max, blur_min, steps)[::-1])


def ihdm(
    image_shape: tuple[int, int, int],
    start: Start,
    steps: int = 200,
    blur_min: float = 0.5,
    blur_max: float = 24.0,
    noise: float = 0.02,
) -> Process:
    """Inverse heat dissipation: blur alone, but for a little noise, and a model that goes one step back.

    x_k = B_k x0 + noise · ε, and D is B_{k-1} x0. There is no state whose noise could be told from its image, so no ε
    and no x0: it is sampled in its own K steps by `perturb` only.

    Args:
      image_shape: (height, width, channels).
      start: Draws B_K x0, see `blurred_images`.
      steps: K ≥ 1.
      blur_min: σ_B at k = 1, pixels, > 0; at k = 0 there is none.
      blur_max: σ_B at k = K.
      noise: σ in training, in units of images on [-1, 1]: twice the paper's 0.01 on [0, 1].
    """
    height, width, _ = image_shape = check_shape(image_shape)
    blurs = ihdm_blurs(steps, blur_min, blur_max)
    _require(0, noise=noise)

    def blur(t: Array) -> Array:
        return jnp.asarray(blurs, t.dtype)[jnp.round(t).astype(jnp.int32)]

    def grid(n: int) -> np.ndarray:
        if n != steps:
            raise ValueError(f"inverse heat dissipation goes one level a step: it takes {steps} steps, not {n}")
        return np.arange(steps, -1, -1.0)

    return Process(
        image_shape=image_shape,
        blurs=True,
        blur=blur,
        noise=lambda t: jnp.where(t > 0, noise, 0).astype(t.dtype),
        attenuation=lambda t: dct.attenuation(blur(t), height, width),
        draw_levels=_steps_of(steps),
        highest=float(steps),
        grid=grid,
        solvers=("perturb",),
        refusal="it predicts the next less blurred image, and so neither ε nor x0",
        start=start,
        target=lambda t: t - 1,
    )


def cold_blurs(stds: np.ndarray, size: int) -> np.ndarray:
    """The blur of k = 0, …, K convolutions with sampled Gaussian kernels of `size` taps, pixels, float64 `[K + 1]`.

    Variances of convolutions add; that of a kernel of few taps is less than its std squared.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 3, not {size}")
    taps = np.arange(size) - size // 2
    kernels = np.exp(-(taps**2) / (2 * np.square(np.asarray(stds, np.float64))[:, None]))
    return np.append(0, np.sqrt(np.cumsum((kernels * taps**2).sum(1) / kernels.sum(1))))


def cold_kernels(kind: str, steps: int) -> np.ndarray:
    """The std of kernel i = 0, …, `steps` - 1: "linear" 0.35 + i/100 (CIFAR-10), "exponential" e^(0.01 i) (128²)."""
    _require(1, steps=steps)
    i = np.arange(steps)
    kinds = {"linear": 0.35 + i / 100, "exponential": np.exp(0.01 * i)}
    if kind not in kinds:
        raise ValueError(f"unknown kernels {kind!r} of cold diffusion; choose one of {', '.join(kinds)}")
    return kinds[kind]


def cold(image_shape: tuple[int, int, int], start: Start, blurs: np.ndarray, symmetry_noise: float = 0.002) -> Process:
    """Cold diffusion: blur without noise; a model that predicts x0, and Algorithm 2, which is Euler's step with s = 0.

    x_{k-1} = x_k - B_k x̂0 + B_{k-1} x̂0. Any subset of the levels can be sampled on.

    Args:
      image_shape: (height, width, channels).
      start: Draws B_K x0, see `mean_colours` and `blurred_images`.
      blurs: Pixels at k = 0, …, K; 0 at k = 0, then rising, see `cold_blurs`.
      symmetry_noise: Std of the noise added once, where sampling starts, as images of one colour are all symmetric.
    """
    height, width, _ = image_shape = check_shape(image_shape)
    _require(0, symmetry_noise=symmetry_noise)
    if len(blurs) < 2 or blurs[0] != 0 or not np.all(np.diff(blurs) > 0) or not np.isfinite(blurs[-1]):
        raise ValueError(f"the blurs of cold diffusion must begin with 0, rise, and be finite; got {blurs}")
    steps = len(blurs) - 1

    def blur(t: Array) -> Array:
        return jnp.asarray(blurs, t.dtype)[jnp.round(t).astype(jnp.int32)]

    def grid(n: int) -> np.ndarray:
        if n > steps:
            raise ValueError(f"this cold diffusion has {steps} levels; it cannot be sampled in {n} steps")
        return np.round(np.linspace(steps, 0, n + 1))

    def noisy(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        start_key, noise_key = jax.random.split(key)
        return start(start_key, shape) + symmetry_noise * jax.random.normal(noise_key, shape, jnp.float32)

    return Process(
        image_shape=image_shape,
        blurs=True,
        blur=blur,
        noise=jnp.zeros_like,
        attenuation=lambda t: dct.attenuation(blur(t), height, width),
        draw_levels=_steps_of(steps),
        highest=float(steps),
        grid=grid,
        solvers=("euler", "heun"),
        refusal="it adds no noise, so it has no score",
        start=noisy,
    )
