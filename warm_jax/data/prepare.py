"""`--mode=prepare`: any set of images to one file of equal PNGs, the same wherever and however often it is run.

An image is made grey or RGB (by the rules in `data/decoding.py`), cropped to the target's proportions about its centre,
and resized with Lanczos' filter: what EDM's data sets are made with. Where neither is asked for, grey images stay grey,
unless others are RGB. The result is a zip in EDM's layout, or an ArrayRecord, with a manifest beside it that holds the
settings and a hash of each image's pixels.

Work is done in chunks, in `FILE.partial/`; when the same command is given again, finished chunks are not done again.
The file appears when it is whole, and is the same, byte for byte, as from an uninterrupted run.
"""

import json
import logging
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from warm_jax.data import decoding, files, folders, manifest, records, sources
from warm_jax.data.arrays import Items

CHUNK = 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first moment: the time of day must not change the file


def run(
    images: str,
    out: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    crop: str = "center",
    workers: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> int:
    """Write the images of source `images` to `out` (.zip or .arrayrecord) and its manifest; 0 when that is done.

    `image_size` (a side, or height and width) None leaves sizes as they are, if they are the same for all images.
    `channels` (1 or 3) None leaves grey images grey, unless some are RGB: then all are. `crop` is "center", or "none"
    where the proportions fit already. With `on_error="skip"` broken images are left out, and listed in the manifest;
    otherwise the first raises ValueError. `workers` threads, by default one a core.
    """
    target = pathlib.Path(out).expanduser()
    _check_arguments(target, image_size, channels, crop, on_error)
    items = sources.open_items(images)
    size = [image_size, image_size] if isinstance(image_size, int) else image_size and list(image_size)
    settings = {
        **{"source": items.spec, "source_fingerprint": items.fingerprint, "image_size": size, "channels": channels},
        **{"crop": crop, "filter": "lanczos", "on_error": on_error},
    }
    if target.exists():
        return _already_there(target, settings, progress)
    partial = target.with_name(target.name + ".partial")
    _claim(partial, settings)
    starts = range(0, len(items), CHUNK)
    bar = tqdm(total=len(items), unit="image", desc=f"prepare {target.name}", disable=not progress)
    with bar, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in starts:
            if not _is_whole(_chunk(partial, start)):
                _write_chunk(_chunk(partial, start), start, items, settings, pool)
            bar.update(min(CHUNK, len(items) - start))
    count, skipped = _assemble(partial, [_chunk(partial, s) for s in starts], target, items, settings)
    shutil.rmtree(partial)
    if skipped:
        listed = "; ".join(skipped[:10]) + ("; …" if len(skipped) > 10 else "")
        logging.warning("%s: skipped %d of %d images: %s", images, len(skipped), len(items), folders.printable(listed))
    print(f"{target}: {count} images, and {manifest.beside(target).name}")
    return 0


def fit(picture: Image.Image, size: tuple[int, int], crop: str, name: str) -> Image.Image:
    """The picture cropped to the largest centred box of `size`'s proportions (height, width), and resized to it."""
    height, width = size
    if crop == "center":
        box_width = min(picture.width, picture.height * width // height)
        box_height = min(picture.height, picture.width * height // width)
        left, top = (picture.width - box_width) // 2, (picture.height - box_height) // 2
        if box_width < 1 or box_height < 1:
            raise ValueError(f"{name}: {picture.height}×{picture.width} is too narrow for {height}×{width}")
        picture = picture.crop((left, top, left + box_width, top + box_height))
    elif picture.width * height != picture.height * width:
        had = f"{picture.height}×{picture.width}"
        raise ValueError(f"{name}: {had} is not of the proportions {height}×{width}; crop='center' makes it so")
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def _check_arguments(target: pathlib.Path, image_size, channels: int | None, crop: str, on_error: str) -> None:
    if target.suffix not in (".zip", ".arrayrecord"):
        raise ValueError(f"--out={target} must end in .zip or .arrayrecord")
    target.parent.mkdir(parents=True, exist_ok=True)
    sides = (image_size,) if isinstance(image_size, int) else image_size or ()
    if any(not 1 <= side <= 4096 for side in sides) or len(sides) > 2:
        raise ValueError(f"image_size is {image_size}; it must be a side, or height and width, of 1 … 4096 pixels")
    for name, value, allowed in [
        ("channels", channels, (None, 1, 3)),
        ("crop", crop, ("center", "none")),
        ("on_error", on_error, ("raise", "skip")),
    ]:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def _already_there(target: pathlib.Path, settings: dict, progress: bool) -> int:
    """0 where `target` was made with these settings and every image in it has its checksum; else ValueError."""
    described = manifest.read(target)
    if described is None or _changed(described.settings, settings):
        raise ValueError(f"{target} is there, of other settings or without a manifest; remove it or name another")
    items = sources.open_items(f"{target.suffix[1:]}:{target}")
    try:
        for index in tqdm(range(len(items)), unit="image", desc=f"check {target.name}", disable=not progress):
            items.get(index)  # which compares it with the file's own checksum
    except (ValueError, OSError) as error:
        text = (
            f"{target} was made with these settings, and has been damaged since ({error}); remove it, to make it again"
        )
        raise ValueError(text) from error
    print(f"{target} is there already, with these settings, and undamaged: nothing to do")
    return 0


def _changed(before: dict, settings: dict) -> list[str]:
    # The same source may have another name now; its fingerprint tells.
    return [key for key in settings if key != "source" and before.get(key) != settings[key]]


def _claim(partial: pathlib.Path, settings: dict) -> None:
    """Begin, or go on with, unfinished work."""
    file = partial / "settings.json"
    if file.exists():
        try:
            before = dict(json.loads(file.read_text("utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is broken ({error}); delete {partial}") from error
        if changed := _changed(before, settings):
            was = ", ".join(f"{key} was {before.get(key)!r}, is {settings[key]!r}" for key in changed)
            raise ValueError(f"{partial} is unfinished work of other settings ({was}); delete it to begin anew")
        return
    partial.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    os.replace(part, file)


def _chunk(partial: pathlib.Path, start: int) -> pathlib.Path:
    return partial / f"{start:010d}.zip"


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a chunk is there and undamaged: a crash of the machine can leave one renamed but not written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and "chunk.json" in archive.namelist()
    except Exception:  # OSError, BadZipFile, zlib.error, NotImplementedError, …, by what is broken
        return False


def _write_chunk(path: pathlib.Path, start: int, items: Items, settings: dict, pool: ThreadPoolExecutor) -> None:
    """A zip of the images `start` … of a chunk, and of what the manifest needs to know about them."""

    def make(index: int) -> tuple[bytes, list] | str:
        try:
            return _make(items, index, settings)
        except (ValueError, OSError) as error:
            if settings["on_error"] == "raise":
                raise
            return str(error)

    made = list(pool.map(make, range(start, min(start + CHUNK, len(items)))))
    part = path.with_suffix(f".part{os.getpid()}")
    with zipfile.ZipFile(part, "w") as archive:
        for index, image in enumerate(made, start):
            if not isinstance(image, str):
                archive.writestr(str(index), image[0])
        described = [[index, *image[1]] for index, image in enumerate(made, start) if not isinstance(image, str)]
        skipped = [image for image in made if isinstance(image, str)]
        archive.writestr("chunk.json", json.dumps({"images": described, "skipped": skipped}))
    os.replace(part, path)


def _make(items: Items, index: int, settings: dict) -> tuple[bytes, list]:
    """One image as a PNG, and [shape, class, hash of its pixels]."""
    name = f"{items.spec}: {items.name(index)}"
    content, label = items.get(index)
    picture = decoding.convert(content, name, settings["channels"])
    if settings["image_size"]:
        picture = fit(picture, tuple(settings["image_size"]), settings["crop"], name)
    pixels = np.asarray(picture)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return decoding.encode_png(pixels), [list(pixels.shape), label, manifest.hash_pixels(pixels)]


def _read_chunks(chunks: list[pathlib.Path]) -> Iterator[tuple[list, bytes]]:
    for path in chunks:
        with zipfile.ZipFile(path) as archive:
            for description in json.loads(archive.read("chunk.json"))["images"]:
                yield description, archive.read(str(description[0]))


def _shapes(chunks: list[pathlib.Path]) -> Iterator[list[int]]:
    for path in chunks:
        with zipfile.ZipFile(path) as archive:
            yield from (found for _, found, _, _ in json.loads(archive.read("chunk.json"))["images"])


def _skipped(chunks: list[pathlib.Path]) -> list[str]:
    skipped = []
    for path in chunks:
        with zipfile.ZipFile(path) as archive:
            skipped += json.loads(archive.read("chunk.json"))["skipped"]
    return skipped


def _assemble(
    partial: pathlib.Path, chunks: list[pathlib.Path], target: pathlib.Path, items: Items, settings: dict
) -> tuple[int, list[str]]:
    """All chunks in one file; the count, and what was skipped. The manifest comes first: no file is without one."""
    whole, described, shape = partial / ("whole" + target.suffix), [], None
    mixed = settings["channels"] is None and len({found[2] for found in _shapes(chunks)}) > 1
    writer = _ZipWriter(whole) if target.suffix == ".zip" else _ArrayRecordWriter(whole)
    for (index, found, label, digest), content in _read_chunks(chunks):
        if mixed and found[2] == 1:
            pixels = np.repeat(decoding.decode(content, items.name(index)), 3, axis=2)
            found, digest, content = list(pixels.shape), manifest.hash_pixels(pixels), decoding.encode_png(pixels)
        shape = shape or found
        if found != shape:
            raise ValueError(
                f"{items.spec}: {items.name(index)} is {'×'.join(map(str, found))}, those before it are "
                f"{'×'.join(map(str, shape))}; delete {partial}, and give --image_size"
            )
        name = f"{len(described) // 1000:05d}/img{len(described):08d}.png"
        writer.write(name, content)
        described.append((name, label, digest))
    skipped = _skipped(chunks)
    if not described:
        raise ValueError(f"{items.spec}: none of its {len(items)} images can be read; the first: {skipped[0]}")
    labels = [label for _, label, _ in described]
    pairs = [[name, label] for name, label, _ in described] if items.num_classes else None
    writer.close(json.dumps({"labels": pairs}))
    if target.suffix == ".zip":
        fingerprint = files.open_zip(whole).fingerprint
    else:
        fingerprint = records.hash_arrayrecord(whole, np.array(labels))
    manifest.write(target, manifest.Manifest(settings, tuple(shape), described, skipped, fingerprint))
    os.replace(whole, target)
    return len(described), skipped


class _ZipWriter:
    """EDM's layout: a zip that is stored, not compressed (the PNGs are), with `dataset.json`."""

    def __init__(self, path: pathlib.Path):
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def write(self, name: str, content: bytes) -> None:
        self._archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)

    def close(self, labels: str) -> None:
        self.write("dataset.json", labels.encode())
        self._archive.close()


class _ArrayRecordWriter:
    """One image a record; names and classes are read from the manifest."""

    def __init__(self, path: pathlib.Path):
        package = records.import_package("array_record.python.array_record_module", f"--out={path.name}", "arrayrecord")
        self._writer = package.ArrayRecordWriter(str(path), "group_size:1")

    def write(self, name: str, content: bytes) -> None:
        self._writer.write(content)

    def close(self, labels: str) -> None:
        self._writer.close()
