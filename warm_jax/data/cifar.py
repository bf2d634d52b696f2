"""CIFAR-10's binary version: the archive as it is downloaded, or the folder it unpacks to.

The Python version is pickles, which are never read.

    https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz      md5 c32a1d4ab5d03f1284b67883e8d87530 (its site's)

Each record is a class byte and 32×32 bytes of red, then green, then blue; a file holds 10,000.
"""

import pathlib
import tarfile

import numpy as np

from warm_jax.data import arrays

_RECORD = 1 + 3 * 32 * 32
_SPLITS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_MAX_BYTES = 1 << 26


def open_cifar10(path: pathlib.Path, split: str) -> arrays.Arrays:
    """The 50,000 training images or the 10,000 test images, in the archive's order."""
    contents = _folder(path, _SPLITS[split]) if path.is_dir() else _archive(path, _SPLITS[split])
    for name, content in zip(_SPLITS[split], contents, strict=True):
        if not content or len(content) % _RECORD:
            raise ValueError(f"{path}: {name} has {len(content)} bytes, not a multiple of {_RECORD}; get it again")
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, _RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if (highest := records[:, 0].max()) > 9:
        raise ValueError(f"{path}: has a class {highest}; CIFAR-10's end at 9 (CIFAR-100 is not read)")
    return arrays.from_arrays(f"cifar10:{path}@{split}", images, records[:, 0])


def _folder(path: pathlib.Path, names: list[str]) -> list[bytes]:
    return [(path / name).read_bytes() for name in names]


def _archive(path: pathlib.Path, names: list[str]) -> list[bytes]:
    found = {}
    with path.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:*") as archive:
                for member in archive:  # in memory: nothing is extracted
                    name = member.name.rsplit("/", 1)[-1]
                    if name in names and member.isfile() and member.size <= _MAX_BYTES:
                        found[name] = archive.extractfile(member).read()
        except Exception as error:  # TarError, EOFError, zlib.error, BadGzipFile, …
            reason = arrays.reason(error)
            raise ValueError(f"{path}: not a readable tar archive ({reason}); get it again") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path}: has no {missing[0]}; it must be cifar-10-binary.tar.gz, not the Python version")
    return [found[name] for name in names]
