r"""The U-Nets of EDM, DDPM++ and NCSN++: one Linen module, `F(x, condition) -> [B, H, W, out_channels]`.

It knows no noise level and no blur: `condition` and `second` are numbers with an embedding each, and `denoiser.py`
says what they mean. Karras et al. 2022 (arXiv 2206.00364, table 7), after Song et al. 2021 (arXiv 2011.13456):

    encoder   conv 3×3; for each entry of `channel_mult`: [down block, pyramid of the input], `num_blocks` blocks
    decoder   from the lowest level up: two bottom blocks or an up block; `num_blocks + 1` blocks on concat[x, skip]
    output    GroupNorm → SiLU → conv 3×3

|           | resampling filter | noise embedding              | pyramid of the input |
|-----------|-------------------|------------------------------|----------------------|
| `ddpmpp`  | [1, 1]            | sinusoids, `channels`        | no                   |
| `ncsnpp`  | [1, 3, 3, 1]      | random Fourier, 2 `channels` | yes                  |

The parameter tree is flat and says where a block stands: `enc_16x16_block0`, `dec_8x8_in0`, `enc_32x24_conv` (height ×
width after patching), each with `norm0 conv0 affine norm1 conv1 [skip] [norm2 qkv proj]`. Parameters are float32;
`layers.Policy` says what else is.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from warm_jax.models.geometry import LIMITED, STYLES, check_geometry, check_network
from warm_jax.models.layers import (
    Convolution,
    Dropout,
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
    resample,
    space_to_depth,
    upsample,
)


def _xavier(variance: float = 1.0) -> nn.initializers.Initializer:
    """Xavier-uniform, with its variance multiplied."""
    return nn.initializers.variance_scaling(variance, "fan_avg", "uniform")


def _conv(name: str, x: Array, features: int, size: int, how: Policy, variance: float = 1.0, **options: Any):
    """`(product, bias)` of a convolution."""
    return Convolution(features, size, how.products, _xavier(variance), name=name, **options)(x)


def _dense(name: str, x: Array, features: int) -> Array:
    return dense(name, x, features, _xavier(), nn.initializers.zeros)


def _norm(name: str, how: Policy, **options: Any) -> Norm:
    return Norm(1e-6, how, name=name, **options)


def sinusoids(x: Float[Array, " b"], channels: int) -> Float[Array, "b {channels}"]:
    """[sin(x f), cos(x f)], f falling geometrically from 1 to exactly 1/10000 over `channels` / 2 (≥ 2) frequencies."""
    half = channels // 2
    angle = x[:, None] * jnp.asarray(1e-4 ** (np.arange(half) / (half - 1)), jnp.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class FourierFeatures(nn.Module):
    """[sin(2π f x), cos(2π f x)], with `channels` / 2 frequencies f ~ N(0, 16²): drawn once, never trained.

    `freqs` stands among the parameters so that checkpoints carry it; published counts of parameters leave it out.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, " b"]) -> Float[Array, "b c"]:
        """`[b]` to `[b, channels]`."""
        freqs = self.param("freqs", nn.initializers.normal(16.0), (self.channels // 2,))
        angle = x[:, None] * (2 * np.pi * lax.stop_gradient(freqs))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Block(nn.Module):
    """A residual block, resampled on its way when `resample` is "down" or "up", and then attention if asked for.

    The embedding shifts the features, without scale. Both sums are multiplied by √½, which keeps the variance.
    `dropout` is the rate in force: 0 outside training. `conv1` and `proj` start at 1e-5 of their size.
    """

    features: int
    taps: tuple[float, ...]
    resample: str = ""
    attention: bool = False
    dropout: float = 0.0
    policy: Policy = Policy(jnp.float32, jnp.float32, False)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"]
    ) -> Float[Array, "b k l {self.features}"]:
        """Height and width halve or double with `resample`."""
        how, root = self.policy, np.sqrt(0.5).item()
        y = _norm("norm0", how)(x)
        y, bias = _conv("conv0", self._change(y), self.features, 3, how)
        shift = bias + _dense("affine", embedding, self.features)
        mask = Dropout(self.dropout, name="Dropout_0")(y.shape)
        y = _norm("norm1", how, dropout=self.dropout)(y, shift, mask=mask)
        y, bias = _conv("conv1", y, self.features, 3, how, variance=1e-10)
        shortcut = self._change(x)
        if self.resample or x.shape[-1] != self.features:
            shortcut, more = _conv("skip", shortcut, self.features, 1, how)
            bias = bias + more
        x = add(shortcut, y, bias, scale=root, dtype=how.stream)
        return self._attend(x) if self.attention else x

    @nn.nowrap
    def _change(self, x: Array) -> Array:
        """Resampled in float32, where it is to be; in the dtype that it came in."""
        change = {"": lambda y, _: y, "down": downsample, "up": upsample}[self.resample]
        return change(x.astype(jnp.float32), self.taps).astype(x.dtype)

    @nn.nowrap
    def _attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """One head over all channels."""
        c, how = x.shape[-1], self.policy
        # Differs from NVIDIA's files: q, k and v are three contiguous blocks of c output channels. Theirs interleave as
        # (head, channel, q/k/v): with their one head, our output i·c + j is their row 3j + i, i = 0, 1, 2 for q, k, v.
        qkv, bias = _conv("qkv", _norm("norm2", how, silu=False)(x), 3 * c, 1, how, variance=0.2)
        y = attend(add(qkv, bias, dtype=how.products), 1)
        y, bias = _conv("proj", y, c, 1, how, variance=1e-10)
        return add(x, y, bias, scale=np.sqrt(0.5).item(), dtype=how.stream)


class UNet(nn.Module):
    """DDPM++ or NCSN++ on images `[B, H, W, C]`; `check_geometry` says what fits.

    out_channels    C for one head, 2C for two
    channels        the unit of width; a level has channels · channel_mult[level]
    attention       resolutions (the larger side of a feature map) with self-attention; the bottom always has one
    num_classes     0: unconditional. A class is a one-hot vector, and the zero vector (or None) is "no class"
    augment_labels  length of the augmentation vector; zeros (or None): not augmented
    second_condition  a second number an image; its embedding enters through a layer that starts at zero
    patch_size      (ours) images are folded by this factor, space to depth, and back: a cheap small network
    remat           resolutions whose blocks are computed again in the backward pass, to save memory
    dtype           of convolutions and attention products: float32 or bfloat16
    platform        what it runs on, as JAX names it: `layers.policy` has what differs
    """

    out_channels: int
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.13
    architecture: str = "ddpmpp"
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
        check_network("unet.UNet", self.architecture)
        embedding = self._embed(condition, second, class_labels, augment_labels)
        block, how = functools.partial(self._block, embedding, self.dropout if train else 0.0), self._policy()
        x, skips = self._encode(block, space_to_depth(x.astype(jnp.float32), self.patch_size))
        x = _norm("out_norm", how)(self._decode(block, x, skips))
        x, bias = _conv("out_conv", x, self.out_channels * self.patch_size**2, 3, how, variance=1e-10)
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
        fourier = STYLES[self.architecture].fourier
        width = self.channels * (2 if fourier else 1)
        condition = condition.astype(jnp.float32)
        y = FourierFeatures(width, name="map_noise")(condition) if fourier else sinusoids(condition, width)
        if self.second_condition:
            y += dense("map_second", sinusoids(second.astype(jnp.float32), width), width, nn.initializers.zeros)
        # No label is the zero vector: a class's bias stays, as in EDM; an augmentation has none and adds nothing.
        classes = labels_or_zeros("map_label", class_labels, y, self.num_classes)
        augmentation = labels_or_zeros("map_augment", augment_labels, y, self.augment_labels)
        if self.num_classes:
            y += _dense("map_label", classes * self.num_classes**0.5, width)
        if self.augment_labels:
            y += dense("map_augment", augmentation, width, _xavier())
        y = nn.silu(_dense("map_layer0", y, 4 * self.channels))
        return nn.silu(_dense("map_layer1", y, 4 * self.channels))

    @nn.nowrap
    def _block(
        self, embedding: Array, dropout: float, name: str, x: Array, side: int, features: int, **options: Any
    ) -> Array:
        """A `Block` on or to maps whose larger side is `side`."""
        kind = nn.remat(Block) if side in self.remat else Block
        taps = STYLES[self.architecture].taps
        rest = {"policy": self._policy(), "name": name, **options}
        return kind(features, taps, dropout=dropout, **rest)(x, embedding)

    @nn.nowrap
    def _encode(self, block: Any, x: Array) -> tuple[Array, list[Array]]:
        """The lowest feature map, and all outputs on the way as skips."""
        style, how = STYLES[self.architecture], self._policy()
        pyramid, (height, width) = x, x.shape[1:3]
        x = add(*_conv(f"enc_{height}x{width}_conv", x, self.channels, 3, how), dtype=how.stream)
        skips = [x]
        for level, mult in enumerate(self.channel_mult):
            side = max(height >> level, width >> level)
            prefix = f"enc_{height >> level}x{width >> level}"
            if level > 0:
                x = block(f"{prefix}_down", x, side, x.shape[-1], resample="down")
                if style.pyramid:
                    # At full resolution, with zeros outside for both the 3×3 kernel (1) and the filter (1); then the
                    # filter, without more of them. It has sum 1, so the bias may come before it.
                    pyramid, bias = _conv(f"{prefix}_aux_residual", pyramid, x.shape[-1], 3, how, padding=2)
                    pyramid = add(pyramid, bias, dtype=jnp.float32)
                    pyramid = resample(pyramid, style.taps, stride=2, interior=0, padding=0)
                    x = pyramid = add(x, pyramid, scale=np.sqrt(0.5).item(), dtype=how.stream)
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
                joined = jnp.concatenate([x, skips.pop()], axis=-1)
                attention = side in self.attention and i == self.num_blocks
                x = block(f"{prefix}_block{i}", joined, side, self.channels * mult, attention=attention)
        return x
