"""The layers that the U-Nets share: resampling, folding, and Flax's layers under one rule of precision.

Parameters are float32, and so is what a layer returns. `dtype=bfloat16` touches convolutions and attention products
only; `float32` means float32: no TF32 or bfloat16 passes.
"""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from warm_jax.models.geometry import groups

Initializer = nn.initializers.Initializer


def resample(
    x: Float[Array, "b h w c"], taps: tuple[float, ...], stride: int, interior: int, padding: int
) -> Float[Array, "b k l c"]:
    """Correlate with `taps`, after `interior` zeros between pixels and `padding` around; keep each `stride`-th pixel.

    As shifted sums in float32: exact on every backend, fused by XLA, and ten times as fast as a depthwise convolution
    on a CPU.
    """
    for axis in (1, 2):
        edges = [(0, 0, 0)] * 4
        edges[axis] = (padding, padding, interior)
        padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
        span = padded.shape[axis] - len(taps) + 1
        x = sum(tap * lax.slice_in_dim(padded, k, k + span, stride, axis) for k, tap in enumerate(taps))
    return x


def downsample(x: Float[Array, "b h w c"], taps: tuple[float, ...]) -> Float[Array, "b h//2 w//2 c"]:
    """Filter with the outer product of `taps` (sum 1), (len - 1) // 2 zeros outside, and keep every second pixel."""
    return resample(x, taps, stride=2, interior=0, padding=(len(taps) - 1) // 2)


def upsample(x: Float[Array, "b h w c"], taps: tuple[float, ...]) -> Float[Array, "b 2*h 2*w c"]:
    """Four times the transpose of `downsample` (two a side), as the taps are symmetric."""
    return resample(x, tuple(2 * tap for tap in taps), stride=1, interior=1, padding=len(taps) // 2)


def space_to_depth(x: Float[Array, "b h w c"], p: int) -> Float[Array, "b h//{p} w//{p} c*{p}*{p}"]:
    """Each patch of `p` × `p` pixels becomes one, its channels ordered (row, column, channel)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // p, w // p, p * p * c)


def depth_to_space(x: Float[Array, "b h w c"], p: int) -> Float[Array, "b h*{p} w*{p} c//({p}*{p})"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, p, p, c // p**2).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c // p**2)


def conv(
    name: str,
    x: Float[Array, "b h w c"],
    features: int,
    size: int,
    dtype: Any,
    kernel_init: Initializer,
    bias_init: Initializer = nn.initializers.zeros,
    padding: Any = "SAME",
) -> Float[Array, "b k l {features}"]:
    """A `size` × `size` convolution with bias, computed in `dtype`, returned in float32."""
    layer = nn.Conv(
        features,
        (size, size),
        padding=padding,
        dtype=dtype,
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        kernel_init=kernel_init,
        bias_init=bias_init,
        name=name,
    )
    return layer(x).astype(jnp.float32)


def dense(
    name: str, x: Float[Array, "b c"], features: int, kernel_init: Initializer, bias_init: Initializer | None = None
) -> Float[Array, "b {features}"]:
    """An embedding's linear layer: always float32. No bias where it has no `bias_init`."""
    layer = nn.Dense(
        features,
        use_bias=bias_init is not None,
        precision=lax.Precision.HIGHEST,
        kernel_init=kernel_init,
        bias_init=bias_init or nn.initializers.zeros,
        name=name,
    )
    return layer(x)


def norm(name: str, x: Float[Array, "b h w c"], epsilon: float, one_pass: bool) -> Float[Array, "b h w c"]:
    """GroupNorm over `groups(c)` groups, in float32, its variance from the differences to the mean.

    With `one_pass` it is the mean square less the squared mean, so that both need one reading of memory. That costs
    digits beside a large mean: four are left where the variance is 1 % of the squared mean.
    """
    made = nn.GroupNorm(groups(x.shape[-1]), epsilon=epsilon, use_fast_variance=one_pass, dtype=jnp.float32, name=name)
    return made(x)


def attend(qkv: Float[Array, "b h w c"], heads: int, dtype: Any) -> Float[Array, "b h w c//3"]:
    """Attention between all pixels: products in `dtype`, softmax in float32, scale 1/√(channels of a head).

    The channels are those of q, then of k, then of v, and in each one head after another. The result is of `dtype`.
    """
    b, h, w, c = qkv.shape
    split = qkv.reshape(b, h * w, 3, heads, c // (3 * heads)).astype(dtype)
    q, k, v = (split[:, :, i] for i in range(3))
    # The function takes no precision and would ask for the backend's fastest; and in bfloat16 it promotes dtypes.
    full = dtype == jnp.float32
    precision = jax.default_matmul_precision("highest") if full else contextlib.nullcontext()
    with precision, jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c // 3)


def check_second(second: Array | None, expected: bool) -> None:
    """Raise ValueError where the second condition is missing, or given to a network built without."""
    if expected != (second is not None):
        given = "missing" if second is None else "given"
        raise ValueError(f"second_condition is {expected}, but the second condition is {given}")


def labels_or_zeros(
    name: str, labels: Float[Array, "b n"] | None, embedding: Float[Array, "b w"], length: int
) -> Float[Array, "b {length}"]:
    """The labels in float32, for None zeros; ValueError where their length is not what layer `name` was built for."""
    if labels is None:
        # By its shape, not `len`: an exported program's batch is a symbol.
        return jnp.zeros((embedding.shape[0], length))
    if labels.shape[-1] != length:
        raise ValueError(f"labels of length {labels.shape[-1]} for {name}: this network was built for {length}")
    return labels.astype(jnp.float32)
