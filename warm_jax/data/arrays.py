"""What a source of images is, and the simplest one: arrays in memory.

A source is a numbered set of uint8 images of one shape, each with a class or with -1. It knows nothing of epochs,
batches, processes or devices: `order` says which numbers a step wants, `pipeline` reads them.
"""

import dataclasses
import hashlib
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt8

NO_LABEL = -1
_PACKED_LIMIT, _MOST_PACKED = 1 << 28, 100
_CONTAINER = pathlib.Path("/sys/fs/cgroup")  # version 2


@runtime_checkable
class Items(Protocol):
    """Numbered images as they are stored, of any size and colour mode: what `prepare` and `inspect` work on.

    Immutable, picklable (worker processes are sent a copy), and safe to use from many threads.
    """

    spec: str  # what names it, as in "zip:PATH"
    num_classes: int  # classes are 0 … num_classes - 1; 0: there are none, all labels are -1
    fingerprint: str  # a hash of the content, or of its directory where the content is large

    def __len__(self) -> int:
        """The number of images."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def get(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """The encoded image or its pixels, and its class; ValueError or OSError if it cannot be read."""
        ...


@runtime_checkable
class Source(Protocol):
    """Numbered uint8 images of one shape: what training reads. Immutable, picklable, safe to use from many threads."""

    spec: str
    image_shape: tuple[int, int, int]  # height, width, channels (1 or 3)
    num_classes: int
    fingerprint: str
    skipped: tuple[str, ...]  # "name: reason" of each image that on_error="skip" left out

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 `[n, H, W, C]` and labels int32 `[n]` of n indices; ValueError names an image that is broken."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Images in memory: both a `Source` and `Items`."""

    spec: str
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    num_classes: int
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Int[np.ndarray, " b"]) -> tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]:
        """The images and labels at `indices`."""
        return self.images[indices], self.labels[indices]

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"

    def get(self, index: int) -> tuple[np.ndarray, int]:
        """The pixels and the class."""
        return self.images[index], int(self.labels[index])


def reason(error: Exception) -> str:
    """What a library complained of, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def check_room(size: int, packed: int) -> None:
    """Raises ValueError where an array of `size` bytes, packed in `packed`, is not to be unpacked into memory.

    Either it does not fit into three quarters of what is free, or it is packed 100 to 1 and beyond 256 MiB, which
    photographs and drawings are not: such a file is made to fill a memory, or broken.
    """
    if size > _PACKED_LIMIT and size > _MOST_PACKED * packed:
        raise ValueError(
            f"it unpacks from {packed:,} to {size:,} bytes; beyond {_PACKED_LIMIT:,} bytes at most {_MOST_PACKED} to 1 "
            "is read; use a zip of PNGs"
        )
    if (free := free_memory()) is not None and size > free * 3 // 4:
        raise ValueError(f"it takes {size:,} bytes of memory, {free:,} are free; use a zip of PNGs, which stay on disk")


def free_memory() -> int | None:
    """Bytes that the system, and the container, still give; None where neither says."""
    known = []
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        most, used = (int((_CONTAINER / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        known.append(max(0, most - used))
    except (OSError, ValueError):  # none, or "max"
        pass
    return min(known, default=None)


def from_arrays(spec: str, images: np.ndarray, labels: np.ndarray | None = None) -> Arrays:
    """A source of images uint8 `[n, H, W]` or `[n, H, W, C]`, and one class ≥ 0 an image (or no labels at all)."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{spec}: images are {images.dtype}{list(images.shape)}; "
            "they must be uint8 [n, height, width] or [n, height, width, 1 or 3]"
        )
    if 0 in images.shape:
        raise ValueError(f"{spec}: no images (shape {list(images.shape)}); the path may name the wrong file")
    labels, num_classes = check_labels(spec, labels, len(images))
    images, digest = np.ascontiguousarray(images), hashlib.sha256(repr(images.shape).encode())
    digest.update(images)
    digest.update(labels.astype("<i4"))
    return Arrays(spec, images, labels, num_classes, digest.hexdigest())


def check_labels(spec: str, labels: np.ndarray | None, count: int) -> tuple[np.ndarray, int]:
    """Labels as int32 `[count]` (all -1 for None), and the number of classes; ValueError if they do not match."""
    if labels is None:
        return np.full(count, NO_LABEL, np.int32), 0
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        found = f"{labels.dtype}{list(labels.shape)}"
        raise ValueError(f"{spec}: labels are {found}; they must be one integer an image, [{count}]")
    if len(labels) != count:
        raise ValueError(f"{spec}: {len(labels)} labels for {count} images; they must match one to one")
    if labels.min() < 0 or labels.max() >= 2**20:
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{spec}: labels run from {found}; they must be classes 0 … {2**20 - 1}")
    return labels.astype(np.int32), int(labels.max()) + 1
