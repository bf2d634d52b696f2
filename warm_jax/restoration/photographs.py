"""Photographs in and out: PNG, JPEG and WebP of 8 or 16 bits to numbers in [-1, 1], and back to a PNG of that depth.

    16 bits         kept. Grey by Pillow; with colour or transparency by pypng (the extra `restore`)
    transparency    kept aside, and put back
    palettes, 1 bit to RGB and grey
    CMYK, YCbCr, …  to RGB as Pillow does it, with a note
    orientation     EXIF's is applied
    colour profile  kept, of images whose mode was kept; another gamma is dropped, with a note
    animations, floats and 32 bits a channel are refused

Blur and noise are meant of the numbers that are stored, which a display's gamma has shaped. Limits: 64 megapixels an
image, 512 MiB a file; both are checked before anything is decoded.
"""

import dataclasses
import io
import pathlib
import struct
import warnings
import zlib

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image

from warm_jax.data import folders

MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 29
_FORMATS = ("PNG", "JPEG", "WEBP")

_ORIENTATION = 0x0112  # EXIF's tag
_USUAL_GAMMA = 0.45455  # as PNG's gAMA has it, of a display's 2.2
_TURNS = {  # what brings an image of that orientation upright
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x),
}


@dataclasses.dataclass(frozen=True)
class Photograph:
    """An image as numbers, and what else its file held.

    Attributes:
      pixels: In [-1, 1]; 1 channel (grey) or 3 (RGB).
      transparency: As it was stored; None where there is none.
      bits: 8 or 16.
      profile: The ICC profile of its colours, or None.
      notes: What was converted, for people.
    """

    pixels: Float32[np.ndarray, "h w c"]
    transparency: UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"] | None
    bits: int
    profile: bytes | None
    notes: tuple[str, ...]


def list_images(path: pathlib.Path) -> list[pathlib.Path]:
    """The photographs below a folder, by name, or the file itself; OSError or ValueError where there is none.

    They are those that `--mode=prepare` would read, broken ones too: whoever loads them says so.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"--images={path}: there is no such file or folder")
    found = [path / file.name for file in folders.find(path) if not folders.is_labels(file.name)]
    if not found:
        raise ValueError(f"--images={path}: no images ({', '.join(folders.EXTENSIONS)}) in this folder")
    return found


def check_size(width: int, height: int) -> None:
    """Raises ValueError for images of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width}×{height} pixels, the limit is {MAX_PIXELS:,} in all; cut it into parts, or shrink it"
        )


def size(path: pathlib.Path) -> tuple[int, int] | None:
    """(height, width) by the file's header, as stored; None where it cannot be read: `decode` will say why."""
    if not path.is_file():  # opening a pipe would wait for ever
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                return picture.height, picture.width
    except Exception:  # whatever Pillow raises on broken files
        return None


def load(path: pathlib.Path) -> bytes:
    """What is in a file; ValueError or OSError, without its name, where that is not to be read."""
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("not a file, or a link that leads nowhere")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}; shrink it")
    return path.read_bytes()


def decode(content: bytes) -> Photograph:
    """The photograph in a file's `content`; ValueError, without the file's name, says what is wrong with it."""
    depth, colour = _png_header(content)
    picture = _open(content, decode=not (depth == 16 and colour != 0))
    orientation = _orientation(picture)
    if depth == 16 and colour != 0:
        stored, bits, notes, profile = _read_deep(content), 16, (), picture.info.get("icc_profile")
    else:
        stored, bits, notes, profile = _pixels(picture)
    if profile is None and abs(picture.info.get("gamma", _USUAL_GAMMA) - _USUAL_GAMMA) > 0.001:
        notes = (*notes, f"its gamma, {1 / max(picture.info['gamma'], 1e-5):.3g}, was dropped")
    turned = np.ascontiguousarray(_TURNS.get(orientation, lambda x: x)(stored))
    channels = 3 if turned.shape[2] >= 3 else 1
    half = np.float32((2**bits - 1) / 2)
    transparency = turned[..., channels] if turned.shape[2] > channels else None
    return Photograph(turned[..., :channels].astype(np.float32) / half - 1, transparency, bits, profile, notes)


def _png_header(content: bytes) -> tuple[int, int]:
    """(bits, colour type) of a PNG; zeros of another file. A colour type of 0 is grey without transparency."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 26:
        return 0, 0
    check_size(*struct.unpack(">II", content[16:24]))
    return content[24], content[25]


def _open(content: bytes, decode: bool) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            picture = Image.open(io.BytesIO(content), formats=_FORMATS)
            size, animated = picture.size, picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1
            if decode and size[0] * size[1] <= MAX_PIXELS and not animated:
                picture.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels, the limit is {MAX_PIXELS:,} in all; cut it, or shrink it") from error
    except Exception as error:  # on broken files Pillow raises OSError, SyntaxError, ValueError, struct.error, …
        reason = "it begins like none of them" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(
            f"not a readable PNG, JPEG or WebP ({' '.join(str(reason).split())[:200]}); get it again"
        ) from error
    check_size(*size)
    if animated:
        raise ValueError("animated; save one frame of it")
    return picture


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF: struct.error, SyntaxError, …; it is not what the image is made of
        return 1


def _pixels(picture: Image.Image) -> tuple[np.ndarray, int, tuple[str, ...], bytes | None]:
    """(pixels `[h, w, 1 to 4]`, bits, notes, colour profile) of a picture that Pillow has decoded."""
    mode, notes, profile = picture.mode, (), picture.info.get("icc_profile")
    if mode.startswith("I;16"):
        if "transparency" in picture.info:
            notes = ("its transparent shade of grey was dropped",)
        return np.asarray(picture).astype(np.uint16)[..., None], 16, notes, profile
    if mode.startswith(("I", "F")):
        raise ValueError(f"{mode}, 32 bits a pixel, whose range is unknown; save it as 8 or 16 bits")
    clear = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    wanted = ("LA" if clear else "L") if mode in ("1", "L", "LA", "La") else ("RGBA" if clear else "RGB")
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        notes, profile = (f"converted from {mode} to RGB",), None
    if mode in ("La", "RGBa") or (wanted == "LA" and mode != "LA"):  # there is no direct way
        picture = picture.convert("RGBA")
    pixels = np.asarray(picture.convert(wanted))
    return pixels if pixels.ndim == 3 else pixels[..., None], 8, notes, profile


# ── 16 bits and more than one channel, which Pillow makes 8 bits of ──────────────────────────────────────────────────


def _pypng():
    try:
        import png
    except ImportError as error:
        raise ValueError(
            'a PNG of 16 bits with colour or transparency needs pypng: install warm_jax with ".[restore]", or pypng'
        ) from error
    return png


def _read_deep(content: bytes) -> UInt16[np.ndarray, "h w c"]:
    png = _pypng()
    try:
        width, height, rows, found = png.Reader(bytes=content).read()
        pixels = np.vstack([np.asarray(row, np.uint16) for row in rows])
        pixels = pixels.reshape(height, width, found["planes"])
        if "transparent" in found:  # one colour
            clear = (pixels == np.array(found["transparent"], np.uint16)).all(2, keepdims=True)
            pixels = np.concatenate([pixels, np.where(clear, 0, 65535).astype(np.uint16)], 2)
        return pixels
    except Exception as error:  # png.Error, zlib.error, EOFError, …, by what is broken
        raise ValueError(f"not a readable PNG ({' '.join(str(error).split())[:200]}); get it again") from error


# ── Out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def stored(pixels: Float32[np.ndarray, "h w c"], bits: int) -> UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"]:
    """Numbers in [-1, 1], clipped to that, as 8 or 16 bits: the nearest."""
    top = 2**bits - 1
    values = np.clip((np.asarray(pixels, np.float64) + 1) * (top / 2), 0, top)
    return np.rint(values).astype(np.uint8 if bits == 8 else np.uint16)


def _profile_chunk(profile: bytes) -> bytes:
    """A PNG's chunk of an ICC profile: its name, 0, the method of compression, and the profile."""
    data = b"iCCPICC Profile\0\0" + zlib.compress(profile)
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def encode(photograph: Photograph, pixels: Float32[np.ndarray, "h w c"]) -> bytes:
    """A PNG of `pixels` with the bits, the transparency and the colour profile of `photograph`."""
    array = stored(pixels, photograph.bits)
    if photograph.transparency is not None:
        array = np.concatenate([array, photograph.transparency[..., None]], 2)
    stream, (height, width, channels) = io.BytesIO(), array.shape
    if photograph.bits == 16 and channels > 1:
        writer = _pypng().Writer(width, height, greyscale=channels == 2, alpha=channels in (2, 4), bitdepth=16)
        writer.write(stream, array.reshape(height, -1))
        header, rest = stream.getvalue()[:33], stream.getvalue()[33:]  # pypng writes no profiles
        return header + (_profile_chunk(photograph.profile) if photograph.profile else b"") + rest
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    picture.save(stream, "PNG", icc_profile=photograph.profile)
    return stream.getvalue()
