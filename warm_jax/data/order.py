"""Which images a step wants: a function of (seed, step), so that a checkpoint needs to hold no more than the step.

The images of all steps form one endless sequence. Position p lies in epoch p // count, each epoch is a permutation of
the whole set, and step s takes the positions s·b … (s+1)·b - 1: batches run over the border between epochs, and no
image is dropped.
"""

import functools

import numpy as np
from jaxtyping import Int64


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " {count}"]:
    """The order of `count` images in one epoch. Read-only.

    `RandomState` and not `default_rng`: NEP 19 freezes its stream, so a run resumes in the same order under any numpy.
    """
    if seed < 0 or epoch < 0 or count < 1:
        raise ValueError(f"seed {seed} and epoch {epoch} must be ≥ 0, count {count} ≥ 1")
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch & 0xFFFFFFFF, epoch >> 32]
    shuffled = np.random.RandomState(words).permutation(count).astype(np.int64)
    shuffled.flags.writeable = False
    return shuffled


def indices(seed: int, step: int, batch_size: int, count: int) -> Int64[np.ndarray, " {batch_size}"]:
    """The indices of step `step`'s global batch, from a set of `count` images."""
    if step < 0 or batch_size < 1 or count < 1:
        raise ValueError(f"step {step} must be ≥ 0, batch_size {batch_size} and count {count} ≥ 1")
    epochs, offsets = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), count)
    chosen = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        chosen[epochs == epoch] = permutation(seed, int(epoch), count)[offsets[epochs == epoch]]
    return chosen
