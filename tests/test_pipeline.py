"""Batches: the same for any number of processes and from any step; the expected rows are looked up one by one."""

import io
import itertools
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from warm_jax.data import arrays, order
from warm_jax.data.pipeline import batches, load, to_device
from warm_jax.data.sources import open_source


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
    assert "3 images are fewer than a batch of 9" in caplog.text
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


GRAIN = {"memory_limit": 0}


def test_grain_gives_the_same_batches():
    source = numbered(10)
    for start in (0, 3):
        expected = take(source, 6, seed=2, batch_size=4, start_step=start)
        found = take(source, 6, seed=2, batch_size=4, start_step=start, **GRAIN)
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("processes", [2, 4])
def test_grain_gives_each_process_its_rows(processes):
    source = numbered(10)
    arguments = {"seed": 1, "batch_size": 8, "process_count": processes, **GRAIN}
    parts = [take(source, 3, process_index=p, **arguments) for p in range(processes)]
    for step, whole in enumerate(take(source, 3, seed=1, batch_size=8)):
        np.testing.assert_array_equal(np.concatenate([part[step].images for part in parts]), whole.images)


def write_zip(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for i, content in enumerate(contents):
            archive.writestr(f"{i}.png", content)
    return open_source(f"zip:{path}")


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_two_workers_give_the_same_batches(tmp_path):
    source = write_zip(tmp_path / "set.zip", [encoded(pixels) for pixels in numbered(10).images])
    expected = take(numbered(10), 7, seed=2, batch_size=4, start_step=5)
    for num_workers in (0, 2):
        iterator = batches(source, seed=2, batch_size=4, start_step=5, num_workers=num_workers, **GRAIN)
        for batch, found in zip(expected, itertools.islice(iterator, 7), strict=True):
            np.testing.assert_array_equal(found.images, batch.images)
        iterator.close()
    assert same(next(batches(source, seed=2, batch_size=4, start_step=5))[:1], expected[0][:1])  # from memory


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named_from_threads_and_workers(tmp_path, num_workers):
    content = encoded(numbered(1).images[0])
    source = write_zip(tmp_path / "set.zip", [content, content, content[:-20], content])
    iterator = batches(source, seed=0, batch_size=4, num_workers=num_workers, **GRAIN)
    with pytest.raises(ValueError, match=r"set.zip: 2.png: not a readable PNG"):
        next(iterator)
    with pytest.raises(ValueError, match=r"set.zip: 2.png: not a readable PNG"):
        batches(source, seed=0, batch_size=4)  # in memory, it is found at the start


def test_load_reads_all_once():
    class Counted:
        spec, image_shape, num_classes, fingerprint, skipped = "counted", (2, 4, 3), 3, "", ()

        def __len__(self):
            return 1300

        def read(self, indices):
            images = np.zeros((len(indices), 2, 4, 3), np.uint8)
            images[:] = (indices % 251)[:, None, None, None]
            return images, (indices % 3).astype(np.int32)

    loaded = load(Counted())
    np.testing.assert_array_equal(loaded.images[:, 1, 2, 0], np.arange(1300) % 251)
    np.testing.assert_array_equal(loaded.labels, np.arange(1300) % 3)


def test_to_device_shards_the_global_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    expected = take(numbered(20), 5, seed=0, batch_size=16)
    found = list(to_device(expected, sharding))
    assert len(found) == 5
    for host, device in zip(expected, found, strict=True):
        assert device.images.sharding == sharding and device.labels.sharding == sharding
        assert same(host, device)
    for shard in found[0].images.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[0].images[shard.index])
