r"""ADM, the U-Net of Dhariwal & Nichol 2021 (arXiv 2105.05233), in EDM's form for ImageNet-64.

One Linen module, `F(x, condition) -> [B, H, W, out_channels]`, called as `unet.UNet` is, and as ignorant of noise and
blur. Karras et al. 2022 (arXiv 2206.00364, table 7); beside DDPM++ in `unet.py`,

|                       | DDPM++                                | ADM                                            |
|-----------------------|---------------------------------------|------------------------------------------------|
| embedding in a block  | shifts the features                   | scales and shifts them, after the second norm  |
| attention             | one head; decoder: last block         | heads of 64 channels; decoder: every block     |
| sums                  | × √½                                  | as they are                                    |
| shortcut's layer      | where channels or resolution change   | where channels change                          |
| noise embedding       | sin, cos; frequencies to 1/10000      | cos, sin; frequencies that stop short of it    |
| class label           | × √classes, with bias, before the MLP | bias-free, after the MLP                       |
| GroupNorm's epsilon   | 1e-6                                  | 1e-5                                           |
| initial weights       | Xavier-uniform, biases 0, ends × 1e-5 | uniform ±1/√fan-in, biases too, ends 0         |

The parameter tree is named as there: `enc_64x64_block0`, `dec_8x8_in0` (height × width after patching), each with
`norm0 conv0 affine norm1 conv1 [skip] [norm2 qkv proj]`. So is precision (`layers.Policy`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from warm_jax.models.geometry import LIMITED, STYLES, check_geometry, check_network
from warm_jax.models.layers import (
    Convolution,
    Dropout,
    Initializer,
    Norm,
    Policy,
    add,
    attend,
    check_second,
    dense,
    depth_to_space,
    downsample,
    labels_or_zeros,
    policy,
    space_to_depth,
    upsample,
)

_STYLE = STYLES["adm"]
_ZEROS = nn.initializers.zeros


def _uniform(fan_in: int) -> Initializer:
    """Uniform on ±1/√fan-in, for kernels and biases: biases cannot tell the fan-in from their shape."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return draw


def _conv(name: str, x: Array, features: int, size: int, how: Policy, zero: bool = False) -> tuple[Array, Array]:
    """`(product, bias)` of a convolution."""
    init = _ZEROS if zero else _uniform(size * size * x.shape[-1])
    return Convolution(features, size, how.products, init, init, name=name)(x)


def _dense(name: str, x: Array, features: int) -> Array:
    init = _uniform(x.shape[-1])
    return dense(name, x, features, init, init)


def _norm(name: str, how: Policy, **options: Any) -> Norm:
    return Norm(1e-5, how, name=name, **options)


def sinusoids(x: Float[Array, " b"], channels: int) -> Float[Array, "b {channels}"]:
    """[cos(x f), sin(x f)], f_i = (1/10000)^(i / half) for i < half = `channels` / 2: 1/10000 itself is not reached."""
    half = channels // 2
    angle = x[:, None] * jnp.asarray(1e-4 ** (np.arange(half) / half), jnp.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Block(nn.Module):
    """A residual block, resampled on its way when `resample` is "down" or "up", and then attention if asked for.

    The embedding scales and shifts what the second norm returns: y · (scale + 1) + shift. `conv1` and `proj` start at
    zero, so a block starts as its shortcut. `dropout` is the rate in force: 0 outside training.
    """

    features: int
    resample: str = ""
    attention: bool = False
    dropout: float = 0.0
    policy: Policy = Policy(jnp.float32, jnp.float32, False)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"]
    ) -> Float[Array, "b k l {self.features}"]:
        """Height and width halve or double with `resample`."""
        how = self.policy
        y = _norm("norm0", how)(x)
        y, bias = _conv("conv0", self._change(y), self.features, 3, how)
        scale, shift = jnp.split(_dense("affine", embedding, 2 * self.features), 2, axis=-1)
        mask = Dropout(self.dropout, name="Dropout_0")(y.shape)
        y = _norm("norm1", how, dropout=self.dropout)(y, bias, scale, shift, mask)
        y, bias = _conv("conv1", y, self.features, 3, how, zero=True)
        shortcut = self._change(x)
        if x.shape[-1] != self.features:
            shortcut, more = _conv("skip", shortcut, self.features, 1, how)
            bias = bias + more
        x = add(shortcut, y, bias, dtype=how.stream)
        return self._attend(x) if self.attention else x

    @nn.nowrap
    def _change(self, x: Array) -> Array:
        """Resampled in float32, where it is to be; in the dtype that it came in."""
        change = {"": lambda y, _: y, "down": downsample, "up": upsample}[self.resample]
        return change(x.astype(jnp.float32), _STYLE.taps).astype(x.dtype)

    @nn.nowrap
    def _attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Heads of 64 channels, or one of all when they are fewer."""
        c, how = x.shape[-1], self.policy
        # Differs from NVIDIA's files: q, k and v are three contiguous blocks of c output channels, in each 64 a head.
        # Theirs interleave as (head, channel, q/k/v): our output i·c + j is their row 3j + i, i = 0, 1, 2 for q, k, v,
        # where j = 64 · head + channel counts through the heads in both.
        qkv, bias = _conv("qkv", _norm("norm2", how, silu=False)(x), 3 * c, 1, how)
        y = attend(add(qkv, bias, dtype=how.products), max(1, c // _STYLE.head_channels))
        y, bias = _conv("proj", y, c, 1, how, zero=True)
        return add(x, y, bias, dtype=how.stream)


class ADM(nn.Module):
    """ADM on images `[B, H, W, C]`; `check_geometry` says what fits. The defaults are ImageNet-64's.

    The fields are those of `unet.UNet`, and mean the same; `architecture` can only be "adm". Attention stands after
    every block at the resolutions in `attention`, in encoder and decoder, and always at the bottom.
    """

    out_channels: int
    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    architecture: str = "adm"
    num_classes: int = 0
    augment_labels: int = 0
    second_condition: bool = False
    patch_size: int = 1
    remat: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    platform: str = "cpu"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        condition: Float[Array, " b"],
        second: Float[Array, " b"] | None = None,
        class_labels: Float[Array, "b k"] | None = None,
        augment_labels: Float[Array, "b n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The raw output in float32. `train` turns dropout on, which draws from the rng collection "dropout"."""
        check_geometry(*x.shape[1:3], **{name: getattr(self, name) for name in LIMITED})
        check_network("adm.ADM", self.architecture)
        embedding = self._embed(condition, second, class_labels, augment_labels)
        block, how = functools.partial(self._block, embedding, self.dropout if train else 0.0), self._policy()
        x, skips = self._encode(block, space_to_depth(x.astype(jnp.float32), self.patch_size))
        x = _norm("out_norm", how)(self._decode(block, x, skips))
        x, bias = _conv("out_conv", x, self.out_channels * self.patch_size**2, 3, how, zero=True)
        return depth_to_space(add(x, bias, dtype=jnp.float32), self.patch_size)

    @nn.nowrap
    def _policy(self) -> Policy:
        return policy(self.dtype, self.platform)

    @nn.nowrap
    def _embed(
        self, condition: Array, second: Array | None, class_labels: Array | None, augment_labels: Array | None
    ) -> Array:
        """All that is not the image, as `[b, 4 channels]`."""
        check_second(second, self.second_condition)
        y = sinusoids(condition.astype(jnp.float32), self.channels)
        if self.second_condition:
            y += dense("map_second", sinusoids(second.astype(jnp.float32), self.channels), self.channels, _ZEROS)
        # No label is the zero vector, and adds nothing: neither layer has a bias.
        classes = labels_or_zeros("map_label", class_labels, y, self.num_classes)
        augmentation = labels_or_zeros("map_augment", augment_labels, y, self.augment_labels)
        if self.augment_labels:
            y += dense("map_augment", augmentation, self.channels, _ZEROS)
        y = nn.silu(_dense("map_layer0", y, 4 * self.channels))
        y = _dense("map_layer1", y, 4 * self.channels)
        if self.num_classes:
            # Kaiming-normal times √classes, which are the fan-in: of variance 1.
            y += dense("map_label", classes, 4 * self.channels, nn.initializers.normal(1.0))
        return nn.silu(y)

    @nn.nowrap
    def _block(
        self, embedding: Array, dropout: float, name: str, x: Array, side: int, features: int, **options: Any
    ) -> Array:
        """A `Block` on or to maps whose larger side is `side`."""
        kind = nn.remat(Block) if side in self.remat else Block
        rest = {"policy": self._policy(), "name": name, **options}
        return kind(features, dropout=dropout, **rest)(x, embedding)

    @nn.nowrap
    def _encode(self, block: Any, x: Array) -> tuple[Array, list[Array]]:
        """The lowest feature map, and all outputs on the way as skips."""
        height, width = x.shape[1:3]
        how = self._policy()
        x = add(*_conv(f"enc_{height}x{width}_conv", x, self.channels, 3, how), dtype=how.stream)
        skips = [x]
        for level, mult in enumerate(self.channel_mult):
            side = max(height >> level, width >> level)
            prefix = f"enc_{height >> level}x{width >> level}"
            if level > 0:
                x = block(f"{prefix}_down", x, side, x.shape[-1], resample="down")
                skips.append(x)
            for i in range(self.num_blocks):
                x = block(f"{prefix}_block{i}", x, side, self.channels * mult, attention=side in self.attention)
                skips.append(x)
        return x, skips

    @nn.nowrap
    def _decode(self, block: Any, x: Array, skips: list[Array]) -> Array:
        """From the lowest feature map back to the highest, taking the skips from the end."""
        lowest = len(self.channel_mult) - 1
        height, width = x.shape[1] << lowest, x.shape[2] << lowest
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            side = max(height >> level, width >> level)
            prefix = f"dec_{height >> level}x{width >> level}"
            if level == lowest:
                x = block(f"{prefix}_in0", x, side, x.shape[-1], attention=True)
                x = block(f"{prefix}_in1", x, side, x.shape[-1])
            else:
                x = block(f"{prefix}_up", x, side, x.shape[-1], resample="up")
            for i in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(f"{prefix}_block{i}", x, side, self.channels * mult, attention=side in self.attention)
        return x
