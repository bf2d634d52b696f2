"""Digests of arrays: what tells whether a checkpoint that was read is the one that was saved.

Orbax stores arrays by TensorStore in OCDBT. Its manifest and B-tree nodes carry CRC-32C, checked when they are read;
that covers the small arrays that lie within a node. The chunks of larger arrays carry none, and no option of Orbax adds
one: a flipped bit in them comes back as other numbers. Hence a digest of the arrays themselves.

An array is taken as 32-bit words w[j, k] (16-bit and smaller elements one a word), k along the last axis and j along
all others. With sums modulo 2³², position keys p and a bijection h of 32-bit words,

    rows     r[j] = Σ_k w[j, k]     first half   Σ_j h(r[j] ^ p[j])
    columns  c[k] = Σ_j w[j, k]     second half  Σ_k h(c[k] ^ p[k]).

A change of one word changes one row and one column, hence one term of each half: it is always found. Other damage
passes with a probability of about 2⁻⁶⁴. All sums are of integers, so the digest is the same for any sharding, any
number of devices and processes, and any backend; the sums over all words are one pass at the speed of memory.
"""

import concurrent.futures
import json
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

FILE = "metadata"  # what Orbax calls the file of a JSON item
_BLOCK = 1 << 16  # words that are summed at a time on the host: they stay in its cache
_SMALL = 1 << 14  # elements up to which an array of an accelerator is summed on the host: nothing to compile


def _mixed(x: ModuleType, sums: UInt32[Array | np.ndarray, " n"]) -> UInt32[Array, ""] | np.uint32:
    """Σ h(sums[i] ^ p[i]); p and h by odd multipliers and shifts, as in MurmurHash3's finalizer."""
    keys = x.arange(sums.size, dtype=np.uint32) * x.uint32(0x9E3779B1)
    h = (sums ^ keys) * x.uint32(0x85EBCA6B)
    h = (h ^ (h >> x.uint32(15))) * x.uint32(0xC2B2AE35)
    return x.sum(h ^ (h >> x.uint32(13)), dtype=np.uint32)


@jax.jit
def _on_devices(array: Array) -> UInt32[Array, "2"]:
    """The digest of an array with at least one axis, wherever its parts are."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = array.astype(kind) if array.dtype == bool else jax.lax.bitcast_convert_type(array, kind)
    words = bits.astype(jnp.uint32)
    rows = jnp.sum(words, axis=-1, dtype=jnp.uint32)
    columns = jnp.sum(words, axis=tuple(range(words.ndim - 1)), dtype=jnp.uint32)
    return jnp.stack([_mixed(jnp, rows.reshape(-1)), _mixed(jnp, columns)])


def of_host(array: np.ndarray) -> UInt32[np.ndarray, "2"]:
    """The digest of an array in memory."""
    array = np.ascontiguousarray(array)
    array = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    size = min(array.dtype.itemsize, 4)
    words = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])
    rows, columns = np.zeros(len(words), np.uint32), np.zeros(words.shape[1], np.uint32)
    step = max(1, _BLOCK // max(1, words.shape[1]))
    for first in range(0, len(words), step):
        block = words[first : first + step]
        np.add.reduce(block, 1, dtype=np.uint32, out=rows[first : first + step])
        columns += np.add.reduce(block, 0, dtype=np.uint32)
    return np.stack([_mixed(np, rows), _mixed(np, columns)])


def _by_host(leaf: Array | np.ndarray) -> bool:
    """Whether the host sums a leaf: what lies in its memory, what is small, and what devices have no words for."""
    if not isinstance(leaf, jax.Array):
        return True
    near = all(device.platform == "cpu" for device in leaf.devices()) or leaf.size <= _SMALL or leaf.dtype.itemsize > 4
    return near and (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _fetched(leaf: Array | np.ndarray) -> UInt32[np.ndarray, "2"]:
    replica = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return of_host(np.asarray(leaf.addressable_data(0) if replica else leaf))


def of_tree(tree: PyTree[Array | np.ndarray]) -> dict[str, str]:
    """Path → digest of every array, 16 hexadecimal digits. Of a pod all processes must call it with the same arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # all are on their way before the first is waited for
        summing = [pool.submit(_fetched, leaf) if _by_host(leaf) else _on_devices(leaf) for _, leaf in leaves]
        found = [part.result() if isinstance(part, concurrent.futures.Future) else part for part in summing]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    pairs = zip(names, jax.device_get(found), strict=True)
    return {name: f"{int(one):08x}{int(other):08x}" for name, (one, other) in pairs}


def differing(found: dict[str, str], expected: dict[str, str]) -> str:
    """What differs, for an error; empty where nothing does."""
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if not wrong:
        return ""
    said = f"{wrong[0]} and {len(wrong) - 1} more are" if len(wrong) > 1 else f"{wrong[0]} is"
    return f"{said} not what was saved"


def read(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Item → path → digest, as stored in the folder of a JSON item. ValueError or OSError where that is damaged."""
    stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or not all(isinstance(part, dict) for part in stored.values()):
        raise ValueError("no digests by item and array")
    return stored
