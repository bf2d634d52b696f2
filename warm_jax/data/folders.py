r"""Which files below a folder, or in a zip, are images: the same for `prepare`, `inspect`, training and `restore`.

Hidden files and macOS's `__MACOSX` and `._…` are none, also where a tool wrote `\` for `/`. Linked folders are
followed, except into a folder that they lie in. What cannot be read is found all the same, with the reason: it is for
the reader to refuse it, or to leave it out by name.
"""

import contextlib
import logging
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import NamedTuple

from warm_jax.data.decoding import EXTENSIONS as EXTENSIONS

LABELS = "dataset.json"


class Found(NamedTuple):
    """A file: its path below the folder, with slashes, its size, and why it cannot be read ("" where it can)."""

    name: str
    size: int
    problem: str


def canonical(name: str) -> str:
    r"""A path with slashes only: `.\a\b.png`, `./a/b.png` and `a//b.png` are `a/b.png`."""
    if not name.isascii():
        with contextlib.suppress(UnicodeError):  # of a locale without UTF-8, the bytes of a file's name are escaped
            name = name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def printable(name: str) -> str:
    r"""A path that can be written anywhere: bytes that are not UTF-8 as `\xe9`, control characters as `\x1b`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_image(name: str) -> bool:
    """Whether a path, in a folder or a zip, is that of an image."""
    return name.lower().endswith(EXTENSIONS) and not _is_hidden(name)


def is_labels(name: str) -> bool:
    """Whether a path is that of a `dataset.json`, wherever it lies and whatever its case."""
    return canonical(name).rsplit("/", 1)[-1].casefold() == LABELS and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part.casefold() == "__macosx" for part in canonical(name).split("/"))


def find(path: pathlib.Path) -> list[Found]:
    """The images and `dataset.json` files below a folder, by name. OSError where a folder cannot be read."""
    path.stat()
    found = sorted(_walk(path, "", (_identity(path),)))
    return [file for file in found if file.problem or is_image(file.name) or is_labels(file.name)]


def _identity(path: pathlib.Path | os.DirEntry) -> tuple[int, int]:
    seen = path.stat()
    return seen.st_dev, seen.st_ino


def _walk(folder: pathlib.Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Found]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        named = printable(str(folder))
        raise OSError(f"{named}: this folder cannot be read ({error.strerror}); change that, or move it") from error
    for entry in entries:
        name = prefix + entry.name
        if _is_hidden(entry.name):
            continue
        try:
            seen = entry.stat()
        except OSError as error:  # a link that leads nowhere, or around in a circle
            if _may_be_images(entry.name):
                yield Found(name, 0, f"cannot be read ({error.strerror}); repair the link, or remove it")
            continue
        if stat.S_ISDIR(seen.st_mode):
            identity = (seen.st_dev, seen.st_ino)
            if identity in above:
                logging.warning("%s: links to a folder that it lies in; left out", printable(entry.path))
                continue
            yield from _walk(pathlib.Path(entry.path), f"{name}/", (*above, identity))
        elif stat.S_ISREG(seen.st_mode):
            yield Found(name, seen.st_size, "")
        elif is_image(name):  # reading a pipe would wait for ever
            yield Found(name, 0, "not a file; remove it")


def _may_be_images(name: str) -> bool:
    """Whether what a broken link of this name led to may have been an image, or a folder of some."""
    return is_image(name) or is_labels(name) or not pathlib.PurePath(name).suffix
