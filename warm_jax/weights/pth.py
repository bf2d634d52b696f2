"""Tensors out of a PyTorch file, without PyTorch and without running the pickle in it (see `pickles`).

Tensors are read-only views of the file's bytes, so memory is bounded by its length. Two containers: since PyTorch 1.6 a
zip (`NAME/data.pkl`, storages in `NAME/data/KEY`); before, "legacy", a stream of five pickles (magic number, version,
system, object, storage keys) and then each storage as a count (int64) and its elements.
"""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from warm_jax.weights.pickles import ORDERED_DICT, Call, Global, Machine, empty_dict, shown, wrong

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_STORAGES = frozenset(f"torch {name}" for name in _DTYPES)
_MAX_ENTRIES = 100_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Storage:
    """A flat run of `numel` elements that tensors refer to; `data` once its bytes are found."""

    def __init__(self, dtype: np.dtype, key: str, numel: int):
        self.dtype, self.key, self.numel = dtype, key, numel
        self.data: np.ndarray | None = None


class Tensor:
    """A checked view (offset, shape, strides in elements) of a storage."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> Shaped[np.ndarray, "..."]:
        """The elements, not to be written to. ValueError where the file does not hold them."""
        flat, kept = self.storage.data, self.storage
        if flat is None or flat.dtype != kept.dtype or len(flat) < kept.numel:
            raise wrong(f"storage {shown(kept.key)} is missing or shorter than {kept.numel} elements")
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


def _naturals(value: object) -> bool:
    return type(value) is tuple and all(type(i) is int and i >= 0 for i in value)


def _storage(reference: object) -> Storage:
    """("storage", type, key, device, count[, view])."""
    if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
        raise wrong("a persistent reference that is no storage")
    _, kind, key, _, numel = reference[:5]
    if len(reference) == 6 and reference[5] is not None:
        raise wrong("a view of a storage")
    if type(kind) is not Global or kind[6:] not in _DTYPES or type(key) is not str or not _naturals((numel,)):
        raise wrong("a malformed storage")
    return Storage(_DTYPES[kind[6:]], key, numel)


def _tensor(arguments: tuple) -> Tensor:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata]): a view that stays within its storage."""
    if len(arguments) not in (6, 7):
        raise wrong("it calls '_rebuild_tensor_v2' with unexpected arguments")
    storage, offset, shape, strides = arguments[:4]
    if any(type(axes) is not tuple or len(axes) > 32 for axes in (shape, strides)):  # numpy's limit
        raise wrong("a tensor whose shape is no tuple of at most 32 numbers")
    if type(storage) is not Storage or not (_naturals((offset,)) and _naturals(shape) and _naturals(strides)):
        raise wrong("it calls '_rebuild_tensor_v2' with unexpected arguments")
    count, last = 1, offset
    for size, stride in zip(shape, strides, strict=False):
        count *= size
        last += (size - 1) * stride
    if len(shape) != len(strides) or count > storage.numel or (count and last >= storage.numel):
        raise wrong(f"a tensor of shape {shape[:8]} reaches beyond its storage of {storage.numel}")
    return Tensor(storage, offset, shape, strides)


def _parameter(arguments: tuple) -> Tensor:
    if len(arguments) != 3 or type(arguments[0]) is not Tensor:
        raise wrong("it calls '_rebuild_parameter' with unexpected arguments")
    return arguments[0]


CALLS: Mapping[str, Call] = {  # what pickled tensors call
    ORDERED_DICT: empty_dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}


def _machine() -> Machine:
    return Machine(CALLS, _STORAGES, _storage)


def _tensors(found: object) -> dict[str, Tensor]:
    """Name → tensor of a dict; one inside (`{"state_dict": …}`) gives names with a dot, other entries are left out."""
    flat: dict[str, Tensor] = {}
    left = _MAX_ENTRIES  # a dict that refers to one dict many times would multiply
    waiting = [("", found, 0)]
    while waiting:
        prefix, part, depth = waiting.pop()
        if type(part) is not dict or depth > 2:
            raise wrong("no dict of tensors, or dicts nested too deeply")
        left -= 1 + len(part)
        if left < 0:
            raise wrong(f"more than {_MAX_ENTRIES} tensors and other entries")
        flat |= {prefix + name: value for name, value in part.items() if type(value) is Tensor}
        waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in part.items() if type(value) is dict]
    return flat


def _used(tensors: Mapping[str, Tensor]) -> dict[str, list[Storage]]:
    """The storages that tensors refer to, by key: each reference is one of its own."""
    used: dict[str, list[Storage]] = {}
    for tensor in tensors.values():
        used.setdefault(tensor.storage.key, []).append(tensor.storage)
    return used


def _read_zip(data: bytes) -> dict[str, Tensor]:
    """The object's tensors; entries must be stored, not deflated, so they cannot outgrow the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            packed = [e.filename for e in entries.values() if e.compress_type != zipfile.ZIP_STORED]
            pickles = [name for name in entries if name.endswith("data.pkl")]
            if packed or len(pickles) != 1:
                raise wrong(f"a zip with {len(pickles)} data.pkl and {len(packed)} compressed entries")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise wrong("it is big-endian")
            if sum(e.file_size for e in entries.values()) > len(data):
                raise wrong("its entries are larger than the file")
            tensors = _tensors(_machine().run(io.BytesIO(archive.read(pickles[0]))))
            for key, storages in _used(tensors).items():
                block = archive.read(f"{root}data/{key}") if f"{root}data/{key}" in entries else b""
                for storage in storages:
                    storage.data = np.frombuffer(block, storage.dtype, len(block) // storage.dtype.itemsize)
            return tensors
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise wrong(f"a damaged zip ({error})") from None


def _read_legacy_head(stream: io.BytesIO) -> tuple[object, list[str]]:
    """The object of a legacy stream and its storage keys; the stream is left at the first storage."""
    if [_machine().run(stream), _machine().run(stream)] != [_MAGIC, _PROTOCOL]:
        raise wrong("neither a zip nor PyTorch's legacy format")
    system, found, keys = (_machine().run(stream) for _ in range(3))
    if type(system) is not dict or system.get("little_endian") is not True:
        raise wrong("it is big-endian")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise wrong("its storage keys do not match its tensors")
    return found, keys


def _fill(data: bytes, stream: io.BytesIO, keys: list[str], used: dict[str, list[Storage]]) -> None:
    """Storages in the order of their keys, each with its count; views of `data`."""
    if not set(used) <= set(keys):
        raise wrong("its storage keys do not match its tensors")
    for key in keys:
        numel = int.from_bytes(stream.read(8), "little")
        if key not in used or any(numel != storage.numel for storage in used[key]):
            raise wrong(f"storage {shown(key)} holds {numel} elements, not what its tensors say")
        start, size = stream.tell(), numel * used[key][0].dtype.itemsize
        if start + size > len(data):
            raise wrong(f"cut short: storage {shown(key)} needs {size} bytes, {len(data) - start} are left")
        for storage in used[key]:
            storage.data = np.frombuffer(data, used[key][0].dtype, numel, start)
        stream.seek(start + size)


def read_storage(data: bytes) -> Storage:
    """What `torch.storage._load_from_bytes` stands for: the one storage of a legacy stream, a view of `data`."""
    stream = io.BytesIO(data)
    found, keys = _read_legacy_head(stream)
    if type(found) is not Storage:
        raise wrong("a pickled storage that holds something else")
    _fill(data, stream, keys, {found.key: [found]})
    return found


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Name → read-only array of a `.pth` that holds a dict of tensors; ValueError, naming the cause, for others."""
    data = Path(path).read_bytes()
    try:
        if data[:4] == b"PK\x03\x04":
            tensors = _read_zip(data)
        else:
            stream = io.BytesIO(data)
            found, keys = _read_legacy_head(stream)
            tensors = _tensors(found)
            _fill(data, stream, keys, _used(tensors))
        return {name: tensor.array() for name, tensor in tensors.items()}
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
