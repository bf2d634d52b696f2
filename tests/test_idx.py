"""IDX files: written here byte by byte from the format's description, or checked against published sums."""

import gzip
import struct

import numpy as np
import pytest

from warm_jax.data import idx
from warm_jax.data.sources import open_source

IMAGES = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
LABELS = np.array([3, 0, 1, 1, 2], np.uint8)


def encode(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, prefix="train", suffix="", images=IMAGES, labels=LABELS):
    pack = gzip.compress if suffix else bytes
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(encode(images)))
    if labels is not None:
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(encode(labels)))


def test_bundled():
    source = open_source("bundled", image_size=28, channels=1)
    images, labels = source.read(np.arange(len(source)))
    assert (len(source), source.image_shape, source.num_classes) == (10_000, (28, 28, 1), 10)
    assert images.dtype == np.uint8 and images.shape == (10_000, 28, 28, 1)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), [1000] * 10)  # the data set's paper: 1,000 of each class
    assert labels[:4].tolist() == [9, 2, 1, 1]  # the published order: ankle boot, pullover, trouser, trouser
    assert source.fingerprint == open_source("bundled").fingerprint


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_round_trip(tmp_path, suffix):
    write(tmp_path, "t10k", suffix, images=255 - IMAGES, labels=None)
    write(tmp_path, "train", suffix)
    for path in (tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}"):
        source = open_source(f"idx:{path}")
        images, labels = source.read(np.array([4, 0, 4]))
        np.testing.assert_array_equal(images[..., 0], IMAGES[[4, 0, 4]])
        assert labels.tolist() == [2, 3, 2]
        assert (source.num_classes, source.image_shape, len(source)) == (4, (4, 6, 1), 5)


def test_colour_and_no_labels(tmp_path):
    colour = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    (tmp_path / "images.idx").write_bytes(encode(colour))
    source = open_source(f"idx:{tmp_path / 'images.idx'}")
    images, labels = source.read(np.arange(2))
    np.testing.assert_array_equal(images, colour)
    assert labels.tolist() == [-1, -1] and source.num_classes == 0


def test_fingerprint_follows_images_and_labels(tmp_path):
    prints = set()
    for i, (images, labels) in enumerate(
        [(IMAGES, LABELS), (IMAGES, LABELS[::-1]), (IMAGES[::-1], LABELS), (IMAGES, None)]
    ):
        (tmp_path / str(i)).mkdir()
        write(tmp_path / str(i), images=images, labels=labels)
        prints.add(open_source(f"idx:{tmp_path / str(i)}").fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"GIF89a", "not an IDX file"),
        (b"\0\0\x0d\x03" + b"\0" * 20, "only bytes"),
        (b"\0\0\x08\x03\0\0", "inside its header"),
        (encode(IMAGES)[:-1], "needs 120 bytes"),
        (encode(IMAGES) + b"x", "the file has more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "the header is broken"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 1 << 16, 1 << 9, 1 << 9), "the file has 0"),
        (gzip.compress(encode(IMAGES))[:-9], "broken gzip"),
        (encode(LABELS), "not images"),
        (encode(IMAGES[:0]), "no images"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(f"idx:{path}")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_bad_labels_folders_and_wishes(tmp_path):
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.*found: none"):
        open_source(f"idx:{tmp_path}")
    write(tmp_path, labels=LABELS[:4])
    with pytest.raises(ValueError, match="4 labels for 5 images"):
        open_source(f"idx:{tmp_path}")
    write(tmp_path)
    with pytest.raises(ValueError, match=r"4×6 pixels, not 32×32 .*--mode=prepare"):
        open_source(f"idx:{tmp_path}", image_size=32)
    with pytest.raises(ValueError, match=r"1 channels, not 3 .*--mode=prepare"):
        open_source(f"idx:{tmp_path}", image_size=(4, 6), channels=3)
    with pytest.raises(FileNotFoundError):
        open_source(f"idx:{tmp_path / 'nowhere'}")
    for spec in ("", "idx:", "idx", "ftp:somewhere", "/a/path"):
        with pytest.raises((ValueError, FileNotFoundError), match="must be one of bundled"):
            open_source(spec)
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        open_source("bundled", on_error="ignore")


def test_the_bundled_files_are_checked(monkeypatch):
    monkeypatch.setitem(idx.BUNDLED, "t10k-labels-idx1-ubyte.gz", "0" * 64)
    with pytest.raises(ValueError, match="has sha256 8d3605d196f4be"):
        open_source("bundled")
