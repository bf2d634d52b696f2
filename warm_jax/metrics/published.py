"""Published weights of an extractor: the file of others, told by its hash, and ours after conversion (.safetensors).

Weights that nobody published, converted with `--unverified`, belong to an extractor of another name: the name of every
score and of every statistics file says so, and they are never compared with those of the published weights.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from warm_jax.weights import tensors

UNVERIFIED = "-unverified"  # at the end of an extractor's name


@dataclasses.dataclass(frozen=True)
class Published:
    """`name` of the extractor, `sha256` of the published file or its beginning, `instructions`: where to get it."""

    name: str
    sha256: str
    instructions: str

    def named(self, digest: str, unverified: bool = False) -> str:
        """The extractor's name with weights from a file of this sha256; ValueError unless published or `unverified`."""
        if digest.startswith(self.sha256):
            return self.name
        if unverified:
            return self.name + UNVERIFIED
        raise ValueError(
            f"its sha256 is {digest}, expected {self.sha256[:8]}…: truncated, or another file. Other weights are "
            f"converted with --unverified, and every score of them says so. {self.instructions}"
        )


def is_of(extractor: str, name: str) -> bool:
    """Whether this extractor's name is `name`, with published weights or with others."""
    return extractor.removesuffix(UNVERIFIED) == name


def save(path: str | os.PathLike, name: str, params: Any, source_hash: str) -> None:
    """Converted weights as safetensors: the extractor's name, and the sha256 of the file that they came from."""
    flat = {".".join(str(e.key) for e in p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(params)}
    about = {"network": name, "source_sha256": source_hash, "content_sha256": _content_hash(flat)}
    tensors.write_safetensors(path, flat, about)


def load(path: str | os.PathLike, network: Published, shapes: Any) -> tuple[str, str, dict[str, Any]]:
    """The extractor's name, the sha256 of the source, and parameters of these `shapes`, of a file of `save`.

    FileNotFoundError and ValueError (cut short, damaged, of another network) end with the instructions.
    """
    tensors.require_file(path, "", network.instructions)
    flat, about = tensors.read_safetensors(path)
    digest, name = about.get("source_sha256", ""), about.get("network", "")
    if not is_of(name, network.name) or (name == network.name and not digest.startswith(network.sha256)):
        said = f"{name or 'no network that it names'}, of sha256 {digest or 'unknown'}"
        wanted = f"the converted {network.name} ({network.sha256[:8]}…)"
        raise ValueError(f"{path} holds {said}: not {wanted}. {network.instructions}")
    if about.get("content_sha256") != _content_hash(flat):
        raise ValueError(f"{path} is damaged: its tensors do not have the hash that it says. {network.instructions}")
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    if {name: array.shape for name, array in flat.items()} != {
        ".".join(str(entry.key) for entry in path): leaf.shape for path, leaf in leaves
    }:
        raise ValueError(f"{path}: the converted weights hold other tensors than {network.name} needs")
    return name, digest, nested(flat)


def nested(flat: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """The tree of parameters whose paths are the dotted names."""
    params: dict[str, Any] = {}
    for name, array in flat.items():
        *module, leaf = name.split(".")
        inner = params
        for part in module:
            inner = inner.setdefault(part, {})
        inner[leaf] = array
    return params


def check_target(out: str) -> pathlib.Path:
    """Where converted weights go; ValueError unless it is a .safetensors."""
    if not out.endswith(".safetensors"):
        raise ValueError(f"--out={out or '(missing)'}: the converted weights are a .safetensors")
    return pathlib.Path(out)


def _content_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 of names, shapes and bytes: tells damage. (Intent it cannot tell: who writes a file writes its hash.)"""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).astype("<f4").tobytes())
    return digest.hexdigest()
