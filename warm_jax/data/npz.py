"""numpy archives: `images` uint8 `[n, H, W]` or `[n, H, W, C]`, and `labels` `[n]`. Pickles are never read.

What an array takes is known from its header, and refused before anything is unpacked where it is too much: see
`arrays.check_room`. The CRC-32 of what is read is checked, and so are the names of what is not.
"""

import math
import pathlib
import zipfile

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


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: pathlib.Path) -> np.ndarray:
    try:
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(stream)
            if dtype.hasobject:
                raise ValueError("it holds Python objects, which are never unpickled")
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
