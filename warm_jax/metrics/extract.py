"""Images to features: batched, padded to one shape so that it compiles once, spread over the devices of a sharding.

An `Extractor` is a network with its weights and the two strings that must stand beside every number computed with it.
The networks: `inception`, `efficientnet`, `fashion`. On several hosts each extracts its own images over its own
devices (a mesh of `jax.local_devices()`), and their `Statistics` merge; no feature crosses the network.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from warm_jax.metrics.moments import UINT8_RULE, Provenance, Statistics, provenance_arrays, read_provenance
from warm_jax.weights import archives


class Features(NamedTuple):
    """`pool` `[n, d]`, and `logits` `[n, classes]` for the Inception Score; float32, on the host once extracted."""

    pool: Any
    logits: Any


@dataclasses.dataclass(frozen=True)
class Extractor:
    """`apply(params, images: uint8 [b, h, w, c]) -> Features`, pure; `hash` is the sha256 of the weights file."""

    name: str
    hash: str
    dim: int
    params: Any
    apply: Callable[[Any, Any], Features]

    def provenance(self, resolution: tuple[int, ...], data_hash: str | None = None) -> Provenance:
        """What to write beside moments or features of images of this (height, width, channels)."""
        height, width, channels = resolution
        return Provenance(self.name, self.hash, UINT8_RULE, (height, width, channels), data_hash)


def rebatch(chunks: Iterable[Shaped[np.ndarray, "..."]], size: int) -> Iterator[np.ndarray]:
    """The same images in order, `size` at a time, the last batch shorter; ValueError unless uint8 and of one shape."""
    shape, waiting, count = None, [], 0
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.ndim != 4:
            raise ValueError(f"images must be uint8 [n, height, width, channels], not {chunk.dtype} {chunk.shape}")
        shape = chunk.shape[1:] if shape is None else shape
        if chunk.shape[1:] != shape:
            raise ValueError(f"images of {shape} and of {chunk.shape[1:]} in one set")
        waiting.append(chunk)
        count += len(chunk)
        if count >= size:
            joined = np.concatenate(waiting)
            for start in range(0, count - size + 1, size):
                yield joined[start : start + size]
            waiting, count = [joined[count - count % size :]], count % size
    if count:
        yield np.concatenate(waiting)


def extract(
    extractor: Extractor,
    chunks: Iterable[Shaped[np.ndarray, "..."]],
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Iterator[Features]:
    """Features of uint8 images, batch by batch and in order, as numpy arrays.

    `chunks` are arrays of any number of images. `sharding` says how a batch lies on the devices (`P("data")` on a
    mesh); `batch_size` must be a multiple of their number. The last batch is padded with black images, whose features
    are dropped: one shape, one compilation. While the devices work on a batch the previous one is fetched.
    """
    params, apply = extractor.params, jax.jit(extractor.apply)
    if sharding is not None:
        replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(params, replicated)

    def fetch(result: Features, count: int) -> Features:
        return Features(*(None if leaf is None else np.asarray(leaf)[:count] for leaf in result))

    previous = None
    for images in rebatch(chunks, batch_size):
        count = len(images)
        padded = np.pad(images, [(0, batch_size - count), (0, 0), (0, 0), (0, 0)])
        current = apply(params, jax.device_put(padded, sharding)), count
        if previous is not None:
            yield fetch(*previous)
        previous = current
    if previous is not None:
        yield fetch(*previous)


def collect(batches: Iterable[Features]) -> Features:
    """All batches in one, for the scores that need every feature; ValueError if there is none."""
    batches = list(batches)
    if not batches:
        raise ValueError("no images")
    logits = None if batches[0].logits is None else np.concatenate([batch.logits for batch in batches])
    return Features(np.concatenate([batch.pool for batch in batches]), logits)


def accumulate(batches: Iterable[Features], dim: int) -> Statistics:
    """Statistics of the pool features, never more than about `dim` of them in memory."""
    statistics, waiting, count = Statistics.empty(dim), [], 0
    for batch in batches:
        waiting.append(batch.pool)
        count += len(batch.pool)
        if count >= dim:  # one product of [d, n] with [n, d] costs as much as the addition of [d, d] at small n
            statistics, waiting, count = statistics.update(np.concatenate(waiting)), [], 0
    return statistics.update(np.concatenate(waiting)) if waiting else statistics


def save_features(path: str | os.PathLike, features: Features, provenance: Provenance) -> None:
    """One shard of an evaluation, written whole or not at all, so that an interrupted one goes on where it stopped."""
    logits = {} if features.logits is None else {"logits": features.logits}
    archives.write_npz(path, pool=features.pool, **logits, **provenance_arrays(provenance))


def load_features(path: str | os.PathLike, expected: Provenance) -> Features:
    """A shard of `save_features`; ValueError if it is damaged or came from something else than `expected`."""
    arrays = archives.read_npz(path)
    if "pool" not in arrays:
        raise ValueError(f"{path} has {sorted(arrays)}, no features")
    expected.require_same(read_provenance(arrays), ("this evaluation", str(path)))
    return Features(arrays["pool"], arrays.get("logits"))
