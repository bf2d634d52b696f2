"""From a source to this process's part of each global batch, and on to the devices.

A batch is a function of (source, seed, step) alone: `order` names the images, and it does not matter who reads them.
Small sources are decoded once into memory; from large ones Grain reads ahead, in threads or in worker processes. Either
way, for any number of processes and workers and from any step, the batches are the same, and a checkpoint
needs only its step.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8

from warm_jax.data import order
from warm_jax.data.arrays import Arrays, Source

_CHUNK = 512  # images decoded at a time by one thread


class Batch(NamedTuple):
    """What one process feeds to one step (numpy), or what all feed to it together (sharded jax arrays)."""

    images: UInt8[np.ndarray | jax.Array, "b h w c"]
    labels: Int32[np.ndarray | jax.Array, " b"]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The local batches, numbered from `start`: what Grain's random access wants."""

    source: Source
    seed: int
    batch_size: int
    rows: slice
    start: int

    def __len__(self) -> int:
        return 2**40  # for ever

    def __getitem__(self, step: int) -> Batch:
        wanted = order.indices(self.seed, self.start + step, self.batch_size, len(self.source))
        return Batch(*self.source.read(wanted[self.rows]))


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    memory_limit: int = 1 << 30,
) -> Iterator[Batch]:
    """An endless iterator over the batches of steps `start_step`, `start_step` + 1, …

    `batch_size` is the global one; process p of P gets the rows p·b/P … (p+1)·b/P - 1. A set smaller than a batch is
    repeated within it, with a warning.

    A source of at most `memory_limit` bytes of pixels is decoded into memory first. A larger one is read by Grain, in
    threads, or in `num_workers` processes where one process cannot decode fast enough. Those are spawned: a script that
    asks for them needs the `if __name__ == "__main__"` guard, a notebook does not.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} must be 0 … {process_count - 1}")
    if start_step < 0 or num_workers < 0:
        raise ValueError(f"start_step {start_step} and num_workers {num_workers} must be ≥ 0")
    if len(source) < batch_size:
        logging.warning(
            "%s: %d images are fewer than a batch of %d; they repeat within it", source.spec, len(source), batch_size
        )
    if len(source) * int(np.prod(source.image_shape)) <= memory_limit:
        source, num_workers, in_memory = load(source), 0, True
    else:
        in_memory = False
    local = batch_size // process_count
    rows = slice(process_index * local, (process_index + 1) * local)
    steps = _Steps(source, seed, batch_size, rows, start_step)
    return _in_memory(steps) if in_memory else _read_ahead(steps, num_workers)


def load(source: Source) -> Arrays:
    """All of a source in memory, decoded by as many threads as there are cores."""
    if isinstance(source, Arrays):
        return source
    images = np.empty((len(source), *source.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def fill(start: int) -> None:
        rows = np.arange(start, min(start + _CHUNK, len(source)))
        images[rows], labels[rows] = source.read(rows)

    with ThreadPoolExecutor() as pool:
        collections.deque(pool.map(fill, range(0, len(source), _CHUNK)), maxlen=0)
    return Arrays(source.spec, images, labels, source.num_classes, source.fingerprint, source.skipped)


def _in_memory(steps: _Steps) -> Iterator[Batch]:
    step = 0
    while True:
        yield steps[step]
        step += 1


def _read_ahead(steps: _Steps, num_workers: int) -> Iterator[Batch]:
    dataset = grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in tests and notebooks; Grain reads its own flags to start a worker
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    yield from dataset


def to_device(local: Iterable[Batch], sharding: jax.sharding.Sharding, prefetch: int = 2) -> Iterator[Batch]:
    """Global batches on the devices of `sharding` (over the batch axis), `prefetch` of them on their way at a time.

    Every process gives its own rows; they are where the sharding wants them if the mesh's devices are in process order.
    """
    waiting = collections.deque()
    for batch in local:
        with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a training loop is for
            waiting.append(Batch(*(jax.make_array_from_process_local_data(sharding, part) for part in batch)))
        if len(waiting) > prefetch:
            yield waiting.popleft()
    yield from waiting
