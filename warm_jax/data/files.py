"""Encoded images in a folder or in a zip, in EDM's layout: any nesting, and `dataset.json` with the classes, if any.

`folders` says which files are images, `labels` how `dataset.json` is read, wherever it lies. Images are numbered in the
order of their names; files of other kinds are ignored. A zip is never extracted, and one that holds a name outside
itself is refused. So is one whose directory and content disagree, whose CRC-32 do not fit, or that holds a name twice.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from warm_jax.data import arrays, decoding, folders, labels

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
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of files that are known to be unreadable

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Its path in the folder or zip."""
        return folders.printable(self.names[index])

    def get(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its class; ValueError where the zip is broken there."""
        name = self.names[index]
        if name in self.problems:
            raise ValueError(f"{folders.printable(str(self.path / name))}: {self.problems[name]}")
        if self.stamp is None:
            if (size := (self.path / name).stat().st_size) > decoding.MAX_BYTES:
                raise ValueError(f"{self.path / name}: has {size} bytes, the limit is {decoding.MAX_BYTES}; replace it")
            return (self.path / name).read_bytes(), int(self.labels[index])
        return _read(_archive(self.path, self.stamp, os.getpid()), name, self.path), int(self.labels[index])


def open_folder(path: pathlib.Path) -> Files:
    """The images below a folder. Its fingerprint is of the content up to 256 MiB in all, of names and sizes beyond.

    Files that cannot be read are among them, in `problems`.
    """
    found = folders.find(path)
    described = [file.name for file in found if folders.is_labels(file.name)]
    images = [file for file in found if not folders.is_labels(file.name)]
    names, problems = [file.name for file in images], {file.name: file.problem for file in images if file.problem}
    whole, digest = sum(file.size for file in images) <= _HASHED_BYTES, hashlib.sha256()
    for file in images:
        content = "unreadable"
        if file.name not in problems:
            try:
                content = hashlib.sha256((path / file.name).read_bytes()).hexdigest() if whole else ""
            except OSError as error:
                problems[file.name] = f"cannot be read ({error.strerror}); change that, or remove it"
                content = "unreadable"
        digest.update(f"{file.name} {file.size} {content}\n".encode(errors="surrogateescape"))
    place = _only(described, str(path))
    try:
        text = (path / place).read_bytes() if place else None
    except OSError as error:
        raise ValueError(f"{path / place} cannot be read ({error.strerror}); it holds the classes: mend it") from error
    digest.update(text or b"")
    _check_some(names, str(path))
    classes, num_classes = labels.read(text, place, names, str(path))
    return Files(f"folder:{path}", path, None, names, classes, num_classes, digest.hexdigest(), problems)


def open_zip(path: pathlib.Path) -> Files:
    """The images in a zip. Its fingerprint is of the directory, which holds each file's name, size and CRC-32."""
    stamp = _stamp(path)
    archive = _archive(path, stamp, os.getpid())
    digest, names, described = hashlib.sha256(), [], []
    for entry in sorted(archive.infolist(), key=lambda e: e.filename):
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise ValueError(f"{path}: holds {entry.filename!r}, a path outside the zip; do not trust this file")
        if not entry.is_dir() and folders.is_labels(entry.filename):
            described.append(entry.filename)
        elif not entry.is_dir() and folders.is_image(entry.filename):
            names.append(entry.filename)
        else:
            check_entry(archive, entry, path)  # a damaged name must not make an image or the classes disappear
            continue
        digest.update(f"{entry.filename} {entry.file_size} {entry.CRC:08x}\n".encode())
    if len({folders.canonical(name) for name in names}) != len(names):
        raise ValueError(f"{path}: holds one name twice; make the zip again")
    place = _only(described, str(path))
    text = _read(archive, place, path) if place else None
    _check_some(names, str(path))
    classes, num_classes = labels.read(text, place, names, str(path))
    return Files(f"zip:{path}", path, stamp, names, classes, num_classes, digest.hexdigest())


def check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: pathlib.Path) -> None:
    """ValueError where the name of an entry in the zip's directory is not the one that stands before its content."""
    try:
        archive.open(entry).close()
    except RuntimeError:  # encrypted, or packed in a way that is not known: it is not read, but it is what it says
        return
    except Exception as error:  # BadZipFile, struct.error, OSError, …
        raise ValueError(f"{path}: {entry.filename!r} is damaged ({arrays.reason(error)}); get it again") from error


def _only(described: list[str], path: str) -> str:
    """The one `dataset.json`, "" where there is none; ValueError for two, of which one would be ignored."""
    if len(described) > 1:
        listed = ", ".join(ascii(name) for name in described[:4])
        raise ValueError(f"{path}: holds {len(described)} {folders.LABELS} ({listed}); keep one, with all classes")
    return described[0] if described else ""


def _check_some(names: list[str], path: str) -> None:
    if not names:
        raise ValueError(f"{path}: no images ({', '.join(decoding.EXTENSIONS)}); the path may name the wrong place")


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=16)
def _archive(path: pathlib.Path, stamp: tuple[int, int], process: int) -> zipfile.ZipFile:
    """An open zip, one handle a process (zipfile serialises reads); `stamp` and `process` are keys of the cache."""
    stream = path.open("rb")
    try:
        return open_archive(stream)
    except Exception as error:  # BadZipFile, struct.error, ValueError, OSError, …, by what is broken
        stream.close()
        raise ValueError(f"{path}: not a readable zip ({arrays.reason(error)}); get it again") from error


def open_archive(stream: BinaryIO) -> zipfile.ZipFile:
    """A zip whose directory holds as many entries as its end says; zipfile reads on where one swallows the next."""
    archive = zipfile.ZipFile(stream)
    length = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, length - 2**16 - 100))
    tail = stream.read()
    at = len(tail) - 22 if tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\5\6")
    said, many = int.from_bytes(tail[at + 10 : at + 12], "little"), tail[max(0, at - 76) : at]
    found = len(archive.infolist())
    if many[:4] == b"PK\6\6" and said == 0xFFFF:  # zip64's own end stands before it
        said = int.from_bytes(many[32:40], "little")
    elif found > 0xFFFF:  # of some tools, that write what fits
        found &= 0xFFFF
    if found != said:
        raise zipfile.BadZipFile(f"its directory has {found} entries, its end says {said}")
    return archive


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
