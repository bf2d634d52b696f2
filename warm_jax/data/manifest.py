"""What was prepared, and how: `FILE.manifest.json` beside the file that `prepare` wrote.

Hashes are of the pixels, not of the files: the same images have the same `total` in a zip, in an ArrayRecord, and
whatever the version of the PNG encoder. `fingerprint` is that of the source which the file is when it is read.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from warm_jax.data import arrays

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a prepared data set."""

    settings: dict  # what it was made from, and with: source, source_fingerprint, image_size, channels, crop, filter, …
    image_shape: tuple[int, int, int]
    files: list[tuple[str, int, str]]  # name, class or -1, sha256 of the pixels
    skipped: list[str]  # "name: reason" of what on_error="skip" left out
    fingerprint: str

    @property
    def total(self) -> str:
        """The hash of all: of the lines `shape`, then `name class sha256`."""
        lines = [str(list(self.image_shape)), *(f"{name} {label} {digest}" for name, label, digest in self.files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_pixels(pixels: np.ndarray) -> str:
    """The sha256 of an image's bytes in height, width, channel order."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


def beside(path: pathlib.Path) -> pathlib.Path:
    """Where the manifest of `path` is."""
    return pathlib.Path(f"{path}.manifest.json")


def write(path: pathlib.Path, manifest: Manifest) -> None:
    """Put it beside `path`, whole or not at all."""
    content = {
        "version": VERSION,
        "count": len(manifest.files),
        "total": manifest.total,
        **dataclasses.asdict(manifest),
    }
    lines = ",\n".join("  " + json.dumps(file) for file in content.pop("files"))
    text = json.dumps(content, indent=1)[:-2] + ',\n "files": [\n' + lines + "\n ]\n}\n"
    part = beside(path).with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, beside(path))


def read(path: pathlib.Path) -> Manifest | None:
    """The manifest beside `path`, or None; ValueError if it is broken or its hash does not fit."""
    if not (file := beside(path)).is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this program writes {VERSION}")
        files = [(str(name), int(label), str(digest)) for name, label, digest in content["files"]]
        shape = tuple(int(n) for n in content["image_shape"])
        manifest = Manifest(content["settings"], shape, files, list(content["skipped"]), str(content["fingerprint"]))
        if manifest.total != content["total"]:
            raise ValueError(f"its total is {content['total']}, its files make {manifest.total}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file}: broken manifest ({arrays.reason(error)}); prepare the data again") from error
    return manifest


def check(path: pathlib.Path, fingerprint: str) -> None:
    """ValueError where there is a manifest, and it is of other data than `path` now holds."""
    if (manifest := read(path)) is not None and manifest.fingerprint != fingerprint:
        raise ValueError(
            f"{path} changed since it was prepared: its fingerprint is {fingerprint}, its manifest says "
            f"{manifest.fingerprint}; prepare it again, or delete {beside(path).name}"
        )
