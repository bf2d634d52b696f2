"""Tensors out of a PyTorch file, without PyTorch and without running the pickle in it.

A `.pth` of tensors is a pickle that calls a handful of functions, next to raw storages. Unpickling calls whatever the
file names, so here nothing is unpickled: `pickletools` splits the stream into opcodes, and `_Machine` knows what the
few that such a file needs would build. Globals stay strings, no callable of a file is ever looked up, and a global or
an opcode outside the list below is refused by name. Tensors are read-only views of the file's bytes, so memory is
bounded by its length.

Two containers: since PyTorch 1.6 a zip (`NAME/data.pkl`, storages in `NAME/data/KEY`); before, "legacy", a stream of
five pickles (magic number, version, system, object, storage keys) and then each storage as a count (int64) and its
elements.
"""

import io
import os
import pickletools
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

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
_ORDERED_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_GLOBALS = {_ORDERED_DICT, _TENSOR, _PARAMETER, *(f"torch {name}" for name in _DTYPES)}
_MAX_TENSORS = 100_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Global(str):
    """The name of something that a pickle may refer to; never the thing."""


class _Storage:
    """A storage that a tensor refers to, before its bytes are found."""

    def __init__(self, dtype: np.dtype, key: str, numel: int):
        self.dtype, self.key, self.numel = dtype, key, numel


class _Tensor:
    """A checked view (offset, shape, strides in elements) of a storage."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


_MARK = object()
_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _wrong(text: str) -> ValueError:
    return ValueError(f"not a file of tensors: {text}")


def _naturals(value: object) -> bool:
    return type(value) is tuple and all(type(i) is int and i >= 0 for i in value)


class _Machine:
    """Reads one pickle into dicts, lists, tuples, numbers, strings and `_Tensor`s."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def run(self, stream: io.BytesIO) -> object:
        """What the pickle at the stream's position builds; the stream is left behind its STOP."""
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (IndexError, KeyError, AttributeError, TypeError) as error:
            raise _wrong(f"a malformed pickle ({error!r})") from None
        raise _wrong("the pickle has no end")

    def step(self, name: str, argument: object) -> None:
        """One opcode."""
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANT:
            stack.append(_CONSTANT[name])
        elif name == "GLOBAL":
            stack.append(self.known(argument))
        elif name == "INST":
            raise _wrong(f"it builds an instance of {argument.replace(' ', '.', 1)!r}, which is refused")
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self.known(f"{module} {attribute}"))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in _TUPLES:
            values = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(tuple(values))
        elif name == "APPEND":
            value = stack.pop()
            self.top(list).append(value)
        elif name == "APPENDS":
            values = self.marked()
            self.top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self.marked() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            self.set_items(values)
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.build(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of an OrderedDict (`_metadata` of a state_dict): dropped
            self.top(dict)
        elif name not in ("PROTO", "FRAME"):
            raise _wrong(f"opcode {name} is refused")

    def known(self, name: str) -> _Global:
        """The global's name, if it is one that tensors need."""
        if name not in _GLOBALS:
            raise _wrong(f"it asks for the global {name.replace(' ', '.', 1)!r}, which is refused")
        return _Global(name)

    def marked(self) -> list:
        """Pops what lies above the last mark."""
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise _wrong("a malformed pickle (no mark)")
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values

    def top(self, kind: type) -> object:
        """The object on top, which must be of a kind."""
        if type(self.stack[-1]) is not kind:
            raise _wrong(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def set_items(self, values: list) -> None:
        """Keys are strings: hashing a deep tuple could take for ever."""
        if len(values) % 2 or not all(type(key) is str for key in values[::2]):
            raise _wrong("a dict whose keys are not strings")
        self.top(dict).update(zip(values[::2], values[1::2], strict=True))

    def storage(self, reference: object) -> _Storage:
        """("storage", type, key, device, count[, view])."""
        if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
            raise _wrong("a persistent reference that is no storage")
        _, kind, key, _, numel = reference[:5]
        if len(reference) == 6 and reference[5] is not None:
            raise _wrong("a view of a storage")
        if type(kind) is not _Global or kind[6:] not in _DTYPES or type(key) is not str or not _naturals((numel,)):
            raise _wrong("a malformed storage")
        return _Storage(_DTYPES[kind[6:]], key, numel)

    def build(self, function: object, arguments: object) -> object:
        """What the three callables of such a file would return."""
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _wrong("it calls something that is not a global")
        if function == _ORDERED_DICT and arguments == ():
            return {}
        if function == _PARAMETER and len(arguments) == 3 and type(arguments[0]) is _Tensor:
            return arguments[0]
        if function == _TENSOR and len(arguments) in (6, 7):
            storage, offset, shape, strides = arguments[:4]
            if type(storage) is _Storage and _naturals((offset,)) and _naturals(shape) and _naturals(strides):
                return self.tensor(storage, offset, shape, strides)
        raise _wrong(f"it calls {function!r} with unexpected arguments")

    def tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> _Tensor:
        """A view that stays within its storage and is not larger than it."""
        count, last = 1, offset
        for size, stride in zip(shape, strides, strict=False):
            count *= size
            last += (size - 1) * stride
        if len(shape) != len(strides) or len(shape) > 32 or count > storage.numel or (count and last >= storage.numel):
            raise _wrong(f"a tensor of shape {shape[:8]} reaches beyond its storage of {storage.numel}")
        return _Tensor(storage, offset, shape, strides)


def _view(tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    flat = storages.get(tensor.storage.key)
    if flat is None or flat.dtype != tensor.storage.dtype or len(flat) < tensor.storage.numel:
        raise _wrong(f"storage {tensor.storage.key!r} is missing or shorter than {tensor.storage.numel} elements")
    strides = tuple(stride * flat.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)


def _tensors(found: object, prefix: str = "", depth: int = 0) -> dict[str, _Tensor]:
    """Name → tensor of a dict; one inside (`{"state_dict": …}`) gives names with a dot, other entries are left out."""
    if type(found) is not dict or depth > 2:
        raise _wrong("no dict of tensors, or dicts nested too deeply")
    flat: dict[str, _Tensor] = {}
    for name, value in found.items():
        if type(value) is dict:
            flat |= _tensors(value, f"{prefix}{name}.", depth + 1)
        elif type(value) is _Tensor:
            flat[prefix + name] = value
        if len(flat) > _MAX_TENSORS:  # a dict that refers to one dict many times would multiply
            raise _wrong(f"more than {_MAX_TENSORS} tensors")
    return flat


def _read_zip(data: bytes) -> tuple[object, dict[str, bytes]]:
    """The object and its storages' bytes; entries must be stored, not deflated, so they cannot outgrow the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            packed = [e.filename for e in entries.values() if e.compress_type != zipfile.ZIP_STORED]
            pickles = [name for name in entries if name.endswith("data.pkl")]
            if packed or len(pickles) != 1:
                raise _wrong(f"a zip with {len(pickles)} data.pkl and {len(packed)} compressed entries")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise _wrong("it is big-endian")
            if sum(e.file_size for e in entries.values()) > len(data):
                raise _wrong("its entries are larger than the file")
            found = _Machine().run(io.BytesIO(archive.read(pickles[0])))
            folder = f"{root}data/"
            return found, {n.removeprefix(folder): archive.read(n) for n in entries if n.startswith(folder)}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise _wrong(f"a damaged zip ({error})") from None


def _read_legacy(data: bytes, used: dict[str, _Storage], stream: io.BytesIO, keys: object) -> dict[str, bytes]:
    """Storages in the order of their keys, each with its count."""
    if type(keys) is not list or not all(type(key) is str for key in keys) or not set(used) <= set(keys):
        raise _wrong("its storage keys do not match its tensors")
    storages = {}
    for key in keys:
        numel = int.from_bytes(stream.read(8), "little")
        if key not in used or numel != used[key].numel:
            raise _wrong(f"storage {key!r} holds {numel} elements, not what its tensors say")
        start = stream.tell()
        size = numel * used[key].dtype.itemsize
        if start + size > len(data):
            raise _wrong(f"cut short: storage {key!r} needs {size} bytes, {len(data) - start} are left")
        storages[key] = data[start : start + size]
        stream.seek(start + size)
    return storages


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Name → read-only array of a `.pth` that holds a dict of tensors; ValueError, naming the cause, for others."""
    data = Path(path).read_bytes()
    try:
        if data[:4] == b"PK\x03\x04":
            found, raw = _read_zip(data)
            tensors = _tensors(found)
            used = {t.storage.key: t.storage for t in tensors.values()}
        else:
            stream = io.BytesIO(data)
            if [_Machine().run(stream), _Machine().run(stream)] != [_MAGIC, _PROTOCOL]:
                raise _wrong("neither a zip nor PyTorch's legacy format")
            system, found, keys = (_Machine().run(stream) for _ in range(3))
            if type(system) is not dict or system.get("little_endian") is not True:
                raise _wrong("it is big-endian")
            tensors = _tensors(found)
            used = {t.storage.key: t.storage for t in tensors.values()}
            raw = _read_legacy(data, used, stream, keys)
        arrays = {}
        for key, storage in used.items():
            block = raw.get(key, b"")
            arrays[key] = np.frombuffer(block, storage.dtype, count=len(block) // storage.dtype.itemsize)
        return {name: _view(tensor, arrays) for name, tensor in tensors.items()}
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
