"""`fashion_cnn`: 128 features of a small classifier of Fashion-MNIST, shipped, for scores without any download.

Four convolutions and a mean over positions; trained by `python benchmarks/train_features.py` (minutes on two cores) on
images 0-7999 of the bundled 10,000, and right on 89.05 % of images 8000-9999; the metadata of the weights file say the
same. The bundled images are the *test* file of Fashion-MNIST, so the accuracy is nobody's benchmark.

Scores to read others by, 2,000 images against the 8,000: `fd_fashion_cnn_2k` is 0.22 for images 8000-9999 (where
`frechet.expected_bias` foretells 0.174 + 0.044), 0.32 with Gaussian noise of 4 grey levels added, 1.9 after a blur of
half a pixel, 14 after one of a pixel, 132 for uniform noise. Never call it FID; it means nothing for other images.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from warm_jax.metrics.extract import Extractor, Features
from warm_jax.weights import tensors

NAME = "fashion_cnn"
WEIGHTS = Path(__file__).parent / "fashion_cnn.safetensors"
# Kernel size, input channels, output channels, stride.
LAYERS = ((5, 1, 32, 2), (3, 32, 64, 1), (3, 64, 128, 2), (3, 128, 128, 1))
CLASSES = 10

Params = dict[str, Float[Array, "..."]]


def init(key: jax.Array) -> Params:
    """Random parameters (He et al. 2015), biases zero."""
    params = {}
    for i, (size, inputs, outputs, _) in enumerate(LAYERS):
        scale = (2 / (size * size * inputs)) ** 0.5
        kernel = scale * jax.random.normal(jax.random.fold_in(key, i), (size, size, inputs, outputs))
        params |= {f"conv{i}.kernel": kernel, f"conv{i}.bias": jnp.zeros(outputs)}
    dim = LAYERS[-1][2]
    kernel = jax.random.normal(jax.random.fold_in(key, len(LAYERS)), (dim, CLASSES)) / dim**0.5
    return params | {"dense.kernel": kernel, "dense.bias": jnp.zeros(CLASSES)}


def network(params: Params, x: Float[Array, "b 32 32 1"]) -> Features:
    """Features `[b, 128]` ≥ 0 and logits `[b, 10]` of images in [-1, 1]."""
    for i, (_, _, _, stride) in enumerate(LAYERS):
        x = jax.lax.conv_general_dilated(
            x,
            params[f"conv{i}.kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x + params[f"conv{i}.bias"])
    pool = x.mean(axis=(1, 2))
    logits = jnp.dot(pool, params["dense.kernel"], precision=jax.lax.Precision.HIGHEST) + params["dense.bias"]
    return Features(pool, logits)


def apply(params: Params, images: UInt8[Array, "b h w c"]) -> Features:
    """Features of 28×28 grey images, or of the same with two black pixels around them (32×32); others: ValueError."""
    if images.shape[1:] not in ((28, 28, 1), (32, 32, 1)):
        raise ValueError(f"{NAME} knows grey images of 28×28 or 32×32, not {images.shape[1:]}")
    margin = (32 - images.shape[1]) // 2
    images = jnp.pad(images, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
    return network(params, images.astype(jnp.float32) / 127.5 - 1)


def load(path: str | Path = WEIGHTS) -> Extractor:
    """The extractor with the shipped weights, or with a file of the same layout."""
    digest = tensors.require_file(path, "", "It is part of the package: install it again.")
    arrays, _ = tensors.read_safetensors(path)
    shapes = jax.eval_shape(init, jax.random.key(0))
    if {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in shapes.items()}:
        raise ValueError(f"{path} holds other tensors than a {NAME} needs")
    return Extractor(NAME, digest, LAYERS[-1][2], {n: jnp.asarray(a) for n, a in arrays.items()}, apply)
