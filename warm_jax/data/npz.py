"""numpy archives: `images` uint8 `[n, H, W]` or `[n, H, W, C]`, and `labels` `[n]`. Pickles are never read.

What an array takes is known from its header, and refused before anything is unpacked where it is too much: see
`arrays.check_room`. The CRC-32 of what is read is checked, and so are the names of what is not.
"""

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from warm_jax.data import arrays, files

_IMAGES = ("images", "arr_0", "x")
_LABELS = ("labels", "label", "arr_1", "y")


def open_npz(path: pathlib.Path) -> arrays.Arrays:
    """The images (`images`, `arr_0` or `x`) and classes (`labels`, `label`, `arr_1` or `y`) in an .npz."""
    with path.open("rb") as stream:
        try:
            archive = files.open_archive(stream)
            entries = archive.infolist()
        except Exception as error:  # BadZipFile, struct.error, ValueError, OSError, …, by what is broken
            raise ValueError(f"{path}: not a readable .npz ({arrays.reason(error)}); get it again") from error
        stored = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        if len(stored) != len(entries):
            raise ValueError(f"{path}: holds one name twice; make it again")
        for entry in entries:  # a damaged name must not make the labels disappear
            files.check_entry(archive, entry, path)
        images = next((stored[k] for k in _IMAGES if k in stored), None)
        labels = next((stored[k] for k in _LABELS if k in stored), None)
        if images is None:
            raise ValueError(f"{path}: holds {', '.join(stored) or 'nothing'}; the images must be called {_IMAGES[0]}")
        labels = None if labels is None else _array(archive, labels, path)
        return arrays.from_arrays(f"npz:{path}", _array(archive, images, path), labels)


def stream(path: pathlib.Path, name: str, size: int = 256) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """Shape `[n, H, W, C]` of the uint8 array `name` of an .npz, and its images in order, `size` at a time.

    Read once, and never more than `size` images in memory. ValueError where it is none, is damaged, or is in Fortran's
    order.
    """
    with _member(path, name) as (header, _):
        shape, fortran, dtype = header
    if dtype != np.uint8 or len(shape) != 4 or fortran or not min(shape):
        order = " in Fortran's order" if fortran else ""
        raise ValueError(f"{path}: {name} is {dtype}{list(shape)}{order}, not images as uint8 [n, height, width, 3]")

    def images() -> Iterator[np.ndarray]:
        with _member(path, name) as (_, data):
            for start in range(0, shape[0], size):
                some = min(size, shape[0] - start)
                content = data.read(some * math.prod(shape[1:]))
                yield np.frombuffer(content, np.uint8).reshape(some, *shape[1:])

    return shape, images()


@contextlib.contextmanager
def _member(path: pathlib.Path, name: str) -> Iterator[tuple[tuple, zipfile.ZipExtFile]]:
    """The header (shape, Fortran's order, dtype) of an array of an .npz, and the stream that is at its first byte."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as data:
            yield _header(data), data
    except Exception as error:  # as below
        raise ValueError(f"{path}: {name} cannot be read ({arrays.reason(error)}); get it again") from error


def _header(data: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(data)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(data)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    return shape, fortran, dtype


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: pathlib.Path) -> np.ndarray:
    try:
        with archive.open(entry) as stream:
            shape, fortran, dtype = _header(stream)
            size, data = math.prod(shape) * dtype.itemsize, bytearray()
            if size != entry.file_size - stream.tell():
                raise ValueError(f"{dtype}{list(shape)} does not fit its {entry.file_size} bytes")
            arrays.check_room(size, entry.compress_size)
            # One read of `size` would allocate what the header claims, not what is there.
            while len(data) < size and (chunk := stream.read(min(1 << 24, size - len(data)))):
                data += chunk
            if len(data) != size or stream.read(1):
                raise ValueError(f"{dtype}{list(shape)} does not fit its {entry.file_size} bytes")
            return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # BadZipFile, zlib.error, EOFError, SyntaxError, TypeError, … on broken files
        raise ValueError(f"{path}: {entry.filename} cannot be read ({arrays.reason(error)}); make it again") from error
