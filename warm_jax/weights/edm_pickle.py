"""NVIDIA's EDM network pickles, read without running or importing anything of them (see `pickles`).

A file is a pickled dict with a network under "ema": objects that carry their own source code (ignored here), each with
its state: `_parameters`, `_buffers`, `_modules` and settings as plain attributes. Tensors carry their storage as a
legacy `torch.save` stream of their own.
"""

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from warm_jax.weights import pth
from warm_jax.weights.pickles import Call, Machine, Record, looks_like, wrong

_MAX_DEPTH, _MAX_MODULES = 8, 10_000  # a module that contains itself, or one many times, would multiply
_MAX_ENTRIES = 1_000_000  # of all modules; EDM's largest have some 60,000
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
_MODULE_DICT = "torch.nn.modules.container ModuleDict"


@dataclasses.dataclass(frozen=True)
class Module:
    """A part of a network as its file has it.

    Attributes:
      kind: The name of its class.
      settings: Its plain attributes: numbers, strings, None, lists and dicts, of whatever is in them.
      parameters: Its own tensors, trained.
      buffers: Its own tensors, fixed.
      children: The parts that it is made of.
    """

    kind: str
    settings: dict[str, object]
    parameters: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    children: dict[str, "Module"]

    def walk(self, name: str = "") -> Iterator[tuple[str, "Module"]]:
        """Every part, by its dotted name; itself first, as `name`."""
        yield name, self
        for child, module in self.children.items():
            yield from module.walk(f"{name}.{child}" if name else child)


def _object(arguments: tuple) -> Record:
    """An object that carries its source code: the class's name and the state."""
    meta = arguments[0] if len(arguments) == 1 else None
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise wrong("an object that is not of a class")
    return Record(meta["class_name"], (), meta.get("state"))


def _storages() -> Call:
    """Of bytes their storage; of the same bytes the same, or a file that names them often would be read as often."""
    known: dict[int, tuple[bytes, pth.Storage]] = {}  # by id; the bytes are kept, so that no other get that id

    def storage(arguments: tuple) -> pth.Storage:
        if len(arguments) != 1 or type(arguments[0]) is not bytes:
            raise wrong("a storage that is not of bytes")
        if id(arguments[0]) not in known:
            known[id(arguments[0])] = (arguments[0], pth.read_storage(arguments[0]))
        return known[id(arguments[0])][1]

    return storage


def _scalar(arguments: tuple) -> float | int | bool:
    """A number of numpy's: (dtype, bytes)."""
    if len(arguments) == 2 and type(arguments[0]) is Record and type(arguments[1]) is bytes:
        code, raw = (arguments[0].arguments or ("",))[0], arguments[1]
        if type(code) is str and re.fullmatch(r"b1|f[248]|[iu][1248]", code) and len(raw) == int(code[1]):
            return np.frombuffer(raw, f"<{code}")[0].item()
    raise wrong("a malformed number of numpy's")


_CALLS: Mapping[str, Call] = {
    **pth.CALLS,
    "torch_utils.persistence _reconstruct_persistent_obj": _object,
    _MODULE_DICT: lambda arguments: Record("ModuleDict", arguments),
    "numpy dtype": lambda arguments: Record("dtype", arguments),
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
}


def _module(record: object, depth: int, left: list[int]) -> Module:
    """The record and what it is made of; `left` is how many more there may be, and how many more entries of them."""
    left[0] -= 1
    if type(record) is not Record or type(record.state) is not dict:
        raise wrong("a part of a network that has no state")
    if depth > _MAX_DEPTH or left[0] < 0:
        raise wrong(f"a network nested deeper than {_MAX_DEPTH}, or of more than {_MAX_MODULES} parts")
    state, parts = record.state, {}
    for name in ("_parameters", "_buffers", "_modules"):
        part = state.get(name)
        if type(part) is not dict:
            raise wrong(f"a {record.name[:100]} without {name}")
        left[1] -= len(part) + len(state)
        if left[1] < 0:
            raise wrong(f"a network of more than {_MAX_ENTRIES:,} entries")
        parts[name] = {key: value for key, value in part.items() if value is not None}
    tensors = [*parts["_parameters"].values(), *parts["_buffers"].values()]
    if not all(type(tensor) is pth.Tensor for tensor in tensors):
        raise wrong(f"a {record.name[:100]} whose parameters are not tensors")
    return Module(
        record.name,
        {key: value for key, value in state.items() if type(value) in _PLAIN},
        {key: tensor.array() for key, tensor in parts["_parameters"].items()},
        {key: tensor.array() for key, tensor in parts["_buffers"].items()},
        {key: _module(child, depth + 1, left) for key, child in parts["_modules"].items()},
    )


def read_network(path: str | os.PathLike) -> Module:
    """The network under "ema" with its preconditioning around it; ValueError, naming the cause, for other files."""
    data = Path(path).read_bytes()
    if kind := looks_like(data):
        raise ValueError(
            f"{path}: is {kind}. --from_edm takes a pickled network, as EDM's published edm-*.pkl and the "
            "network-snapshot-*.pkl that its training writes beside training-state-*.pt"
        )
    try:
        found = Machine({**_CALLS, "torch.storage _load_from_bytes": _storages()}).run(io.BytesIO(data))
        if type(found) is not dict or type(found.get("ema")) is not Record:
            raise wrong('no dict with a network under "ema"')
        return _module(found["ema"], 0, [_MAX_MODULES, _MAX_ENTRIES])
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
