r"""DINOv2's vision transformers (Oquab et al. 2023, arXiv 2304.07193), whose features make FD-DINOv2.

Stein et al. (2023, arXiv 2306.04675) proposed the Fréchet distance of the class token of ViT-L/14, after the last
normalisation; EDM2 reports it. ViT-B/14 and ViT-S/14 are the same network in smaller, and give other numbers.

* Images are resized to 224×224 by a bicubic filter (Keys' kernel, a = -1/2, widened where it shrinks, renormalised at
  the border), then normalised by ImageNet's mean and deviation. EDM2 resizes in float32 so, without rounding.
  Differs from dgm-eval: Pillow resizes by the same filter but rounds to bytes and clips, after each direction.
* The positional embeddings are of 37×37 patches. DINOv2 brings them to 16×16 by PyTorch's bicubic interpolation without
  antialiasing (a = -3/4, the border repeated) at the scale 16.1/37: the 0.1 guards its rounding, and moves the grid.
* LayerNorm has ε = 1e-6, GELU is exact, each branch has a scale for each channel (LayerScale).

All in float32 at full precision. Weights: the published state_dicts, whose names the modules below carry. The blocks'
parameters are stacked along a first axis, so that one block is compiled and not 24.
"""

import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float64, Shaped, UInt8

from warm_jax.metrics import published
from warm_jax.metrics.extract import Extractor, Features
from warm_jax.metrics.published import Published
from warm_jax.weights import tensors
from warm_jax.weights.pth import read_torch

SIZE, PATCH, GRID, TRAINED_GRID = 224, 14, 16, 37
HEAD = 64  # features of an attention head, in all sizes
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_HIGHEST = jax.lax.Precision.HIGHEST


def _published(name: str, size: str, sha256: str) -> Published:
    file = f"dinov2_vit{size}14_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/{file}"
    return Published(
        name,
        sha256,
        f"The weights of {name} are published at {url} (sha256 {sha256[:8]}…); fetch them with\n"
        f"    curl -L -O {url}\n"
        f"and name the file with --config.eval.dinov2=FILE.",
    )


NETWORKS = {  # (features, blocks): the file that is published
    (384, 12): _published("dinov2_s14", "s", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    (768, 12): _published("dinov2_b14", "b", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    (1024, 24): _published("dinov2", "l", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
}
NAMES = tuple(network.name for network in reversed(NETWORKS.values()))


# ── The network ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Attention, then a perceptron of four times the width, each normalised before and scaled after."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], _: None = None) -> tuple[Float[Array, "b n d"], None]:
        """The tokens, as the carry of a scan. They are sown as the intermediate `tokens`."""
        b, n, d = x.shape
        dense = functools.partial(nn.Dense, precision=_HIGHEST)
        y = dense(3 * d, name="attn_qkv")(_norm("norm1")(x)).reshape(b, n, 3, d // HEAD, HEAD)
        q, k, v = jnp.moveaxis(y, 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q / math.sqrt(HEAD), k, precision=_HIGHEST))
        y = jnp.einsum("bhqk,bkhc->bqhc", weights, v, precision=_HIGHEST).reshape(b, n, d)
        x = x + self.param("ls1_gamma", nn.initializers.ones, (d,)) * dense(d, name="attn_proj")(y)
        y = nn.gelu(dense(4 * d, name="mlp_fc1")(_norm("norm2")(x)), approximate=False)
        x = x + self.param("ls2_gamma", nn.initializers.ones, (d,)) * dense(d, name="mlp_fc2")(y)
        self.sow("intermediates", "tokens", x)
        return x, None


class VisionTransformer(nn.Module):
    """Normalised images `[b, 224, 224, 3]` → the class token `[b, width]`."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """float32. The tokens before the first block are sown as the intermediate `embedded`."""
        b, d = len(x), self.width
        x = x.reshape(b, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, GRID**2, -1)
        x = nn.Dense(d, precision=_HIGHEST, name="patch_embed")(x)
        cls = self.param("cls_token", nn.initializers.zeros, (1, 1, d))
        positions = self.param("pos_embed", nn.initializers.zeros, (1, TRAINED_GRID**2 + 1, d))
        x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, d)), x], axis=1) + positions_at_224(positions)
        self.sow("intermediates", "embedded", x)
        axes = {"params": 0, "intermediates": 0}
        x, _ = nn.scan(Block, axes, split_rngs={"params": True}, length=self.depth)(name="blocks")(x, None)
        return _norm("norm")(x[:, 0])


def position_matrix(target: int = GRID, size: int = TRAINED_GRID) -> Float64[np.ndarray, "{target} {size}"]:
    """PyTorch's bicubic interpolation (a = -3/4) along one side, from `size` to `target`, at scale (target + 0.1)/size.

    Output i lies at (i + 1/2) · size/(target + 0.1) - 1/2 of the input, whose border values are repeated outside.
    """
    a = -0.75
    source = (np.arange(target) + 0.5) * size / (target + 0.1) - 0.5
    low = np.floor(source).astype(int)
    matrix = np.zeros((target, size))
    for tap in range(-1, 3):
        u = np.abs(source - (low + tap))
        near = ((a + 2) * u - (a + 3)) * u**2 + 1
        far = ((a * u - 5 * a) * u + 8 * a) * u - 4 * a
        np.add.at(matrix, (np.arange(target), np.clip(low + tap, 0, size - 1)), np.where(u <= 1, near, far))
    return matrix


def positions_at_224(positions: Float[Array, "1 n d"]) -> Float[Array, "1 m d"]:
    """The class token's embedding as it is, those of 37×37 patches interpolated to 16×16."""
    matrix = jnp.asarray(position_matrix(), positions.dtype)
    grid = positions[0, 1:].reshape(TRAINED_GRID, TRAINED_GRID, -1)
    grid = jnp.einsum("ih,jw,hwd->ijd", matrix, matrix, grid, precision=_HIGHEST)
    return jnp.concatenate([positions[:, :1], grid.reshape(1, GRID**2, -1)], axis=1)


def preprocess(images: UInt8[Array, "b h w c"]) -> Float[Array, "b 224 224 3"]:
    """Grey repeated to three channels, the bicubic resize, ImageNet's normalisation; ValueError below 14 pixels."""
    b, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"DINOv2 takes images of 1 or 3 channels, not {channels}")
    if min(height, width) < PATCH:
        raise ValueError(f"DINOv2 takes images of at least one patch, {PATCH}×{PATCH} pixels, not {height}×{width}")
    x = jax.image.resize(images.astype(jnp.float32), (b, SIZE, SIZE, channels), "cubic", precision=_HIGHEST)
    return (x / 255 - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)


def apply(params: Any, images: UInt8[Array, "b h w c"]) -> Features:
    """Features `[b, width]` of uint8 images of any size from 14×14; no logits. `params` say which network it is."""
    depth, width = params["blocks"]["ls1_gamma"].shape
    return Features(VisionTransformer(width, depth).apply({"params": params}, preprocess(images)), None)


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def parameter_shapes(width: int, depth: int) -> Any:
    """The parameter tree, as shapes."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(VisionTransformer(width, depth).init, jax.random.key(0), images)["params"]


def recognise(state_dict: Mapping[str, Shaped[np.ndarray, "..."]]) -> tuple[int, int]:
    """(features, blocks) of a state_dict of DINOv2's layout; ValueError naming what it is instead."""
    if "register_tokens" in state_dict:
        raise ValueError(
            "the variant with registers (reg4): FD-DINOv2 is of the one without, dinov2_vitl14_pretrain.pth"
        )
    kernel = state_dict["patch_embed.proj.weight"].shape if "patch_embed.proj.weight" in state_dict else ()
    if len(kernel) != 4 or "blocks.0.norm1.weight" not in state_dict:
        first = ", ".join(list(state_dict)[:3]) or "none"
        raise ValueError(f"no DINOv2 of the published layout; its first tensors: {first}")
    blocks = [name.split(".")[1] for name in state_dict if name.startswith("blocks.")]
    depth = 1 + max((int(block) for block in blocks if block.isdecimal()), default=-1)
    found = f"a vision transformer of {kernel[0]} features, {depth} blocks, patches of {'×'.join(map(str, kernel[2:]))}"
    if (kernel[0], depth) not in NETWORKS or kernel[1:] != (3, PATCH, PATCH):
        sizes = ", ".join(f"{network.name} of {w} and {d}" for (w, d), network in NETWORKS.items())
        raise ValueError(f"{found}; supported are patches of 14×14 and {sizes}")
    return kernel[0], depth


def convert(state_dict: Mapping[str, Shaped[np.ndarray, "..."]], width: int, depth: int) -> dict[str, Any]:
    """Parameters from a state_dict of DINOv2's layout, float32; ValueError naming what is missing, misshapen or extra.

    `mask_token`, which training needs, is left out.
    """
    left = set(state_dict) - {"mask_token"}

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        *module, leaf = name.replace("attn_", "attn.").replace("mlp_", "mlp.").replace("_gamma", ".gamma").split(".")
        name = ".".join([*module, "weight" if leaf in ("kernel", "scale") else leaf])
        name = name.replace("patch_embed.", "patch_embed.proj.")
        if name not in left:
            raise ValueError(f"the weights have no {name}: not DINOv2 of {width} features and {depth} blocks")
        left.remove(name)
        value = np.asarray(state_dict[name], np.float32)
        if leaf == "kernel":  # of [out, in], or of patches [out, channel, row, column]
            value = np.moveaxis(value, 0, -1) if value.ndim == 2 else value.transpose(2, 3, 1, 0).reshape(-1, width)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {state_dict[name].shape}, not that of DINOv2 of {width} features")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has values that are not finite")
        return value

    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(width, depth)):
        name = ".".join(str(entry.key) for entry in path)
        if name.startswith("blocks."):
            parts = [one(name.replace("blocks.", f"blocks.{i}.", 1), leaf.shape[1:]) for i in range(depth)]
            flat[name] = np.stack(parts)
        else:
            flat[name] = one(name, leaf.shape)
    if left:
        raise ValueError(f"the weights have {min(left)}, which DINOv2 has not, and {len(left) - 1} more such tensors")
    return published.nested(flat)


def read(path: str | os.PathLike, unverified: bool = False, name: str = "dinov2") -> tuple[str, str, dict[str, Any]]:
    """The extractor's name, the file's sha256 and the parameters of a .pth, which is read without executing it.

    FileNotFoundError with where `name` is published; ValueError unless the file is one of `NETWORKS`, with the
    published weights or with `unverified`.
    """
    [instructions] = [network.instructions for network in NETWORKS.values() if network.name == name]
    digest = tensors.require_file(path, "", instructions)
    state_dict = read_torch(path)
    try:
        size = recognise(state_dict)
        params = convert(state_dict, *size)  # first, as it knows what a wrong file lacks
        return NETWORKS[size].named(digest, unverified), digest, params
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load(path: str | os.PathLike, name: str) -> Extractor:
    """The extractor `name` of `NAMES` with weights from the published `.pth`, or from a `.safetensors` converted of it.

    FileNotFoundError and ValueError (truncated, of another size, not the published weights) say what to do.
    """
    [(size, network)] = [(size, network) for size, network in NETWORKS.items() if network.name == name]
    if pathlib.Path(path).suffix == ".safetensors":
        found, digest, params = published.load(path, network, parameter_shapes(*size))
    else:
        found, digest, params = read(path, name=name)
        if found != name:
            raise ValueError(f"{path} holds {found}, not {name}. {network.instructions}")
    return Extractor(found, digest, size[0], jax.tree.map(jnp.asarray, params), apply)
