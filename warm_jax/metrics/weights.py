"""Weights files: sha256, safetensors in and out.

safetensors is eight bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}} with an
optional `__metadata__` of strings, and the bytes of the tensors. Written here in numpy because that is all there is to
it; the package of that name reads these files and writes ones that are read here. PyTorch's files: `pth`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own bound


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_file(path: str | os.PathLike, expected: str, instructions: str) -> str:
    """The sha256 of `path`, beginning with `expected`; FileNotFoundError or ValueError that end with `instructions`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}. {instructions}")
    digest = sha256(path)
    if not digest.startswith(expected):
        wrong = f"{path} has sha256 {digest}, expected {expected}…: truncated, or another file"
        raise ValueError(f"{wrong}. {instructions}")
    return digest


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Shaped[np.ndarray, "..."]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named arrays, and strings about them, in the order of their names: equal content gives equal bytes."""
    arrays = {name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape) for name in sorted(tensors)}
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise ValueError(f"safetensors has no dtype for {name}: {array.dtype}")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.tobytes())
    part.replace(path)


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays (read-only views of one buffer) and metadata; ValueError for what does not fit the file's length."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER):
        raise ValueError(f"{path} is no safetensors file, or is cut short: {len(data)} bytes, a header of {length}")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        entries = {n: (e["dtype"], e["shape"], e["data_offsets"]) for n, e in header.items()}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} has an unreadable safetensors header: {error!r}") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has an unreadable safetensors header: its metadata are no strings")
    body, arrays = memoryview(data)[8 + length :], {}
    for name, (dtype, shape, offsets) in entries.items():
        whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not whole or not all(type(i) is int and i >= 0 for i in [*shape, *offsets]) or dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is described as {dtype!r}, {shape!r}, {offsets!r}")
        size = _DTYPES[dtype].itemsize
        for n in shape:
            size *= n
        start, end = offsets
        if end > len(body) or end - start != size:
            raise ValueError(f"{path}: {name} {shape} needs {size} bytes, offsets {offsets} of {len(body)}: cut short?")
        arrays[name] = np.frombuffer(body[start:end], _DTYPES[dtype]).reshape(shape)
    return arrays, metadata
