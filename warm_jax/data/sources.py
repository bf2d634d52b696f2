"""One string says where the images are, and they are read the same way from everywhere.

bundled                the Fashion-MNIST images that come with the package
idx:PATH               MNIST's format: a folder, or a file of images
zip:PATH  folder:PATH  PNG, JPEG and WebP, in any nesting, with EDM's dataset.json; what `prepare` writes
npz:PATH               `images` uint8 [n, H, W, C] and `labels` [n]
lmdb:PATH              LSUN's databases
arrayrecord:PATH       what `prepare` writes
tfds:NAME[@SPLIT]      TensorFlow Datasets, prepared as ArrayRecord; also a folder or gs://… that holds one
cifar10:PATH[@test]    CIFAR-10's binary archive
PATH                   any of them, told by its ending or by what is in the folder

A PATH may be gs://BUCKET/… where the bucket is mounted (see `buckets`).
"""

import collections
import dataclasses
import difflib
import hashlib
import logging
import pathlib
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Int, Int32, UInt8

from warm_jax.data import arrays, buckets, cifar, decoding, files, folders, idx, manifest, npz, records
from warm_jax.data.arrays import Items, Source

__all__ = ["Items", "Source", "open_items", "open_source"]

_KINDS = (
    "bundled, idx:PATH, zip:PATH, folder:PATH, npz:PATH, lmdb:PATH, arrayrecord:PATH, tfds:NAME[@SPLIT], "
    "cifar10:PATH[@test], or a PATH that is there"
)
_OPEN = {
    "idx": idx.open_idx,
    "zip": files.open_zip,
    "folder": files.open_folder,
    "npz": npz.open_npz,
    "lmdb": records.open_lmdb,
    "arrayrecord": records.open_arrayrecord,
}
_ENDINGS = {  # of a file that is named without its kind
    **{".zip": "zip", ".npz": "npz", ".arrayrecord": "arrayrecord", ".array_record": "arrayrecord", ".mdb": "lmdb"},
    **{".tar.gz": "cifar10", ".tgz": "cifar10", "-ubyte": "idx", "-ubyte.gz": "idx"},
}
_SIGNS = {
    "data.mdb": "lmdb",
    "data_batch_1.bin": "cifar10",
    "dataset_info.json": "tfds",
}  # of a folder: what lies in it
_SIDES = (32, 64)  # that are suggested, for a first training
_HEADERS = 1000  # images whose headers are read when a source is opened

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A source that decodes each image when it is read.

    `kept` are the numbers of the images that were not skipped; `size` and `channels` are what was asked for.
    """

    items: Items
    image_shape: tuple[int, int, int]
    kept: np.ndarray
    skipped: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    channels: int | None = None

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
            content, labels[row] = self.items.get(index)
            found = _told(decoding.decode, content, self.items, index, self.size, self.channels)
            if found.shape != self.image_shape:
                self.refuse(index, found.shape)
            pixels[row] = found
        return pixels, labels

    def refuse(self, index: int, shape: tuple[int, ...]) -> None:
        """Raises ValueError: the image at `index` of the items has another shape, `shape`."""
        name = f"{self.spec}: {self.items.name(index)}"
        _check_shape(name, shape, self.size, self.channels, self.items)
        (height, width, depth), first = self.image_shape, self.items.name(int(self.kept[0]))
        remedy = _remedy(self.items, self.size, self.channels)
        if shape[:2] != (height, width):
            raise ValueError(f"{name}: is {shape[0]}×{shape[1]} pixels, not {height}×{width} as {first}; {remedy}")
        raise ValueError(f"{name}: has {shape[2]} channels, not {depth} as {first}; {remedy}")


def open_source(
    spec: str, *, image_size: int | tuple[int, int] | None = None, channels: int | None = None, on_error: str = "raise"
) -> Source:
    """The images that `spec` names.

    With `image_size` (one side, or height and width) or `channels` the images must have just that: nothing is
    resized here. A broken image, or one of another shape, raises ValueError when it is read, and already now where the
    header shows it: of a folder or zip without manifest up to 1,000 are looked at. With `on_error="skip"`
    all images are decoded once now, and those are left out, counted and named in a warning and in `.skipped`.
    ValueError or OSError, in one line, for anything that is not there or not right.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"data.on_error is {on_error!r}; it must be 'raise' or 'skip'")
    items = open_items(spec)
    problems = getattr(items, "problems", {})
    if problems and on_error == "raise":
        name, problem = next(iter(problems.items()))
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{items.spec}: {folders.printable(name)}: {problem}, or {decoding.SKIP}{more}")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(items, arrays.Arrays):
        _check_shape(items.spec, items.image_shape, size, channels, items)
        return items
    if on_error == "skip":
        return _skipping(items, size, channels)
    shape = _told(decoding.decode, items.get(0)[0], items, 0, size, channels).shape
    _check_shape(f"{items.spec}: {items.name(0)}", shape, size, channels, items)
    source = Decoded(items, shape, np.arange(len(items)), (), size, channels)
    _check_headers(source)
    return source


def open_items(spec: str) -> Items:
    """What `spec` names, image by image as it is stored: of any size and colour mode."""
    if spec == "bundled":
        return idx.bundled()
    kind, rest = _kind(spec)
    if kind == "tfds":
        return records.open_tfds(rest)
    if kind == "cifar10":
        test = rest.endswith("@test")
        return cifar.open_cifar10(_path(rest.removesuffix("@test").removesuffix("@train")), "test" if test else "train")
    path = _path(rest)
    if kind != "folder" and path.is_dir() and kind not in ("idx", "lmdb"):
        raise ValueError(f"{spec}: is a folder; name a file, or use folder:{rest}")
    if kind == "folder" and path.is_file():
        raise ValueError(f"{spec}: is a file; name the folder that it is in, or leave out folder:")
    items = _OPEN[kind](path)
    manifest.check(path, items.fingerprint)
    return items


def test_split(spec: str) -> str:
    """The source that holds the test split of a training source; empty where none is known of it.

    Of CIFAR-10's archive, of a TensorFlow Dataset that has a split of that name, and of a folder in MNIST's format.
    """
    if spec == "bundled":
        return ""
    kind, rest = _kind(spec)
    if kind == "cifar10":
        return "" if rest.endswith("@test") else f"cifar10:{rest.removesuffix('@train')}@test"
    if kind == "tfds":
        name, _, split = rest.partition("@")
        return f"tfds:{name}@test" if split in ("", "train") and records.has_split(name, "test") else ""
    if kind == "idx" and _path(rest).is_dir():
        found = sorted(_path(rest).glob("t10k-images*-ubyte*"))  # the plain file before the one with .gz
        return f"idx:{found[0]}" if found else ""
    return ""


def _kind(spec: str) -> tuple[str, str]:
    """The kind and the path of a source, the kind told from the path where it is not said. ValueError, OSError."""
    kind, _, rest = spec.partition(":")
    if rest and kind in (*_OPEN, "tfds", "cifar10"):
        return kind, rest
    path = _path(spec)
    if spec and path.is_dir():
        signs = [kind for name, kind in _SIGNS.items() if (path / name).is_file()]
        signs += ["idx"] if any(path.glob("*images*-ubyte*")) else []
        return (signs or ["folder"])[0], spec
    known = [kind for ending, kind in _ENDINGS.items() if path.name.lower().endswith(ending)]
    if known:
        return known[0], spec
    if spec and path.exists():
        raise ValueError(f"{spec}: no kind of source is known by such a name; say it, as one of {_KINDS}")
    near = difflib.get_close_matches(path.name, _names(path.parent), n=1) if spec else []
    meant = f"did you mean {path.with_name(near[0])}? A source is" if near else "it must be"
    if "/" in spec:
        raise FileNotFoundError(f"no such file or folder: {spec!r}; {meant} one of {_KINDS}")
    raise ValueError(f"no such data source: {spec!r}; {meant} one of {_KINDS}")


def _names(folder: pathlib.Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _path(text: str) -> pathlib.Path:
    return buckets.local(text).expanduser()


def _told(
    look: Callable[[bytes | np.ndarray, str], Found],
    content: bytes | np.ndarray,
    items: Items,
    index: int,
    size: tuple[int, int] | None,
    channels: int | None,
) -> Found:
    """What `look` finds of an image; ValueError, with the command that helps, where training cannot read it."""
    try:
        return look(content, f"{items.spec}: {items.name(index)}")
    except decoding.UnpreparedError as error:
        raise ValueError(f"{error}; {_remedy(items, size, channels)}") from error


def _check_headers(source: Decoded) -> None:
    """Raises ValueError for a file that reading will refuse, of up to a thousand of a folder or zip, by their headers.

    What `prepare` wrote is equal, and its manifest says so.
    """
    items = source.items
    if not isinstance(items, files.Files) or manifest.beside(items.path).is_file():
        return

    def look(index: int) -> None:
        shape = _told(decoding.shape, items.get(index)[0], items, index, source.size, source.channels)
        if shape != source.image_shape:
            source.refuse(index, shape)

    chosen = np.unique(np.linspace(0, len(items) - 1, min(len(items), _HEADERS)).astype(int)).tolist()
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(look, chosen):
            pass


def _skipping(items: Items, size: tuple[int, int] | None, channels: int | None) -> Decoded:
    """All images are decoded, 256 at a time in threads; the commonest shape is kept where none is wished."""

    def look(index: int) -> tuple[tuple[int, int, int] | None, str]:
        try:
            content, _ = items.get(index)
            shape = decoding.decode(content, items.name(index)).shape
            _check_shape(items.name(index), shape, size, channels, items)
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
        logging.warning(
            "%s: skipped %d of %d images: %s", items.spec, len(skipped), len(items), folders.printable(listed)
        )
    return Decoded(items, shape, kept, skipped, size, channels)


def _check_shape(
    name: str, shape: tuple[int, ...], size: tuple[int, int] | None, channels: int | None, items: Items
) -> None:
    (height, width), depth = size or shape[:2], channels or shape[2]
    if shape == (height, width, depth):
        return
    remedy = _remedy(items, (height, width), depth)
    if shape[:2] != (height, width):
        raise ValueError(f"{name}: is {shape[0]}×{shape[1]} pixels, not {height}×{width} (data.image_size); {remedy}")
    raise ValueError(f"{name}: has {shape[2]} channels, not {depth} (data.channels); {remedy}")


def _remedy(items: Items, size: tuple[int, int] | None, channels: int | None) -> str:
    out, command = preparing(items.spec, size or suited_size(items), channels)
    classes = f"{items.num_classes} classes" if items.num_classes else "no classes"
    return f"run once: {command} and then use zip:{out}, which will have {classes} (data.num_classes)"


def suited_size(items: Items, most: int = 32) -> tuple[int, int]:
    """A height and width to resize images to that are of many: by the headers of up to `most`, spread over them."""
    sides = []
    for index in np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).astype(int)).tolist():
        try:
            sides.append(min(decoding.open_picture(items.get(index)[0], "", load=False).size))
        except (ValueError, OSError):
            continue
    return suited(sides)


def suited(sides: Sequence[int]) -> tuple[int, int]:
    """The largest usual size that most images of these shorter sides need not be enlarged to."""
    middle = sorted(sides)[len(sides) // 4] if sides else _SIDES[0]
    side = max((side for side in _SIDES if side <= middle), default=_SIDES[0])
    return side, side


def preparing(spec: str, size: tuple[int, int], channels: int | None) -> tuple[str, str]:
    """Where prepared images go, and the command that makes them."""
    name = pathlib.PurePath(spec.rpartition(":")[2].rstrip("/")).name.partition(".")[0] or "images"
    out, (height, width) = f"data/{name}-{size[0]}x{size[1]}.zip", size
    shape = [f"--image_size={height}" if height == width else f"--image_size={height}x{width}"]
    shape += [f"--channels={channels}"] if channels else []
    return out, shlex.join(["python", "-m", "warm_jax", "--mode=prepare", f"--images={spec}", *shape, f"--out={out}"])
