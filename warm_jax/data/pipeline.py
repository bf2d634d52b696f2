"""From a source to this process's part of each global batch."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from warm_jax.data import order
from warm_jax.data.arrays import Source


class Batch(NamedTuple):
    """What one process feeds to one step."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int32[np.ndarray, " b"]


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """An endless iterator over the batches of steps `start_step`, `start_step` + 1, …

    `batch_size` is the global one; process p of P gets the rows p·b/P … (p+1)·b/P - 1. A set smaller than a batch is
    repeated within it, with a warning.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} must be 0 … {process_count - 1}")
    if start_step < 0 or num_workers < 0:
        raise ValueError(f"start_step {start_step} and num_workers {num_workers} must be ≥ 0")
    if len(source) < batch_size:
        logging.warning(
            "%s has %d images, fewer than a batch of %d: images repeat within a batch",
            source.spec,
            len(source),
            batch_size,
        )
    local = batch_size // process_count
    rows = slice(process_index * local, (process_index + 1) * local)
    return _in_memory(source, seed, batch_size, start_step, rows)


def _in_memory(source: Source, seed: int, batch_size: int, step: int, rows: slice) -> Iterator[Batch]:
    while True:
        yield Batch(*source.read(order.indices(seed, step, batch_size, len(source))[rows]))
        step += 1
