"""MNIST's IDX files, plain or gzipped, and the data set that comes with the package.

The format (yann.lecun.com/exdb/mnist): bytes 0, 0, type (8: unsigned byte), number of dimensions; each dimension as a
big-endian uint32; then the data in C order.
"""

import gzip
import hashlib
import importlib.resources
import io
import math
import pathlib
import struct
import zlib

import numpy as np

from warm_jax.data import arrays

BUNDLED = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_CHUNK = 1 << 24
_MAX_BYTES = 1 << 36


def parse(content: bytes, name: str) -> np.ndarray:
    """The uint8 array in an IDX file; `name` is for the errors. Memory grows with its data, not its header."""
    try:
        stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if content[:2] == b"\x1f\x8b" else io.BytesIO(content)
        magic = stream.read(4)
        if len(magic) != 4 or magic[:2] != b"\0\0":
            raise ValueError(f"{name}: not an IDX file (it begins with {magic!r}, not with two zero bytes)")
        if magic[2] != 8 or not 1 <= magic[3] <= 4:
            raise ValueError(
                f"{name}: IDX type {magic[2]:#x}, {magic[3]} dimensions; only bytes (0x8) of 1 to 4 dimensions are read"
            )
        header = stream.read(4 * magic[3])
        if len(header) != 4 * magic[3]:
            raise ValueError(f"{name}: ends inside its header; get the file again")
        shape = struct.unpack(f">{magic[3]}I", header)
        size, data = math.prod(shape), bytearray()
        if size > _MAX_BYTES:
            raise ValueError(f"{name}: claims {size} bytes of data, the limit is {_MAX_BYTES}; the header is broken")
        if isinstance(stream, gzip.GzipFile):
            try:
                arrays.check_room(size, len(content))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        while len(data) < size and (chunk := stream.read(min(_CHUNK, size - len(data)))):
            data += chunk
        if len(data) != size or stream.read(1):
            had = f"{len(data)}" if len(data) < size else "more"
            raise ValueError(
                f"{name}: {list(shape)} needs {size} bytes of data, the file has {had}; get the file again"
            )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: broken gzip ({arrays.reason(error)}); get the file again") from error
    return np.frombuffer(bytes(data), np.uint8).reshape(shape)


def bundled() -> arrays.Arrays:
    """Fashion-MNIST's 10,000 test images, 28×28 grey, 10 classes: what trains when no data set is named."""
    folder, parsed = importlib.resources.files("warm_jax.data") / "bundled", []
    for name, expected in BUNDLED.items():
        content = (folder / name).read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise ValueError(f"bundled {name} has sha256 {found}, not {expected}; install warm_jax again")
        parsed.append(parse(content, name))
    return arrays.from_arrays("bundled", *parsed)


def open_idx(path: pathlib.Path) -> arrays.Arrays:
    """A folder (its train-* images, else its only images) or one file of images; labels are read if they lie beside."""
    images = _images_file(path) if path.is_dir() else path
    labels, spec = _labels_file(images), f"idx:{path}"
    content = parse(images.read_bytes(), str(images))
    if content.ndim not in (3, 4):
        raise ValueError(
            f"{images}: holds {list(content.shape)}, which are not images; name the file of images (…images-idx3-ubyte)"
        )
    return arrays.from_arrays(spec, content, parse(labels.read_bytes(), str(labels)) if labels else None)


def _images_file(folder: pathlib.Path) -> pathlib.Path:
    files = sorted(p for p in folder.iterdir() if "images" in p.name and "idx" in p.name and p.is_file())
    train = [p for p in files if p.name.startswith("train")]
    # train-images-idx3-ubyte sorts before the same name with .gz: of two copies, the plain one is read.
    stems = {p.name.removesuffix(".gz") for p in train or files}
    if len(stems) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise ValueError(
            f"{folder}: needs train-images-idx3-ubyte[.gz] or one file of images (found: {found}); or name the file"
        )
    return (train or files)[0]


def _labels_file(images: pathlib.Path) -> pathlib.Path | None:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1").removesuffix(".gz")
    candidates = [images.with_name(name), images.with_name(name + ".gz")]
    return next((p for p in candidates if p.is_file() and p != images), None)
