"""The layers that the U-Nets share: resampling, folding, and Flax's layers under one rule of precision.

Parameters are float32, and so are sums of them: biases are added in float32, outside of the convolution, since inside
its gradient would be summed in the convolution's dtype. `Policy` says what else is: `dtype=bfloat16` is for
convolutions and attention products and, where memory is what limits, for what lies between blocks; `float32` means
float32: no TF32 or bfloat16 passes.
"""

import contextlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from warm_jax.models.geometry import groups
from warm_jax.models.normalization import by_autodiff, norm_act

Initializer = nn.initializers.Initializer
GPUS = ("gpu", "cuda", "rocm")  # as JAX names their platforms


class Policy(NamedTuple):
    """What a network computes how.

    products  dtype of convolutions and attention products, and so of what goes into them
    stream    dtype of what lies in memory between blocks, of skips, and of what convolutions return
    one_pass  whether norms read their input once (`normalization.py`)
    own_derivative  whether norms have the derivative that is written there, or autodiff's
    """

    products: Any
    stream: Any
    one_pass: bool
    own_derivative: bool = True


def policy(dtype: Any, platform: str) -> Policy:
    """The policy of `dtype`, float32 or bfloat16, on a platform: all that is chosen by platform is chosen here.

    A GPU's step is limited by the bytes that it moves, so there the stream is of the products' dtype and norms read
    once. A TPU's computes for longer than it moves, and each of these made more traffic and temporaries there.
    """
    dtype, on_gpu = jnp.dtype(dtype), platform in GPUS
    return Policy(dtype, dtype if on_gpu else jnp.dtype(jnp.float32), on_gpu, platform != "tpu")


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


@jax.custom_vjp
def _rounded(kernel: Float[Array, "k l c f"]) -> Float[Array, "k l c f"]:
    """A kernel in bfloat16, whose gradient comes back in the kernel's own order of memory.

    A GPU's convolution writes it in another, in which its compiler would else compute the optimizer's update, and copy
    the results into the order of the state.
    """
    return kernel.astype(jnp.bfloat16)


def _rounded_forward(kernel: Array) -> tuple[Array, None]:
    return _rounded(kernel), None


def _rounded_backward(_: None, gradient: Array) -> tuple[Array]:
    return (with_layout_constraint(gradient, Layout((0, 1, 2, 3))).astype(jnp.float32),)


_rounded.defvjp(_rounded_forward, _rounded_backward)


class Convolution(nn.Module):
    """A `size` × `size` convolution in `dtype`, and its bias apart, float32: `(product, bias)`."""

    features: int
    size: int
    dtype: Any
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros
    padding: Any = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b k l f"], Float[Array, " f"]]:
        """The product has the dtype of the products."""
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        pad = self.padding if isinstance(self.padding, str) else [(self.padding, self.padding)] * 2
        product = lax.conv_general_dilated(
            x.astype(self.dtype),
            _rounded(kernel) if self.dtype == jnp.bfloat16 else kernel,
            (1, 1),
            pad,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST if self.dtype == jnp.float32 else None,
        )
        return product, bias


def add(first: Float[Array, "b h w c"], *others: Array, scale: float = 1.0, dtype: Any) -> Float[Array, "b h w c"]:
    """The sum in float32, multiplied by `scale`, in `dtype`."""
    total = first.astype(jnp.float32)
    for other in others:
        total = total + other.astype(jnp.float32)
    return (total if scale == 1 else total * scale).astype(dtype)


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


class Norm(nn.Module):
    """GroupNorm over `groups(c)` groups and what follows it (`normalization.norm_act`): SiLU, dropout, a cast.

    `shift` `[b, c]` is added first; of the result n `scaled` and `shifted` `[b, c]` make (scaled + 1) n + shifted.
    `dropout` is the rate in force, drawn from the rng collection "dropout".
    """

    epsilon: float
    policy: Policy
    silu: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        shift: Array | None = None,
        scaled: Array | None = None,
        shifted: Array | None = None,
        mask: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """`mask` says what dropout keeps. The result is of the products' dtype, as a convolution takes it."""
        b, c = x.shape[0], x.shape[-1]
        gain = jnp.broadcast_to(self.param("scale", nn.initializers.ones, (c,)), (b, c))
        offset = jnp.broadcast_to(self.param("bias", nn.initializers.zeros, (c,)), (b, c))
        if scaled is not None:
            gain, offset = gain * (scaled + 1), offset * (scaled + 1) + shifted
        shift = jnp.zeros((b, c)) if shift is None else jnp.broadcast_to(shift, (b, c))
        return (norm_act if self.policy.own_derivative else by_autodiff)(
            x,
            shift,
            gain,
            offset,
            mask,
            groups(c),
            self.epsilon,
            self.policy.one_pass,
            self.silu,
            1 - self.dropout,
            self.policy.products,
        )


class Dropout(nn.Module):
    """Which elements of an array of `shape` are kept, drawn as Flax's layer of this name does; None at rate 0."""

    rate: float

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> Array | None:
        """bool `shape`."""
        return jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape) if self.rate else None


def attend(qkv: Float[Array, "b h w c"], heads: int) -> Float[Array, "b h w c//3"]:
    """Attention between all pixels: products in the dtype of `qkv`, softmax in float32, scale 1/√(channels of a head).

    The channels are those of q, then of k, then of v, and in each one head after another.
    """
    b, h, w, c = qkv.shape
    split = qkv.reshape(b, h * w, 3, heads, c // (3 * heads))
    q, k, v = (split[:, :, i] for i in range(3))
    # The function takes no precision and would ask for the backend's fastest; and in bfloat16 it promotes dtypes.
    full = qkv.dtype == jnp.float32
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
