"""One string says where the images are, and they are read the same way from everywhere.

bundled                the Fashion-MNIST images that come with the package
idx:PATH               MNIST's format: a folder, or a file of images
zip:PATH  folder:PATH  PNG, JPEG and WebP, in any nesting, with EDM's dataset.json; what `prepare` writes
npz:PATH               `images` uint8 [n, H, W, C] and `labels` [n]
lmdb:PATH              LSUN's databases
arrayrecord:PATH       what `prepare` writes
tfds:NAME[@SPLIT]      TensorFlow Datasets, prepared as ArrayRecord; also a folder or gs://… that holds one
cifar10:PATH[@test]    CIFAR-10's binary archive

A PATH may be gs://BUCKET/… where the bucket is mounted (see `buckets`).
"""

import collections
import dataclasses
import hashlib
import logging
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, Int32, UInt8

from warm_jax.data import arrays, buckets, cifar, decoding, files, idx, manifest, npz, records
from warm_jax.data.arrays import Items, Source

__all__ = ["Items", "Source", "open_items", "open_source"]

_KINDS = (
    "bundled, idx:PATH, zip:PATH, folder:PATH, npz:PATH, lmdb:PATH, arrayrecord:PATH, tfds:NAME[@SPLIT], "
    "cifar10:PATH[@test]"
)
_OPEN = {
    "idx": idx.open_idx,
    "zip": files.open_zip,
    "folder": files.open_folder,
    "npz": npz.open_npz,
    "lmdb": records.open_lmdb,
    "arrayrecord": records.open_arrayrecord,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A source that decodes each image when it is read. `kept` are the numbers of the images that were not skipped."""

    items: Items
    image_shape: tuple[int, int, int]
    kept: np.ndarray
    skipped: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        """What names it."""
        return self.items.spec

    @property
    def num_classes(self) -> int:
        """0: there are no labels."""
        return self.items.num_classes

    @property
    def fingerprint(self) -> str:
        """That of the items, and of what was skipped of them."""
        if not self.skipped:
            return self.items.fingerprint
        return hashlib.sha256(self.items.fingerprint.encode() + self.kept.astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, indices: Int[np.ndarray, " b"]) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """Decode the images at `indices`; ValueError names one that is broken or of another shape."""
        pixels = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, index in enumerate(self.kept[indices].tolist()):
            pixels[row], labels[row] = _decode(self.items, index, self.image_shape)
        return pixels, labels


def open_source(
    spec: str, *, image_size: int | tuple[int, int] | None = None, channels: int | None = None, on_error: str = "raise"
) -> Source:
    """The images that `spec` names.

    With `image_size` (one side, or height and width) or `channels` the images must have just that: nothing is
    resized here. A broken image, or one of another shape, raises ValueError when it is read. With `on_error="skip"`
    all images are decoded once now, and those are left out, counted and named in a warning and in `.skipped`.
    ValueError or OSError, in one line, for anything that is not there or not right.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"data.on_error is {on_error!r}; it must be 'raise' or 'skip'")
    items = open_items(spec)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(items, arrays.Arrays):
        _check_shape(items.spec, items.image_shape, size, channels)
        return items
    if on_error == "skip":
        return _skipping(items, size, channels)
    content, _ = items.get(0)
    shape = decoding.decode(content, f"{items.spec}: {items.name(0)}").shape
    _check_shape(f"{items.spec}: {items.name(0)}", shape, size, channels, items.spec)
    return Decoded(items, shape, np.arange(len(items)))


def open_items(spec: str) -> Items:
    """What `spec` names, image by image as it is stored: of any size and colour mode."""
    kind, _, rest = spec.partition(":")
    if spec == "bundled":
        return idx.bundled()
    if not rest or kind not in (*_OPEN, "tfds", "cifar10"):
        raise ValueError(f"no such data source: {spec!r}; it must be one of {_KINDS}")
    if kind == "tfds":
        return records.open_tfds(rest)
    if kind == "cifar10":
        test = rest.endswith("@test")
        return cifar.open_cifar10(_path(rest.removesuffix("@test").removesuffix("@train")), "test" if test else "train")
    path = _path(rest)
    if kind != "folder" and path.is_dir() and kind not in ("idx", "lmdb"):
        raise ValueError(f"{spec}: is a folder; name a file, or use folder:{rest}")
    items = _OPEN[kind](path)
    manifest.check(path, items.fingerprint)
    return items


def _path(text: str) -> pathlib.Path:
    return buckets.local(text).expanduser()


def _decode(items: Items, index: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, int]:
    content, label = items.get(index)
    name = f"{items.spec}: {items.name(index)}"
    pixels = decoding.decode(content, name)
    if pixels.shape != shape:
        _check_shape(name, pixels.shape, shape[:2], shape[2], items.spec)
    return pixels, label


def _skipping(items: Items, size: tuple[int, int] | None, channels: int | None) -> Decoded:
    """All images are decoded, 256 at a time in threads; the commonest shape is kept where none is wished."""

    def look(index: int) -> tuple[tuple[int, int, int] | None, str]:
        try:
            content, _ = items.get(index)
            shape = decoding.decode(content, items.name(index)).shape
            _check_shape(items.name(index), shape, size, channels, items.spec)
        except (ValueError, OSError) as error:
            return None, str(error)
        return shape, ""

    with ThreadPoolExecutor() as pool:
        found = [
            seen
            for start in range(0, len(items), 256)
            for seen in pool.map(look, range(start, min(start + 256, len(items))))
        ]
    shapes = collections.Counter(shape for shape, _ in found if shape is not None)
    if not shapes:
        raise ValueError(f"{items.spec}: none of its {len(items)} images can be read; the first: {found[0][1]}")
    shape = shapes.most_common(1)[0][0]
    kept = np.array([i for i, (one, _) in enumerate(found) if one == shape])
    skipped = tuple(
        reason or f"{items.name(i)}: is {one[0]}×{one[1]}×{one[2]}, most are {shape[0]}×{shape[1]}×{shape[2]}"
        for i, (one, reason) in enumerate(found)
        if one != shape
    )
    if skipped:
        listed = "; ".join(skipped[:10]) + ("; …" if len(skipped) > 10 else "")
        logging.warning("%s: skipped %d of %d images: %s", items.spec, len(skipped), len(items), listed)
    return Decoded(items, shape, kept, skipped)


def _check_shape(
    name: str, shape: tuple[int, ...], size: tuple[int, int] | None, channels: int | None, spec: str | None = None
) -> None:
    (height, width), depth = size or shape[:2], channels or shape[2]
    if shape == (height, width, depth):
        return
    remedy = f"run once: python -m warm_jax.main --config=… --mode=prepare --images={spec or name} --out=FILE.zip"
    if shape[:2] != (height, width):
        raise ValueError(f"{name}: is {shape[0]}×{shape[1]} pixels, not {height}×{width} (data.image_size); {remedy}")
    raise ValueError(f"{name}: has {shape[2]} channels, not {depth} (data.channels); {remedy}")
