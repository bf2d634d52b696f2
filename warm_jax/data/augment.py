r"""Augmentation on the device: EDM's nine labels (Karras et al. 2022, appendix F.2), and plain flips.

An image is mirrored exactly, and then warped once by the inverse of

    G = translation · anisotropy · rotation · scale

about its centre, x to the right and y down. The warp reflects the image at its borders (W-1 and H-1 pixels), doubles
its resolution with the low-pass filter h of the sym6 wavelet, looks up each pixel bilinearly, and halves it with the
same filter. √2 h up and its transpose h/√2 down undo each other, because h is orthogonal to its own even shifts: the
warp by the identity changes nothing. Padding, doubling and halving are matrices, built once in numpy for each size:

    up = U_H x U_Wᵀ      [H, W] -> [2(3H-2), 2(3W-2)]          down = D_H v D_Wᵀ      [2H+10, 2W+10] -> [H, W]

The labels are zero where nothing was done; at sampling they are all zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

LABELS = 9

# The 12 taps of sym6's low-pass decomposition filter: I. Daubechies, Ten Lectures on Wavelets (1992), table 6.3,
# "least asymmetric", N = 6, in PyWavelets' order and scale (sum √2).
SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
        *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
        *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ]
)
# Pixel i reaches fine sample j through tap j - 2i + 5. The filter's centre of mass is at tap 5.1, so that pixel i is
# centred on fine sample 2i: half a fine sample before where a symmetric filter's would be. EDM shifts by the same half.
_CENTRE_TAP = 5
_REACH = len(SYM6) - 1 - _CENTRE_TAP  # the last fine sample that pixel i touches is 2i + 6


class Draws(NamedTuple):
    """What is done to each image; zero is nothing. Angles in radians, counter-clockwise as one sees it."""

    x_flip: Float[Array, " b"]  # 0 or 1
    y_flip: Float[Array, " b"]
    scale: Float[Array, " b"]  # × 2^(0.2 w)
    rotation: Float[Array, " b"]
    anisotropy: Float[Array, " b"]  # × 2^(0.2 w) along `axis`, × 2^(-0.2 w) across it
    axis: Float[Array, " b"]
    translation: Float[Array, "b 2"]  # in eighths of the width to the right, of the height down


def augment(
    key: Key[Array, ""], images: Float[Array, "b h w c"], probability: float
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 9"]]:
    """Augmented images and their labels; each transform but the x-flip is done with `probability`, on its own."""
    if not 0 <= probability <= 1:
        raise ValueError(f"the augmentation probability is {probability}; it must be between 0 and 1")
    draws = draw(key, images.shape[0], probability)
    return transform(images, draws), labels(draws)


def flip(key: Key[Array, ""], images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Half of the images, mirrored left to right; no label tells which."""
    return _mirror(images, jax.random.bernoulli(key, 0.5, images.shape[:1]), axis=2)


def draw(key: Key[Array, ""], count: int, probability: float) -> Draws:
    """What to do to `count` images, by recipes of EDM's CIFAR-10, FFHQ and AFHQ models."""
    keys = iter(jax.random.split(key, 14))

    def sometimes(values: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        done = jax.random.bernoulli(next(keys), probability, (count,) + (1,) * (values.ndim - 1))
        return jnp.where(done, values, 0.0)

    def coin() -> Float[Array, " b"]:
        return jax.random.bernoulli(next(keys), 0.5, (count,)).astype(jnp.float32)

    def angle() -> Float[Array, " b"]:
        return jax.random.uniform(next(keys), (count,), minval=-jnp.pi, maxval=jnp.pi)

    def normal(*shape: int) -> Float[Array, "..."]:
        return jax.random.normal(next(keys), (count, *shape))

    return Draws(
        x_flip=coin(),
        y_flip=sometimes(coin()),
        scale=sometimes(normal()),
        rotation=sometimes(angle()),
        anisotropy=sometimes(normal()),
        axis=coin() * angle(),
        translation=sometimes(normal(2)),
    )


def labels(draws: Draws) -> Float[Array, "b 9"]:
    """The nine numbers that tell the network what was done; all are 0 for an image as it is."""
    columns = [
        *(draws.x_flip, draws.y_flip, draws.scale),
        *(jnp.cos(draws.rotation) - 1, jnp.sin(draws.rotation)),
        *(draws.anisotropy * jnp.cos(draws.axis), draws.anisotropy * jnp.sin(draws.axis)),
        *(draws.translation[:, 0], draws.translation[:, 1]),
    ]
    return jnp.stack(columns, axis=1)


def transform(images: Float[Array, "b h w c"], draws: Draws) -> Float[Array, "b h w c"]:
    """Do to each image what `draws` says."""
    height, width = images.shape[1:3]
    images = _mirror(images, draws.x_flip == 1, axis=2)
    images = _mirror(images, draws.y_flip == 1, axis=1)
    shift = 0.125 * draws.translation * jnp.array([[width, height]], jnp.float32)
    return warp(images, _inverse(draws), shift)


def _mirror(images: Float[Array, "b h w c"], mirrored: Array, axis: int) -> Float[Array, "b h w c"]:
    return jnp.where(mirrored[:, None, None, None], jnp.flip(images, axis), images)


def _inverse(draws: Draws) -> Float[Array, "b 2 2"]:
    """(anisotropy · rotation · scale)⁻¹ on (x, y). Sums of products, not matmuls, which TPUs would do in bfloat16."""
    shrink = jnp.exp2(-0.2 * draws.scale)
    c, s = jnp.cos(draws.rotation), jnp.sin(draws.rotation)
    # With y down, counter-clockwise by w is [[c, s], [-s, c]]; its inverse, scaled:
    rotate = [[shrink * c, -shrink * s], [shrink * s, shrink * c]]
    # The axis is u = (cos r, -sin r): 1/a · u uᵀ + a · (1 - u uᵀ)
    along, across = jnp.exp2(-0.2 * draws.anisotropy), jnp.exp2(0.2 * draws.anisotropy)
    u, v = jnp.cos(draws.axis), -jnp.sin(draws.axis)
    mixed = (along - across) * u * v
    squeeze = [[across + (along - across) * u * u, mixed], [mixed, across + (along - across) * v * v]]
    rows = [[rotate[i][0] * squeeze[0][j] + rotate[i][1] * squeeze[1][j] for j in range(2)] for i in range(2)]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def warp(
    images: Float[Array, "b h w c"], inverse: Float[Array, "b 2 2"], shift: Float[Array, "b 2"]
) -> Float[Array, "b h w c"]:
    """Image b at the place p, in pixels (x, y) from the centre, takes the colour at `inverse` (p - `shift`)."""
    _, height, width, _ = images.shape
    fine = _separable(_upsample(height), _upsample(width), images)
    # Fine samples -5 … 2n+4 of the result (0 is on pixel 0), from the centre, in pixels: fine sample j is at j/2.
    y = jnp.asarray(np.arange(-_CENTRE_TAP, 2 * height - 1 + _REACH) / 2 - (height - 1) / 2, jnp.float32)
    x = jnp.asarray(np.arange(-_CENTRE_TAP, 2 * width - 1 + _REACH) / 2 - (width - 1) / 2, jnp.float32)
    x, y = x[None, None, :] - shift[:, 0, None, None], y[None, :, None] - shift[:, 1, None, None]
    a = inverse[:, :, :, None, None]
    from_x = a[:, 0, 0] * x + a[:, 0, 1] * y
    from_y = a[:, 1, 0] * x + a[:, 1, 1] * y
    # Of the padded image, pixel i is fine sample 2(i + n-1).
    columns = 2 * (from_x + (width - 1) / 2 + (width - 1))
    rows = 2 * (from_y + (height - 1) / 2 + (height - 1))
    return _separable(_downsample(height), _downsample(width), jax.vmap(_bilinear)(fine, rows, columns))


def _bilinear(image: Float[Array, "h w c"], y: Float[Array, "p q"], x: Float[Array, "p q"]) -> Float[Array, "p q c"]:
    """The image at the sample positions (y, x), zero outside."""
    height, width, _ = image.shape
    framed = jnp.pad(image, ((1, 1), (1, 1), (0, 0))).reshape((height + 2) * (width + 2), -1)
    y, x = jnp.clip(y + 1, 0, height + 1), jnp.clip(x + 1, 0, width + 1)
    top, left = jnp.minimum(jnp.floor(y), height), jnp.minimum(jnp.floor(x), width)
    down, right = (y - top)[..., None], (x - left)[..., None]
    corner = top.astype(jnp.int32) * (width + 2) + left.astype(jnp.int32)
    upper = framed[corner] * (1 - right) + framed[corner + 1] * right
    lower = framed[corner + width + 2] * (1 - right) + framed[corner + width + 3] * right
    return upper * (1 - down) + lower * down


def _separable(rows: np.ndarray, columns: np.ndarray, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    x = jnp.einsum("ph,bhwc->bpwc", rows, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("qw,bpwc->bpqc", columns, x, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _upsample(n: int) -> np.ndarray:
    """`[2(3n-2), n]`: reflect n-1 pixels at both ends, then double; gain 1."""
    reflected = np.pad(np.eye(n), ((n - 1, n - 1), (0, 0)), mode="reflect") if n > 1 else np.eye(1)
    fine = 2 * len(reflected)
    taps = np.arange(fine)[:, None] - 2 * np.arange(len(reflected))[None, :] + _CENTRE_TAP
    inside = (taps >= 0) & (taps < len(SYM6))
    return np.where(inside, np.sqrt(2) * SYM6[np.clip(taps, 0, len(SYM6) - 1)], 0) @ reflected


@functools.cache
def _downsample(n: int) -> np.ndarray:
    """`[n, 2n+10]`: halve, from the fine samples -5 … 2n+4; the transpose of doubling, gain 1."""
    taps = np.arange(2 * n + 10)[None, :] - 2 * np.arange(n)[:, None]
    inside = (taps >= 0) & (taps < len(SYM6))
    return np.where(inside, SYM6[np.clip(taps, 0, len(SYM6) - 1)] / np.sqrt(2), 0)
