"""The order of images: expectations come from numpy's own frozen stream and from the definition of a permutation."""

import numpy as np
import pytest

from warm_jax.data import order


def positions(seed, steps, batch_size, count):
    return np.concatenate([order.indices(seed, s, batch_size, count) for s in steps])


@pytest.mark.parametrize(("batch_size", "count"), [(4, 12), (5, 12), (7, 3), (1, 5), (12, 12)])
def test_every_epoch_is_a_permutation(batch_size, count):
    sequence = positions(3, range(6 * count), batch_size, count)
    epochs = sequence[: len(sequence) // count * count].reshape(-1, count)
    assert len(epochs) >= 6
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (len(epochs), 1)))


def test_epochs_and_seeds_differ():
    one, two = (positions(s, range(2), 100, 100).reshape(2, 100) for s in (0, 1))
    assert (one[0] != one[1]).mean() > 0.9
    assert (one[0] != two[0]).mean() > 0.9


def test_the_stream_is_numpys_frozen_one():
    expected = np.random.RandomState([5, 0, 2, 0]).permutation(10)
    np.testing.assert_array_equal(order.indices(5, 2, 10, 10), expected)
    # Written down from numpy 2.4.6: a checkpoint of today must go on in this order for ever.
    np.testing.assert_array_equal(np.random.RandomState([5, 0, 2, 0]).permutation(10), [7, 8, 6, 1, 3, 4, 0, 9, 2, 5])


def test_the_sequence_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(positions(1, range(10), 6, 17), positions(1, range(4), 15, 17))


def test_large_seeds_and_steps():
    assert order.indices(2**40 + 1, 10**9, 512, 50_000).max() < 50_000
    assert (order.indices(2**40 + 1, 0, 64, 50_000) != order.indices(1, 0, 64, 50_000)).any()


def test_each_image_is_equally_often_at_each_place():
    # 2,000 epochs of 8: each of 64 cells has mean 250 and standard deviation about 15.
    counts = np.zeros((8, 8))
    for epoch in range(2000):
        counts[np.arange(8), order.permutation(0, epoch, 8)] += 1
    assert np.abs(counts - 250).max() < 5 * 15


@pytest.mark.parametrize(
    ("seed", "step", "batch_size", "count"), [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)]
)
def test_bad_arguments(seed, step, batch_size, count):
    with pytest.raises(ValueError, match="must be"):
        order.indices(seed, step, batch_size, count)
