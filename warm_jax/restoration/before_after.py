"""before_after.png: the middle of photographs, each beside some of its results, with headings."""

import pathlib

import numpy as np
from jaxtyping import UInt8

from warm_jax.restoration import photographs
from warm_jax.runtime import pictures

IMAGES, SIDE = 6, 256  # rows at most, and the most pixels of an image that are shown
_NAME = 24  # characters of a file's name that are shown


def cell(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "s s 3"]:
    """The middle of an image on a white square, its pixels repeated where it is small."""
    top, left = (max(0, n - SIDE) // 2 for n in image.shape[:2])
    image = image[top : top + SIDE, left : left + SIDE]
    image = image.repeat(scale := max(1, SIDE // max(image.shape[:2])), 0).repeat(scale, 1)
    square, (height, width, channels) = np.full((SIDE, SIDE, 3), 255, np.uint8), image.shape
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    square[top : top + height, left : left + width] = image.repeat(3, 2) if channels == 1 else image
    return square


def short(name: str) -> str:
    """A file's name, without its middle where it is long, and with ? for what is no text."""
    name, half = name.encode(errors="replace").decode(), (_NAME - 2) // 2
    return name if len(name) <= _NAME else f"{name[:half]}..{name[-half:]}"


def write(path: pathlib.Path, rows: list[list[pathlib.Path]]) -> None:
    """Writes a sheet of the first `IMAGES` rows of files, as many in each: a photograph, then its results.

    Rows with a file that cannot be read are left out.
    """
    shown = []
    for files in rows[:IMAGES]:
        try:
            cells = [cell(photographs.stored(photographs.decode(photographs.load(f)).pixels, 8)) for f in files]
        except (ValueError, OSError, MemoryError):  # gone or changed since it was restored
            continue
        shown.append((short(files[0].name), np.stack(cells)))
    if shown:
        results = len(shown[0][1]) - 1
        made = ["restored"] if results == 1 else [f"restored, draw {i}" for i in range(results)]
        heads = ["file", "as it was", *made]
        pictures.save_png(path, pictures.labelled_rows(shown, SIDE, heads))
