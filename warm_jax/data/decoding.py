"""One encoded image (PNG, JPEG, WebP) to pixels: exactly as stored, or not at all.

`decode` is what training reads with: 8-bit grey and RGB, and what expands to them without loss (1-bit, palettes).
Whatever would need a decision (16 bits, CMYK, transparency, an orientation to apply) is an error that names the image;
`prepare` decides, once:

    16 bits         the high byte
    transparency    over white
    CMYK, YCbCr, …  to RGB as Pillow does it; colour profiles are ignored
    orientation     EXIF's is applied
    floats, 32 bits refused

Limits: 64 megapixels an image, 512 MiB a file; both are checked before anything is decoded.
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from warm_jax.data import arrays

MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 29
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
SKIP = "leave it out with --config.data.on_error=skip (of prepare: --on_error=skip)"

_ORIENTATION = 0x0112  # EXIF's tag


class UnpreparedError(ValueError):
    """An image that is whole, but not as training reads them; `--mode=prepare` makes it so."""


def open_picture(content: bytes | np.ndarray, name: str, load: bool = True) -> Image.Image:
    """A Pillow image of any mode, decoded whole; ValueError names it if it is broken, too large or animated.

    Without `load` only its header is read.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content[..., 0] if content.shape[-1] == 1 else content)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name}: {len(content)} bytes, the limit is {MAX_BYTES}; replace it, or {SKIP}")
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        size = picture.size
        animated = picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1
        if size[0] * size[1] <= MAX_PIXELS and not animated and load:
            picture.load()
    except Exception as error:  # on broken files Pillow raises OSError, SyntaxError, ValueError, struct.error, …
        found = _reason(error)
        raise ValueError(f"{name}: not a readable PNG, JPEG or WebP ({found}); replace it, or {SKIP}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{name}: {size[0]}×{size[1]} pixels, the limit is {MAX_PIXELS} in all; shrink it, or {SKIP}")
    if animated:
        raise ValueError(f"{name}: animated; save one frame of it, or {SKIP}")
    return picture


def decode(content: bytes | np.ndarray, name: str) -> UInt8[np.ndarray, "h w c"]:
    """The stored pixels, 1 or 3 channels; ValueError if broken, UnpreparedError if of another kind."""
    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8 or content.ndim != 3 or content.shape[-1] not in (1, 3):
            raise UnpreparedError(f"{name}: {content.dtype}{list(content.shape)}, not uint8 of 1 or 3 channels")
        return content
    picture = open_picture(content, name)
    channels = _channels(content, picture, name)
    if picture.mode in ("1", "P"):
        picture = picture.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def shape(content: bytes | np.ndarray, name: str) -> tuple[int, int, int]:
    """Height, width and channels of what `decode` returns, by the header alone; raises as it does."""
    if isinstance(content, np.ndarray):
        return decode(content, name).shape
    picture = open_picture(content, name, load=False)
    return picture.height, picture.width, _channels(content, picture, name)


def _channels(content: bytes, picture: Image.Image, name: str) -> int:
    """1 or 3; UnpreparedError for a picture whose pixels are not to be taken as they are stored."""
    if (turned := _orientation(picture)) != 1:
        raise UnpreparedError(f"{name}: is stored turned or mirrored (EXIF orientation {turned})")
    if _is_deep_png(content) or picture.mode.startswith(("I", "F")):
        raise UnpreparedError(f"{name}: more than 8 bits a channel")
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        raise UnpreparedError(f"{name}: has transparency ({picture.mode})")
    if picture.mode not in ("1", "L", "P", "RGB"):
        raise UnpreparedError(f"{name}: colour mode {picture.mode}, not grey or RGB")
    return 1 if picture.mode in ("1", "L") else 3


def convert(content: bytes | np.ndarray, name: str, channels: int | None) -> Image.Image:
    """A picture of mode L or RGB by the rules above; `channels` 1 (ITU-R 601 luma) or 3 makes it so, None keeps it."""
    picture = open_picture(content, name)
    if not isinstance(content, np.ndarray):
        try:
            picture = ImageOps.exif_transpose(picture)
        except Exception as error:  # broken EXIF: struct.error, SyntaxError, …
            raise ValueError(f"{name}: broken EXIF ({arrays.reason(error)}); replace it, or {SKIP}") from error
    if picture.mode in ("I;16", "I;16B", "I;16L"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"{name}: {picture.mode}, 32 bits a pixel, whose range is unknown; save it as 8 or 16 bits")
    if picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        grey = picture.mode in ("L", "1", "LA", "La")
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "L" if grey else "RGB"
        )
    grey = channels == 1 or (channels is None and picture.mode in ("L", "1"))
    return picture.convert("L" if grey else "RGB")


def encode_png(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """A PNG of 1 or 3 channels, without metadata; lightly compressed, since reading speed matters more than size."""
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _is_deep_png(content: bytes) -> bool:
    # Pillow hands out 16-bit RGB as 8-bit RGB without a word; byte 24 of a PNG is the bit depth in IHDR.
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[24:25] == b"\x10"


def _orientation(picture: Image.Image) -> int:
    """EXIF's, 1 to 8; 1, as it is stored, also where the EXIF data are broken."""
    try:
        found = Image.Image.getexif(picture).get(_ORIENTATION, 1)  # a PNG's own would decode its pixels first
    except Exception:  # struct.error, SyntaxError, …
        return 1
    return found if found in range(1, 9) else 1


def _reason(error: Exception) -> str:
    # Pillow's text for this one names an object in memory.
    return "its beginning is of no such file" if isinstance(error, UnidentifiedImageError) else arrays.reason(error)
