"""Digests of arrays: what tells whether a checkpoint that was read is the one that was saved.

Orbax stores arrays by TensorStore in OCDBT. Its manifest and B-tree nodes carry CRC-32C, checked when they are read;
that covers the small arrays that lie within a node. The chunks of larger arrays carry none, and no option of Orbax adds
one: a flipped bit in them comes back as other numbers. Hence a digest of the arrays themselves.

An array is taken as 32-bit words w[l, i, k] (16-bit and smaller elements one a word): k along the last axis, i along
the one before it, l along all others. With sums modulo 2³², odd weights a and bijections g and h of 32-bit words,

    c[l, k] = Σ_i a[i mod m] w[l, i, k]     halves  Σ g(c[l, k] ^ p[l, k])  and  Σ h(c[l, k] ^ p[l, k]).

A change of one word changes one c, hence one term of each half: it is always found. Other damage passes with a
probability of about 2⁻⁶⁴, unless all that it changes in a column (l, k) cancels in c: opposite flips of one bit, or
rows i that have changed places, a multiple of m apart. All sums are of integers, so the digest is the same for any
sharding, any number of devices and processes, and any backend. It is one pass at the speed of memory: on the host the
words are added up by NumPy, m rows at a time, and only what comes of that is multiplied and mixed.

The first version of this digest summed all rows and all columns, which is two passes. It is still verified where a
checkpoint has it; of which version a digest is, its text says.
"""

import concurrent.futures
import functools
import json
import math
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

FILE = "metadata"  # what Orbax calls the file of a JSON item
VERSION = 2  # of the digests that are written
_SECOND = "2:"  # what a digest of version 2 begins with; those of version 1 have their digits alone
_WIDTH = 1 << 12  # words that are added at a time on the host: they stay in its cache
_BLOCK = 1 << 16  # words that are looked at together there, by the first version
_SMALL = 1 << 14  # elements up to which an array of an accelerator is summed on the host: nothing to compile
_GOLDEN, _ODD = 0x9E3779B1, 0x3C6EF362  # 2³² / φ, rounded to an odd number; twice that, modulo 2³²


def _mixed(
    x: ModuleType, sums: UInt32[Array | np.ndarray, "..."], version: int = 1
) -> list[UInt32[Array, ""] | np.uint32]:
    """Σ g(sums[i] ^ p[i]), and of version 2 Σ h(sums[i] ^ p[i]); the steps of MurmurHash3's finalizer."""
    keys = (x.arange(sums.size, dtype=np.uint32) * x.uint32(_GOLDEN)).reshape(sums.shape)
    g = (sums ^ keys) * x.uint32(0x85EBCA6B)
    g = (g ^ (g >> x.uint32(15))) * x.uint32(0xC2B2AE35)
    found = [x.sum(g ^ (g >> x.uint32(13)), dtype=np.uint32)]
    if version == 2:
        h = (g ^ (g >> x.uint32(16))) * x.uint32(0x27D4EB2F)
        found.append(x.sum(h ^ (h >> x.uint32(15)), dtype=np.uint32))
    return found


def _period(rows: int, width: int) -> int:
    """m: rows of about `_WIDTH` words together; odd, since what lies in the wrong place does so by whole pages."""
    most = max(1, min(rows, _WIDTH // max(1, width)))
    return most - (most % 2 == 0)


def _weights(x: ModuleType, rows: int, period: int) -> UInt32[Array | np.ndarray, "i 1"]:
    return (x.arange(rows, dtype=np.uint32) % x.uint32(period) * x.uint32(_ODD) + x.uint32(1))[:, None]


@functools.partial(jax.jit, static_argnames="version")
def _on_devices(array: Array, version: int = VERSION) -> UInt32[Array, "2"]:
    """The digest of an array with at least one axis, wherever its parts are."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = array.astype(kind) if array.dtype == bool else jax.lax.bitcast_convert_type(array, kind)
    words = bits.astype(jnp.uint32)
    if version == 1:
        rows = jnp.sum(words, axis=-1, dtype=jnp.uint32)
        columns = jnp.sum(words, axis=tuple(range(words.ndim - 1)), dtype=jnp.uint32)
        return jnp.stack(_mixed(jnp, rows) + _mixed(jnp, columns))
    if words.ndim > 1:
        rows, width = words.shape[-2:]
        words = jnp.sum(words * _weights(jnp, rows, _period(rows, width)), axis=-2, dtype=jnp.uint32)
    return jnp.stack(_mixed(jnp, words, 2))


def of_host(array: np.ndarray, version: int = VERSION) -> UInt32[np.ndarray, "2"]:
    """The digest of an array in memory."""
    array = np.ascontiguousarray(array)
    array = array.reshape(array.shape or (1,))
    words = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[min(array.dtype.itemsize, 4)])
    if version == 1:
        return _first_version(words.reshape(-1, words.shape[-1]))
    rows = words.shape[-2] if words.ndim > 1 else 1
    words = words.reshape(math.prod(words.shape[:-2]), rows, words.shape[-1])
    return np.stack(_mixed(np, _columns(words), 2))


def _columns(words: Shaped[np.ndarray, "l i k"]) -> UInt32[np.ndarray, "l k"]:
    """c[l, k]."""
    parts, rows, width = words.shape
    period = _period(rows, width)
    whole = rows - rows % period
    folded = words[:, :whole].reshape(parts, whole // period, period * width)  # no copy
    summed = np.add.reduce(folded, 1, dtype=np.uint32).reshape(parts, period, width)
    summed[:, : rows - whole] += words[:, whole:]
    return np.add.reduce(summed * _weights(np, period, period), 1, dtype=np.uint32)


def _first_version(words: Shaped[np.ndarray, "j k"]) -> UInt32[np.ndarray, "2"]:
    rows, columns = np.zeros(len(words), np.uint32), np.zeros(words.shape[1], np.uint32)
    step = max(1, _BLOCK // max(1, words.shape[1]))
    for first in range(0, len(words), step):
        block = words[first : first + step]
        np.add.reduce(block, 1, dtype=np.uint32, out=rows[first : first + step])
        columns += np.add.reduce(block, 0, dtype=np.uint32)
    return np.stack(_mixed(np, rows) + _mixed(np, columns))


def _by_host(leaf: Array | np.ndarray) -> bool:
    """Whether the host sums a leaf: what lies in its memory, what is small, and what devices have no words for."""
    if not isinstance(leaf, jax.Array):
        return True
    near = all(device.platform == "cpu" for device in leaf.devices()) or leaf.size <= _SMALL or leaf.dtype.itemsize > 4
    return near and (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _fetched(leaf: Array | np.ndarray, version: int) -> UInt32[np.ndarray, "2"]:
    replica = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return of_host(np.asarray(leaf.addressable_data(0) if replica else leaf), version)


def of_tree(tree: PyTree[Array | np.ndarray], version: int = VERSION) -> dict[str, str]:
    """Path → digest of every array, as text. Of a pod all processes must call it with the same arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # all are on their way before the first is waited for
        summing = [
            pool.submit(_fetched, leaf, version) if _by_host(leaf) else _on_devices(leaf, version) for _, leaf in leaves
        ]
        found = [part.result() if isinstance(part, concurrent.futures.Future) else part for part in summing]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    pairs, begin = zip(names, jax.device_get(found), strict=True), _SECOND if version == 2 else ""
    return {name: f"{begin}{int(one):08x}{int(other):08x}" for name, (one, other) in pairs}


def version_of(stored: dict[str, str]) -> int:
    """Of which version the digests of an item are."""
    return 2 if any(str(digest).startswith(_SECOND) for digest in stored.values()) else 1


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
