r"""GroupNorm and what follows it, as one operation with a derivative of its own: norm → affine → SiLU → dropout.

Of x `[b, h, w, c]` and numbers `[b, c]` it makes, in float32 (float64 where x is),

    u = x + shift          û = (u - μ) r,   μ and r = 1/√(var + ε) of each image and group
    z = û · gain + offset                   y = SiLU(z) · mask / kept

and returns y in `dtype`. What enters as `[b, c]` serves every network here: `shift` is the bias of the convolution
before and, in DDPM++ and NCSN++, the embedding; `gain` and `offset` are the norm's own scale and bias, in ADM scaled
and shifted by the embedding.

The derivative. With n elements a group, sums Σ over one image's pixels, dz = dy · mask / kept · SiLU'(z),

    s₁ = Σ dz,   s₂ = Σ dz · x                                 (one reading of x and dy)
    d offset = s₁
    d gain   = Σ dz û = r (s₂ + (shift - μ) s₁)
    m₁ = Σ_group gain · s₁ / n,   m₂ = Σ_group gain · d gain / n
    dx = r (gain · dz - m₁ - m₂ û)                             (a second reading of x and dy)
    d shift  = Σ dx = r (gain · s₁ - h w m₁ - m₂ Σ û),   Σ û = r (Σ x + h w (shift - μ))

so that of the large arrays only x is kept, in whatever dtype it came, and each is read twice on the way there and twice
on the way back. Autodiff keeps û, z and SiLU'(z) in float32, and reads them again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _spread(values: Float[Array, "b c"]) -> Float[Array, "b 1 1 c"]:
    return values[:, None, None, :]


def _by_group(values: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """The mean over the channels of each group, for each of its channels."""
    b, c = values.shape
    means = jnp.mean(values.reshape(b, groups, c // groups), axis=-1, keepdims=True)
    return jnp.broadcast_to(means, (b, groups, c // groups)).reshape(b, c)


def _two_sums(one: Float[Array, "b h w c"], other: Float[Array, "b h w c"], together: bool) -> tuple[Array, Array]:
    """Σ over the pixels of two arrays; with `together` by one reduction of complex numbers.

    XLA's GPU compiler makes two reductions of two sums, or one that first stores in memory what they share.
    """
    if together:
        total = jnp.sum(lax.complex(one, other), axis=(1, 2))
        return jnp.real(total), jnp.imag(total)
    return jnp.sum(one, axis=(1, 2)), jnp.sum(other, axis=(1, 2))


def _statistics(
    x: Float[Array, "b h w c"], shift: Float[Array, "b c"], groups: int, epsilon: float, one_pass: bool
) -> tuple[Float[Array, "b c"], Float[Array, "b c"], Float[Array, "b c"]]:
    """Σ x over the pixels; μ and r of u = x + shift.

    With `one_pass` the variance is the mean square less the squared mean, so that x is read once. That costs digits
    beside a large mean: four are left where the variance is 1 % of the squared mean.
    """
    pixels, wide = x.shape[1] * x.shape[2], _wide(x)
    if one_pass:
        total, squares = _two_sums(wide, wide * wide, one_pass)
        mean = _by_group(total / pixels + shift, groups)
        square = _by_group(squares / pixels + shift * (2 * total / pixels + shift), groups)
        variance = jnp.maximum(square - mean * mean, 0)
    else:
        total = jnp.sum(wide, axis=(1, 2))
        mean = _by_group(total / pixels + shift, groups)
        variance = _by_group(jnp.mean(jnp.square(wide - _spread(mean - shift)), axis=(1, 2)), groups)
    return total, mean, lax.rsqrt(variance + epsilon)


def _activate(z: Float[Array, "b h w c"], silu: bool) -> Float[Array, "b h w c"]:
    return z * jax.nn.sigmoid(z) if silu else z


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9, 10))
def norm_act(
    x: Float[Array, "b h w c"],
    shift: Float[Array, "b c"],
    gain: Float[Array, "b c"],
    offset: Float[Array, "b c"],
    mask: Bool[Array, "b h w c"] | None,
    groups: int,
    epsilon: float,
    one_pass: bool,
    silu: bool,
    kept: float,
    dtype: Any,
) -> Float[Array, "b h w c"]:
    """SiLU(norm(x + shift) · gain + offset), dropped where `mask` is False and divided by `kept`; in `dtype`.

    x may be of any float dtype; all else is float32. `silu` False leaves the SiLU out, `mask` None the dropout.
    """
    return _forward(x, shift, gain, offset, mask, groups, epsilon, one_pass, silu, kept, dtype)[0]


def by_autodiff(*args) -> Float[Array, "b h w c"]:
    """The same as `norm_act`, differentiated by JAX."""
    return _forward(*args)[0]


def _forward(x, shift, gain, offset, mask, groups, epsilon, one_pass, silu, kept, dtype):
    total, mean, r = _statistics(x, shift, groups, epsilon, one_pass)
    z = (_wide(x) + _spread(shift - mean)) * _spread(r * gain) + _spread(offset)
    y = _activate(z, silu)
    if mask is not None:
        y = jnp.where(mask, y / kept, 0)
    return y.astype(dtype), (x, shift, gain, offset, mask, total, mean, r)


def _backward(groups, epsilon, one_pass, silu, kept, dtype, saved, dy):
    x, shift, gain, offset, mask, total, mean, r = saved
    pixels = x.shape[1] * x.shape[2]

    def through_activation(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        """x and dz, float32."""
        wide, dz = _wide(x), _wide(dy)
        if mask is not None:
            dz = jnp.where(mask, dz / kept, 0)
        if silu:
            z = (wide + _spread(shift - mean)) * _spread(r * gain) + _spread(offset)
            s = jax.nn.sigmoid(z)
            dz = dz * (s * (1 + z * (1 - s)))
        return wide, dz

    wide, dz = through_activation(x, dy, mask)
    s1, s2 = _two_sums(dz, dz * wide, one_pass)
    # Computed again of what is in memory: the compiler would store dz in float32 for the second reading.
    wide, dz = through_activation(*lax.optimization_barrier((x, dy, mask)))
    d_gain = r * (s2 + (shift - mean) * s1)
    m1, m2 = _by_group(gain * s1 / pixels, groups), _by_group(gain * d_gain / pixels, groups)
    # r (gain dz - m₁ - m₂ û) as dz · P + x · Q + R, with numbers for each image and channel.
    q = -m2 * r * r
    dx = dz * _spread(r * gain) + wide * _spread(q) + _spread(q * (shift - mean) - r * m1)
    d_shift = r * (gain * s1 - pixels * m1 - m2 * r * (total + pixels * (shift - mean)))
    return dx.astype(x.dtype), d_shift, d_gain, s1, None


norm_act.defvjp(_forward, _backward)
