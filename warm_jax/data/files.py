"""Encoded images in a folder or in a zip, in EDM's layout: any nesting, and `dataset.json` with the classes, if any.

    {"labels": [["00000/img00000000.png", 6], …]}      or "labels": null

Images are numbered in the order of their names. Hidden files and macOS's `__MACOSX` and `._…` are not images; files of
other kinds are ignored. A zip is never extracted, and one that holds a name outside itself is refused.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import stat
import zipfile

import numpy as np

from warm_jax.data import arrays, decoding

_LABELS = "dataset.json"
_HASHED_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Named files in a folder, or in a zip (`stamp` is its state when it was opened, None for a folder)."""

    spec: str
    path: pathlib.Path
    stamp: tuple[int, int] | None
    names: list[str]
    labels: np.ndarray
    num_classes: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Its path in the folder or zip."""
        return self.names[index]

    def get(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its class; ValueError where the zip is broken there."""
        name = self.names[index]
        if self.stamp is None:
            if (size := (self.path / name).stat().st_size) > decoding.MAX_BYTES:
                raise ValueError(f"{self.path / name}: has {size} bytes, the limit is {decoding.MAX_BYTES}; replace it")
            return (self.path / name).read_bytes(), int(self.labels[index])
        return _read(_archive(self.path, self.stamp, os.getpid()), name, self.path), int(self.labels[index])


def open_folder(path: pathlib.Path) -> Files:
    """The images below a folder. Its fingerprint is of the content up to 256 MiB in all, of names and sizes beyond."""
    sizes = {}
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            file = pathlib.Path(folder, name)
            if _is_image(name := file.relative_to(path).as_posix()):
                found = file.stat()
                if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
                    raise ValueError(f"{file}: not a file; remove it")
                sizes[name] = found.st_size
    names, whole = sorted(sizes), sum(sizes.values()) <= _HASHED_BYTES
    digest = hashlib.sha256()
    for name in names:
        content = hashlib.sha256((path / name).read_bytes()).hexdigest() if whole else ""
        digest.update(f"{name} {sizes[name]} {content}\n".encode(errors="surrogateescape"))
    text = (path / _LABELS).read_bytes() if (path / _LABELS).is_file() else None
    digest.update(text or b"")
    labels, num_classes = _labels(text, names, str(path))
    return Files(f"folder:{path}", path, None, names, labels, num_classes, digest.hexdigest())


def open_zip(path: pathlib.Path) -> Files:
    """The images in a zip. Its fingerprint is of the directory, which holds each file's name, size and CRC-32."""
    stamp = _stamp(path)
    archive = _archive(path, stamp, os.getpid())
    digest, names, text = hashlib.sha256(), [], None
    for entry in sorted(archive.infolist(), key=lambda e: e.filename):
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise ValueError(f"{path}: holds {entry.filename!r}, a path outside the zip; do not trust this file")
        if entry.filename == _LABELS:
            text = _read(archive, _LABELS, path)
        elif not entry.is_dir() and _is_image(entry.filename):
            names.append(entry.filename)
        else:
            continue
        digest.update(f"{entry.filename} {entry.file_size} {entry.CRC:08x}\n".encode())
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: holds one name twice; make the zip again")
    labels, num_classes = _labels(text, names, str(path))
    return Files(f"zip:{path}", path, stamp, names, labels, num_classes, digest.hexdigest())


def _raise(error: OSError) -> None:
    raise error


def _is_image(name: str) -> bool:
    parts = name.split("/")
    return name.lower().endswith(decoding.EXTENSIONS) and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=16)
def _archive(path: pathlib.Path, stamp: tuple[int, int], process: int) -> zipfile.ZipFile:
    """An open zip, one handle a process (zipfile serialises reads); `stamp` and `process` are keys of the cache."""
    stream = path.open("rb")
    try:
        return zipfile.ZipFile(stream)
    except Exception as error:  # BadZipFile, struct.error, ValueError, OSError, …, by what is broken
        stream.close()
        raise ValueError(f"{path}: not a readable zip ({arrays.reason(error)}); get it again") from error


def _read(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> bytes:
    entry = archive.getinfo(name)
    if entry.file_size > decoding.MAX_BYTES:
        raise ValueError(
            f"{path}: {name} unpacks to {entry.file_size} bytes, the limit is {decoding.MAX_BYTES}; replace it"
        )
    try:
        return archive.read(entry)  # never more than file_size bytes; checks the CRC
    except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError (encrypted), NotImplementedError, …
        raise ValueError(f"{path}: {name} cannot be read ({arrays.reason(error)}); replace it") from error


def _labels(text: bytes | None, names: list[str], path: str) -> tuple[np.ndarray, int]:
    if not names:
        raise ValueError(f"{path}: no images ({', '.join(decoding.EXTENSIONS)}); the path may name the wrong place")
    if text is None:
        return arrays.check_labels(path, None, len(names))
    try:
        pairs = json.loads(text)["labels"]
        labels = None if pairs is None else dict(pairs)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: {_LABELS} is not {{'labels': [[name, class], …]}} ({arrays.reason(error)})"
        ) from error
    if labels is None:
        return arrays.check_labels(path, None, len(names))
    if odd := [n for n, label in labels.items() if type(label) is not int]:
        raise ValueError(f"{path}: {_LABELS} gives {odd[0]!r} the class {labels[odd[0]]!r}; it must be an integer")
    if missing := [n for n in names if n not in labels]:
        raise ValueError(
            f"{path}: {_LABELS} has no class for {len(missing)} of {len(names)} images, {missing[0]} the first"
        )
    if extra := labels.keys() - set(names):
        raise ValueError(f"{path}: {_LABELS} names {len(extra)} images that are not there, {min(extra)} the first")
    try:
        values = np.array([labels[n] for n in names], np.int64)
    except OverflowError as error:
        raise ValueError(f"{path}: {_LABELS} has a class beyond 64 bits") from error
    return arrays.check_labels(path, values, len(names))
