r"""Inception-v3 of 2015-12-05, the network behind every published FID, with its quirks.

It is TensorFlow's graph `classify_image_graph_def.pb` (Szegedy et al. 2015, 1008 outputs), which differs from later
Inception-v3s; a network without these quirks gives other numbers:

* images are resized to 299×299 by TensorFlow 1's bilinear rule: the source of pixel i is i · in/299, without half-pixel
  centres (other resizers differ by tens of grey levels on 32×32 images), then scaled as (x - 128) / 128;
* average pools over 3×3 divide by the number of pixels inside the image, not by 9;
* the last block's pool branch takes a maximum, the others an average;
* batch normalisation has ε = 1e-3; it is folded into the convolutions here;
* the Inception Score leaves out the bias of the last layer: Salimans et al. (2016) multiply `pool3` by the weights
only.

Weights: pytorch-fid's port, a PyTorch state_dict whose names the modules below carry (`Mixed_5b.branch1x1` …).
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float64, Shaped, UInt8

from warm_jax.metrics import published
from warm_jax.metrics.extract import Extractor, Features
from warm_jax.metrics.frechet import INCEPTION
from warm_jax.metrics.published import Published
from warm_jax.weights import tensors
from warm_jax.weights.pth import read_torch

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"  # the last part of the published name is the beginning of the file's sha256
INSTRUCTIONS = (
    f"The weights are published at {URL} (sha256 {SHA256_PREFIX}…); fetch them with\n"
    f"    curl -L -O {URL}\n"
    "and name the file with --config.eval.inception=FILE. Without it, use the offline metrics."
)
PUBLISHED = Published(INCEPTION, SHA256_PREFIX, INSTRUCTIONS)
POOL_DIM, CLASSES, SIZE = 2048, 1008, 299

# A branch is a chain of convolutions (name, outputs, kernel height, kernel width, stride, padded) and pools (a name of
# `POOLS`). A pair of convolutions in a chain sees the same input, and the outputs are joined, as those of the branches.
_Conv = tuple[str, int, int, int, int, bool]
_Branch = list[str | _Conv | tuple[_Conv, _Conv]]


def _conv(name: str, outputs: int, height: int, width: int | None = None, stride: int = 1) -> _Conv:
    return (name, outputs, height, height if width is None else width, stride, stride == 1)


def _block_a(pool: int) -> list[_Branch]:
    return [
        [_conv("branch1x1", 64, 1)],
        [_conv("branch5x5_1", 48, 1), _conv("branch5x5_2", 64, 5)],
        [_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)],
        ["average", _conv("branch_pool", pool, 1)],
    ]


def _block_c(c: int) -> list[_Branch]:
    return [
        [_conv("branch1x1", 192, 1)],
        [_conv("branch7x7_1", c, 1), _conv("branch7x7_2", c, 1, 7), _conv("branch7x7_3", 192, 7, 1)],
        [
            _conv("branch7x7dbl_1", c, 1),
            _conv("branch7x7dbl_2", c, 7, 1),
            _conv("branch7x7dbl_3", c, 1, 7),
            _conv("branch7x7dbl_4", c, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ],
        ["average", _conv("branch_pool", 192, 1)],
    ]


def _block_e(pool: str) -> list[_Branch]:
    return [
        [_conv("branch1x1", 320, 1)],
        [_conv("branch3x3_1", 384, 1), (_conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1))],
        [
            _conv("branch3x3dbl_1", 448, 1),
            _conv("branch3x3dbl_2", 384, 3),
            (_conv("branch3x3dbl_3a", 384, 1, 3), _conv("branch3x3dbl_3b", 384, 3, 1)),
        ],
        [pool, _conv("branch_pool", 192, 1)],
    ]


BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": [
        [_conv("branch3x3", 384, 3, stride=2)],
        [_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, stride=2)],
        ["halve"],
    ],
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": [
        [_conv("branch3x3_1", 192, 1), _conv("branch3x3_2", 320, 3, stride=2)],
        [
            _conv("branch7x7x3_1", 192, 1),
            _conv("branch7x7x3_2", 192, 1, 7),
            _conv("branch7x7x3_3", 192, 7, 1),
            _conv("branch7x7x3_4", 192, 3, stride=2),
        ],
        ["halve"],
    ],
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}

POOLS = {
    "average": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
    "maximum": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
    "halve": lambda x: nn.max_pool(x, (3, 3), (2, 2)),
}


class Conv(nn.Module):
    """Convolution with the batch normalisation folded into kernel and bias, then ReLU."""

    outputs: int
    height: int
    width: int
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Kernel `[height, width, c, outputs]`, at full float32 precision on every backend."""
        kernel = self.param("kernel", nn.initializers.he_normal(), (self.height, self.width, x.shape[-1], self.outputs))
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            "SAME" if self.padded else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return nn.relu(x + bias)


class Block(nn.Module):
    """One of `BLOCKS`: branches side by side, joined along the channels."""

    branches: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Spatial size kept, or (h - 3) // 2 + 1 where a branch halves."""
        outputs = []
        for branch in self.branches:
            y = x
            for layer in branch:
                y = self.layer(layer, y)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)

    def layer(self, layer: Any, y: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """A pool by its name, a convolution, or a pair of them."""
        if isinstance(layer, str):
            return POOLS[layer](y)
        pair = layer if isinstance(layer[0], tuple) else (layer,)
        return jnp.concatenate([Conv(*arguments, name=name)(y) for name, *arguments in pair], axis=-1)


class InceptionV3(nn.Module):
    """Images `[b, 299, 299, 3]` (other sizes from 75 too), scaled as (grey - 128)/128 → features and logits."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Features:
        """`pool` `[b, 2048]`, ≥ 0, and `logits` `[b, 1008]` without the bias, as the Inception Score takes them.

        The output of every block is sown as the intermediate of its name.
        """
        x = Conv(32, 3, 3, 2, False, name="Conv2d_1a_3x3")(x)
        x = Conv(32, 3, 3, 1, False, name="Conv2d_2a_3x3")(x)
        x = Conv(64, 3, 3, name="Conv2d_2b_3x3")(x)
        x = POOLS["halve"](x)
        self.sow("intermediates", "stem1", x)
        x = Conv(80, 1, 1, name="Conv2d_3b_1x1")(x)
        x = Conv(192, 3, 3, 1, False, name="Conv2d_4a_3x3")(x)
        x = POOLS["halve"](x)
        self.sow("intermediates", "stem2", x)
        for name, branches in BLOCKS.items():
            x = Block(branches, name=name)(x)
            self.sow("intermediates", name + "_out", x)
        pool = x.mean(axis=(1, 2))
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), (POOL_DIM, CLASSES))
        self.param("fc_bias", nn.initializers.zeros, (CLASSES,))  # kept for whoever wants probabilities
        return Features(pool, jnp.dot(pool, kernel, precision=jax.lax.Precision.HIGHEST))


def resize_matrix(size: int, target: int = SIZE) -> Float64[np.ndarray, "{target} {size}"]:
    """TensorFlow 1's bilinear rule (align_corners=False, half_pixel_centers=False) along one side, as a matrix."""
    # In float32, as the graph has it: at 32 → 299 float64 fractions would move pixels by 4e-6 of their range.
    source = np.arange(target, dtype=np.float32) * np.float32(size / target)
    low = np.floor(source).astype(int)
    high, fraction = np.minimum(low + 1, size - 1), source - low
    matrix = np.zeros((target, size))
    matrix[np.arange(target), low] += 1 - fraction
    matrix[np.arange(target), high] += fraction
    return matrix


def preprocess(images: UInt8[Array, "b h w c"]) -> Float[Array, "b 299 299 3"]:
    """Grey repeated to three channels, TensorFlow's resize, (x - 128) / 128."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"Inception takes images of 1 or 3 channels, not {images.shape[-1]}")
    x = images.astype(jnp.float32)
    rows, columns = (jnp.asarray(resize_matrix(n), jnp.float32) for n in x.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=highest)
    x = jnp.einsum("jw,biwc->bijc", columns, x, precision=highest)
    return jnp.broadcast_to((x - 128) / 128, (*x.shape[:3], 3))


def apply(params: Any, images: UInt8[Array, "b h w c"]) -> Features:
    """Features and bias-free logits of uint8 images of any size."""
    return InceptionV3().apply({"params": params}, preprocess(images))


@functools.cache
def parameter_shapes() -> Any:
    """The parameter tree, as shapes."""
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]


def convert(state_dict: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """Parameters from a state_dict of pytorch-fid's layout, float32; ValueError naming what is missing or misshapen.

    y = (w∗x - mean) · γ/√(var + ε) + β is the convolution with the kernel w γ/√(var + ε) and the bias β - mean γ/√(var
    + ε).
    """
    params: dict[str, Any] = {}
    for path, shape in jax.tree_util.tree_leaves_with_path(parameter_shapes()):
        *module, leaf = [entry.key for entry in path]
        try:
            value = _converted([str(name) for name in module], str(leaf), state_dict)
        except KeyError as error:
            raise ValueError(f"the weights have no {error.args[0]}: not Inception-v3 of 2015-12-05") from None
        if value.shape != shape.shape:
            raise ValueError(f"{'.'.join([*module, leaf])} has shape {value.shape}, expected {shape.shape}")
        inner = params
        for name in module:
            inner = inner.setdefault(name, {})
        inner[leaf] = value.astype(np.float32)
    return params


def _converted(module: list[str], leaf: str, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """One parameter, in float64."""
    if leaf == "fc_kernel":
        return state["fc.weight"].astype(np.float64).T
    if leaf == "fc_bias":
        return state["fc.bias"].astype(np.float64)
    name = ".".join(module)
    gamma, beta, mean, variance = (
        state[f"{name}.bn.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + 1e-3)
    if leaf == "bias":
        return beta - mean * scale
    return state[f"{name}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0) * scale


def read(path: str | os.PathLike, unverified: bool = False) -> tuple[str, str, dict[str, Any]]:
    """The extractor's name, the file's sha256 and the parameters of a .pth, which is read without executing it.

    FileNotFoundError; ValueError (truncated, wrong hash) unless it is the published file, or `unverified`.
    """
    digest = tensors.require_file(path, "", INSTRUCTIONS)
    try:
        name = PUBLISHED.named(digest, unverified)  # first: a file cut short is told as that
        return name, digest, convert(read_torch(path))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def load(path: str | os.PathLike, network: Published = PUBLISHED) -> Extractor:
    """The extractor with weights from the published `.pth`, or from a `.safetensors` converted of it.

    FileNotFoundError and ValueError (truncated, wrong hash) say where the file is published. The extractor's hash is
    that of the `.pth` in both cases.
    """
    if Path(path).suffix == ".safetensors":
        name, digest, params = published.load(path, network, parameter_shapes())
    else:
        name, digest, params = read(path)
    return Extractor(name, digest, POOL_DIM, jax.tree.map(jnp.asarray, params), apply)
