r"""The frequency domain: orthonormal DCT-II, and Gaussian blur as an attenuation of frequencies (docs/method.md §2).

`Q[k, n] = sqrt((2 - [k=0]) / N) · cos(π (n + ½) k / N)` is orthonormal, and `dct2(x) = Q_H x Q_Wᵀ` for each
channel. It diagonalises the heat equation with reflecting borders: run for time α²/2 it multiplies the frequency
(k, l) by

    a_α[k, l] = exp(-α² λ[k, l] / 2),      λ[k, l] = (π k / H)² + (π l / W)²,

which is a blur of standard deviation α pixels. Everything here is a matrix product at full float32 precision: TPUs
multiply in bfloat16 and newer GPUs in TF32 unless told otherwise, and three digits do not survive the differences
that a sampler takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def matrix(n: int) -> np.ndarray:
    """The orthonormal DCT-II matrix `[n, n]` in float64; row k is the cosine of frequency k. Read-only."""
    if n < 1:
        raise ValueError(f"a DCT needs at least 1 sample, not {n}")
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    q = np.sqrt((2 - (k == 0)) / n) * np.cos(np.pi * (j + 0.5) * k / n)
    q.flags.writeable = False
    return q


def _apply(rows: np.ndarray, columns: np.ndarray, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    x = jnp.einsum("kh,...hwc->...kwc", rows, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("lw,...kwc->...klc", columns, x, precision=jax.lax.Precision.HIGHEST)


def dct2(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Orthonormal DCT-II over height and width; the same as `scipy.fft.dctn(x, axes=(-3, -2), norm="ortho")`."""
    return _apply(matrix(x.shape[-3]), matrix(x.shape[-2]), x)


def idct2(z: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """The inverse (and transpose) of `dct2`."""
    return _apply(matrix(z.shape[-3]).T, matrix(z.shape[-2]).T, z)


def squared_frequencies(height: int, width: int) -> np.ndarray:
    """λ `[height, width]` in (radians / pixel)², float64: λ[0, 0] = 0, the largest below 2π²."""
    k, j = np.arange(height)[:, None] / height, np.arange(width)[None, :] / width
    return np.pi**2 * (k**2 + j**2)


def attenuation(alpha: Float[Array, "*b"], height: int, width: int) -> Float[Array, "*b {height} {width} 1"]:
    """What a blur of standard deviation `alpha` pixels (≥ 0) leaves of each frequency: (0, 1], 1 at frequency 0."""
    alpha = jnp.asarray(alpha)
    decay = jnp.asarray(squared_frequencies(height, width) / 2, alpha.dtype)
    return jnp.exp(-jnp.square(alpha)[..., None, None] * decay)[..., None]


def blur(x: Float[Array, "*b h w c"], alpha: float | Float[Array, "..."]) -> Float[Array, "*b h w c"]:
    """Gaussian blur of `alpha` pixels (≥ 0, a scalar or one value an image) with reflecting borders: B_α x."""
    alpha = jnp.asarray(alpha, x.dtype)
    if alpha.shape not in ((), x.shape[:-3]):
        raise ValueError(f"alpha has shape {alpha.shape}; images {x.shape} need () or {x.shape[:-3]}")
    return idct2(attenuation(alpha, x.shape[-3], x.shape[-2]) * dct2(x))


def power(x: Float[Array, "b h w c"]) -> Float[Array, "h w"]:
    """The data's mean DCT power P[f] = E[dct(x)²] (not centred), averaged over images and channels."""
    return jnp.mean(jnp.square(dct2(x)), axis=(0, 3))
