"""Trials: files that somebody made to run code, to take all memory or time, or to be written elsewhere."""

import io
import os
import pathlib
import pickle
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torture_kills import Bench
from torture_processes import TrialError, Verdict
from torture_products import refused
from torture_scene import COMMANDS, newest

_MOST_SECONDS, _MOST_MEBIBYTES = 60.0, 4096  # that a hostile file may take until it is refused; of a busy machine
_DEEP = b"[" * 300_000
_ESCAPES = "\x1b[2J\x1b]0;x\x07\n.png"
_MARK = "ran"  # a file that hostile code would make


class Trap(NamedTuple):
    """What was laid out: the command that meets it, the names of which an error must have one, whether 0 is right."""

    arguments: list[str]
    names: tuple[str, ...]
    may_pass: bool = False


class _Runs:
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {_MARK}",)


def _written(folder: pathlib.Path, name: str, content: bytes) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name


def _zip(folder: pathlib.Path, entries: dict[str, bytes]) -> str:
    with zipfile.ZipFile(folder / "evil.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return "evil.zip"


def _prepare(source: str) -> list[str]:
    return ["--mode=prepare", f"--images={source}", "--out=made.zip"]


def _png(width: int, height: int) -> bytes:
    """A grey PNG whose rows are left to the reader to imagine: so many zeros, packed."""
    pack, chunks = zlib.compressobj(9), []
    row = bytes(1 + (width + 7) // 8)
    for _ in range(height):
        chunks.append(pack.compress(row))
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", b"".join([*chunks, pack.flush()])), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def _npz(folder: pathlib.Path, name: str, arrays: dict[str, bytes]) -> str:
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, content in arrays.items():
            archive.writestr(f"{key}.npy", content)
    return name


def _npy(shape: tuple[int, ...], kind: str, data: bytes = b"") -> bytes:
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _doubled() -> bytes:
    """A list that holds twice a list that holds twice …, forty deep: of a kilobyte, with 2⁴⁰ elements."""
    value: list = ["x"]
    for _ in range(40):
        value = [value, value]
    return pickle.dumps({"ema": value, "img_resolution": value})


def _objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([_Runs()], object), allow_pickle=True)
    return stream.getvalue()


def _with_labels(folder: pathlib.Path, content: bytes) -> Trap:
    _written(folder, "photos/dataset.json", content)
    return Trap(_prepare("folder:photos"), ("dataset.json",))


def _in_place(path: str, content: bytes, reader: str, may_pass: bool = False) -> Callable[[pathlib.Path], Trap]:
    """What stands in the place of a file of a workdir; NEWEST is the folder of its last checkpoint."""

    def lay(folder: pathlib.Path) -> Trap:
        name = path.replace("NEWEST", str(newest(folder).relative_to(folder)))
        _written(folder, name, content)
        names = (pathlib.Path(name).name, str(pathlib.Path(name).parent), "run/checkpoints")
        return Trap(COMMANDS[reader].arguments, names, may_pass)

    return lay


def _looped(folder: pathlib.Path) -> Trap:
    (folder / "photos" / "again").symlink_to(folder / "photos")
    (folder / "photos" / "self.png").symlink_to("self.png")
    return Trap(_prepare("folder:photos"), ("self.png", "again"), may_pass=True)


def _image(folder: pathlib.Path) -> bytes:
    return (folder / "photos" / "000.png").read_bytes()


TRAPS: dict[str, Callable[[pathlib.Path], Trap]] = {
    "pickle that runs": lambda f: Trap(
        ["--mode=convert", f"--from_edm={_written(f, 'evil.pkl', pickle.dumps({'ema': _Runs()}))}", "--workdir=edm"],
        ("evil.pkl",),
    ),
    "pickle that doubles": lambda f: Trap(
        ["--mode=convert", f"--from_edm={_written(f, 'evil.pkl', _doubled())}", "--workdir=edm"], ("evil.pkl",)
    ),
    "torch file that runs": lambda f: Trap(
        [
            "--mode=convert",
            f"--from_inception={_written(f, 'evil.pth', pickle.dumps(_Runs()))}",
            "--out=inception.safetensors",
        ],
        ("evil.pth",),
    ),
    "npz of objects": lambda f: Trap(_prepare(f"npz:{_npz(f, 'evil.npz', {'images': _objects()})}"), ("evil.npz",)),
    "npz that says terabytes": lambda f: Trap(
        _prepare(f"npz:{_npz(f, 'evil.npz', {'images': _npy((2**20, 512, 512, 3), '|u1')})}"), ("evil.npz",)
    ),
    "npz bomb": lambda f: Trap(
        _prepare(f"npz:{_npz(f, 'evil.npz', {'images': _npy((20, 4000, 4000, 3), '|u1', bytes(960_000_000))})}"),
        ("evil.npz",),
        may_pass=True,  # twenty black images are a data set
    ),
    "statistics of objects": lambda f: Trap(
        COMMANDS["evaluate against"].arguments, (_npz(f, "stats.npz", {"mean": _objects()}),)
    ),
    "zip with paths": lambda f: Trap(
        _prepare(
            "zip:"
            + _zip(f, {"../outside.png": _image(f), "/tmp/outside.png": _image(f), "a/../../outside.png": _image(f)})
        ),
        ("evil.zip",),
        may_pass=True,
    ),
    "zip bomb": lambda f: Trap(_prepare(f"zip:{_zip(f, {'x.png': bytes(1_000_000_000)})}"), ("evil.zip", "x.png")),
    "zip with escapes": lambda f: Trap(_prepare(f"zip:{_zip(f, {_ESCAPES: b'no image'})}"), ("evil.zip",)),
    "image bomb": lambda f: Trap(
        _prepare(f"folder:{_written(f, 'evil/x.png', _png(60_000, 60_000)).partition('/')[0]}"), ("x.png",)
    ),
    "links in a circle": _looped,
    "labels that are deep": lambda f: _with_labels(f, b'{"labels": ' + _DEEP),
    "labels without end": lambda f: _with_labels(f, b'{"labels": [["000.png", ' + b"9" * 100_000 + b"]]}"),
    "config.json that is deep": _in_place("run/config.json", b'{"seed": ' + _DEEP, "train on"),
    "data.json that is deep": _in_place("run/data.json", _DEEP, "train on"),
    "samples.json that is deep": _in_place("run/samples/samples.json", _DEEP, "sample", may_pass=True),
    "metrics.jsonl that is deep": _in_place("run/metrics.jsonl", _DEEP + b"\n", "train on", may_pass=True),
    "measured.npz of objects": _in_place("run/measured.npz", _objects(), "sample"),
    "checkpoint's metadata, deep": _in_place("NEWEST/ema/_METADATA", _DEEP, "sample", may_pass=True),
    "checkpoint's digests, deep": _in_place("NEWEST/digests/metadata", _DEEP, "sample", may_pass=True),
    "safetensors of 2⁶² bytes": _in_place("export/weights.safetensors", struct.pack("<Q", 2**62) + b"{}", "convert"),
    "export's model.json, deep": _in_place("export/model.json", _DEEP, "convert"),
}


def hostile(bench: Bench, rng: random.Random, folder: pathlib.Path, name: str) -> Verdict:
    """Refused by name, in time and in bounded memory; nothing is run, and nothing is written elsewhere."""
    del rng
    bench.scene.begin(folder, "prepare", "train", "export")
    (folder / "run" / "samples").mkdir()
    trap = TRAPS[name](folder)
    before = {path.name for path in folder.parent.iterdir()}
    outside = [folder.parent / "outside.png", folder.parent.parent / "outside.png", pathlib.Path("/tmp/outside.png")]
    there, began = [path.exists() for path in outside], time.monotonic()
    process = bench.runner.start(folder, trap.arguments)
    process.end(max(_MOST_SECONDS, 4 * bench.patience), "a hostile file")
    seconds = time.monotonic() - began
    what = f"{seconds:.0f} s, {process.mebibytes} MiB"
    if (folder / _MARK).exists():
        raise TrialError("silent", "it ran the code")
    if [path.exists() for path in outside] != there or "outside.png" in {
        p.name for p in folder.parent.iterdir()
    } - before:
        raise TrialError("silent", "it wrote outside of its folder")
    if process.mebibytes > _MOST_MEBIBYTES:
        raise TrialError("failed", f"{what}: too much memory")
    if "\x1b[2J" in process.said() + process.said("out"):
        raise TrialError("failed", "the escapes of a name came through")
    verdict = refused(process, trap.names)
    if verdict is None:
        return Verdict("survived" if trap.may_pass else "silent", what)
    return Verdict(verdict.what, f"{what}: {verdict.why}")
