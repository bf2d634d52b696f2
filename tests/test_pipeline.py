"""Batches: the same for any number of processes and from any step; the expected rows are looked up one by one."""

import itertools

import numpy as np
import pytest

from warm_jax.data import arrays, order
from warm_jax.data.pipeline import batches


def numbered(count):
    """A source whose image i is filled with i, of class i % 3."""
    images = np.tile(np.arange(count, dtype=np.uint8)[:, None, None, None], (1, 2, 4, 3))
    return arrays.from_arrays("numbered", images, np.arange(count) % 3)


def take(source, count, **arguments):
    return list(itertools.islice(batches(source, **arguments), count))


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_batches_hold_what_the_order_says():
    for step, batch in enumerate(take(numbered(10), 7, seed=4, batch_size=4)):
        assert batch.images.shape == (4, 2, 4, 3) and batch.images.dtype == np.uint8 and batch.labels.dtype == np.int32
        for row in range(4):
            epoch, place = divmod(step * 4 + row, 10)
            number = np.random.RandomState([4, 0, epoch, 0]).permutation(10)[place]
            assert (batch.images[row] == number).all() and batch.labels[row] == number % 3


def test_any_start():
    source = numbered(10)
    whole = take(source, 8, seed=1, batch_size=6)
    for start in (1, 5):
        assert all(
            same(a, b)
            for a, b in zip(take(source, 3, seed=1, batch_size=6, start_step=start), whole[start:], strict=False)
        )


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes(processes):
    source = numbered(10)
    parts = [take(source, 5, seed=1, batch_size=8, process_index=p, process_count=processes) for p in range(processes)]
    for step, whole in enumerate(take(source, 5, seed=1, batch_size=8)):
        np.testing.assert_array_equal(np.concatenate([part[step].images for part in parts]), whole.images)
        np.testing.assert_array_equal(np.concatenate([part[step].labels for part in parts]), whole.labels)


def test_fewer_images_than_a_batch(caplog):
    (batch,) = take(numbered(3), 1, seed=0, batch_size=9)
    assert "3 images, fewer than a batch of 9" in caplog.text
    assert np.bincount(batch.images[:, 0, 0, 0]).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 5, "process_count": 2},
        {"process_index": 1},
        {"start_step": -1},
        {"num_workers": -1},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        batches(numbered(4), **{"seed": 0, "batch_size": 4} | arguments)


def test_order_is_shared():
    assert order.indices(0, 0, 4, 4).tolist() == np.random.RandomState([0, 0, 0, 0]).permutation(4).tolist()
