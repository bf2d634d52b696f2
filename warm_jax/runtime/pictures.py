"""Images for people: the one rule from model units to bytes, grids, PNG files."""

import io
import math
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from warm_jax.weights import archives


def to_uint8(x: Float[Array, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """Model units [-1, 1] to bytes by EDM's rule, trunc(clip(127.5 x + 128, 0, 255)). Metrics use it too."""
    return jnp.clip(127.5 * x + 128, 0, 255).astype(jnp.uint8)


def from_uint8(images: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Bytes to model units: images / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int | None = None) -> UInt8[np.ndarray, "gh gw c"]:
    """The images side by side with two pixels of white between, row by row; by default about as wide as high."""
    n, height, width, channels = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        canvas[top : top + height, left : left + width] = image
    return canvas


def labelled_rows(
    rows: list[tuple[str, UInt8[np.ndarray, "n h w c"]]], side: int = 64, heads: list[str] | None = None
) -> UInt8[np.ndarray, "gh gw c"]:
    """A row of images for each (label, images), the label at its left; images are `side` pixels high or a bit more.

    `heads`: a text over the labels, and one over each column; of one or several lines, as many in each. In the font's
    Latin letters: it has no Greek ones.
    """
    scale = max(1, round(side / rows[0][1].shape[1]))
    strips = [grid(images.repeat(scale, 1).repeat(scale, 2), len(images)) for _, images in rows]
    height, channels, wide = strips[0].shape[0] + 6, strips[0].shape[2], rows[0][1].shape[2] * scale + 2
    font, labels = ImageFont.load_default(15), [*(label for label, _ in rows), *(heads or [""])[0].splitlines()]
    left = 16 + max(max(8 * len(label), math.ceil(font.getlength(label))) for label in labels)
    size = 15 if wide > 120 else 11  # of the heads' letters
    top = (size + 2) * (heads[0].count("\n") + 1) + 6 if heads else 0
    width = left + max(strip.shape[1] for strip in strips)
    canvas = np.full((top + height * len(rows), width, channels), 255, np.uint8)
    for i, strip in enumerate(strips):
        canvas[top + i * height : top + i * height + strip.shape[0], left : left + strip.shape[1]] = strip
    sheet = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    draw, black = ImageDraw.Draw(sheet), (0,) * channels if channels > 1 else 0
    for i, (label, _) in enumerate(rows):
        middle = top + i * height + height // 2
        draw.text((8, middle - 12), label, fill=black, font=font)
    for i, head in enumerate(heads or []):
        x = left + (i - 1) * wide + 2 if i else 8
        draw.multiline_text((x, 1), head, fill=black, font=ImageFont.load_default(size), spacing=2)
    drawn = np.asarray(sheet)
    return drawn[..., None] if drawn.ndim == 2 else drawn


def shrink(images: UInt8[np.ndarray, "n h w c"], side: int) -> UInt8[np.ndarray, "n h2 w2 c"]:
    """Images of much more than `side` pixels in height made about so high, by means over squares; others as they are.

    Means over squares weaken noise: of white noise by the squares' side.
    """
    n, height, width, channels = images.shape
    by = max(1, round(height / side))
    rows, columns = height // by, width // by
    squares = images[:, : rows * by, : columns * by].reshape(n, rows, by, columns, by, channels)
    return images if by == 1 else np.round(squares.mean((2, 4))).astype(np.uint8)


def scale_for_people(images: UInt8[np.ndarray, "n h w c"]) -> int:
    """How often to repeat a pixel so that an image in a grid is about 64 pixels high."""
    return max(1, round(64 / images.shape[1]))


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"], scale: int = 1) -> None:
    """Writes a PNG in one piece or not at all; `scale` repeats pixels. Grey for one channel, RGB for three."""
    image = image.repeat(scale, 0).repeat(scale, 1)
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, format="PNG")
    archives.write_atomically(path, content.getvalue())


def is_whole(path: pathlib.Path) -> bool:
    """Whether a PNG is there and the sums of its parts are right; its pixels are not unpacked."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError, struct.error):  # what Pillow makes of damaged ones
        return False


def load_png(path: pathlib.Path) -> UInt8[np.ndarray, "h w c"]:
    """What `save_png` wrote."""
    with Image.open(path) as image:
        array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
