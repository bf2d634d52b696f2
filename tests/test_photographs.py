"""Files in and out: every kind that people have, made here, and read by Pillow or byte by byte to compare."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from warm_jax.restoration import photographs

RNG = np.random.default_rng(0)
GREY, RGB = RNG.integers(0, 256, (9, 14), np.uint8), RNG.integers(0, 256, (9, 14, 3), np.uint8)
SMOOTH = np.add.outer(np.arange(16), 3 * np.arange(24)).astype(np.uint8)[..., None] + np.array([0, 40, 90], np.uint8)


def encoded(picture, kind="PNG", **settings):
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(pixels, colour):
    """A PNG of 16 bits by the specification: big-endian rows, filter 0."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def values(pixels, bits=8):
    """As the definition says, in float64: 0 is -1 and the largest number 1."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return 2 * pixels.astype(np.float64) / (2**bits - 1) - 1


def reread(photograph):
    """What Pillow finds in the file that the photograph, unchanged, becomes."""
    return Image.open(io.BytesIO(photographs.encode(photograph, photograph.pixels)))


@pytest.mark.parametrize(("array", "mode"), [(GREY, "L"), (RGB, "RGB")])
def test_8_bits(array, mode):
    found = photographs.decode(encoded(Image.fromarray(array)))
    np.testing.assert_allclose(found.pixels, values(array), atol=1e-6)
    assert (found.bits, found.transparency, found.profile, found.notes) == (8, None, None, ())
    again = reread(found)
    assert (again.format, again.mode) == ("PNG", mode)
    np.testing.assert_array_equal(np.asarray(again), array)


def test_jpeg():
    content = encoded(Image.fromarray(SMOOTH), "JPEG", quality=95)
    found = photographs.decode(content)
    np.testing.assert_allclose(found.pixels, values(np.asarray(Image.open(io.BytesIO(content)))), atol=1e-6)
    assert np.abs(found.pixels - values(SMOOTH)).mean() < 0.03


def test_values_beyond_the_range_are_clipped_and_rounded():
    found = photographs.stored(np.array([[[-7], [-1], [0.4 / 127.5 - 1], [0.6 / 127.5 - 1], [1], [7]]], np.float32), 8)
    assert found.ravel().tolist() == [0, 0, 0, 1, 255, 255]


def test_16_bits_grey():
    array = RNG.integers(0, 2**16, (5, 7), np.uint16)
    found = photographs.decode(deep_png(array, 0))
    np.testing.assert_allclose(found.pixels, values(array, 16), atol=1e-6)
    again = reread(found)
    assert again.mode == "I;16" and found.bits == 16
    np.testing.assert_array_equal(np.asarray(again), array)


@pytest.mark.parametrize(("colour", "channels", "clear"), [(2, 3, False), (4, 2, True), (6, 4, True)])
def test_16_bits_with_colour_or_transparency(colour, channels, clear):
    """By pypng in; what comes out is taken apart by hand, and has all 16 bits."""
    pytest.importorskip("png")
    array = RNG.integers(0, 2**16, (5, 7, channels), np.uint16)
    content = deep_png(array, colour)
    found = photographs.decode(content)
    own = channels - clear
    np.testing.assert_allclose(found.pixels, values(array[..., :own], 16), atol=1e-6)
    assert (found.transparency is not None) == clear
    out, data, at = photographs.encode(found, found.pixels), b"", 8
    assert out[:8] == content[:8] and out[16:26] == content[16:26]  # size, depth, colour type
    while at < len(out):
        length, kind = struct.unpack(">I4s", out[at : at + 8])
        data += out[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(5, -1)
    assert not rows[:, 0].any()  # filter 0
    np.testing.assert_array_equal(rows[:, 1:].copy().view(">u2").reshape(array.shape), array)


def test_without_pypng_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "png", None)
    with pytest.raises(ValueError, match=r"16 bits .* needs pypng: install warm_jax with \"\.\[restore\]\""):
        photographs.decode(deep_png(RNG.integers(0, 2**16, (5, 7, 3), np.uint16), 2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(SMOOTH), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    found = photographs.decode(content)
    np.testing.assert_allclose(found.pixels, values(expected), atol=1e-6)
    assert reread(found).getexif().get(0x0112, 1) == 1  # turned once, not twice


def test_cmyk_is_converted_and_said_so():
    content = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    found = photographs.decode(content)
    assert found.notes == ("converted from CMYK to RGB",) and found.pixels.shape == (16, 24, 3)
    assert np.abs(found.pixels - values(SMOOTH)).mean() < 0.05


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "P, opaqueness of each", "L", "RGB"])
def test_transparency_is_kept_aside_and_put_back(mode):
    """As a channel, of a palette, or as one colour that is transparent; in the file that comes out, a channel."""
    array = np.zeros((4, 6, 4), np.uint8)
    array[:2, :, :3], array[..., 3] = (200, 30, 90), 255
    array[:, 3:, 3] = 0
    picture, settings = Image.fromarray(array), {}
    if mode == "P":
        picture, settings = picture.convert("RGB").quantize(4), {"transparency": 0}
    elif mode == "P, opaqueness of each":
        picture, settings = picture.convert("RGB").quantize(4), {"transparency": bytes([255, 0, 255, 255])}
    elif mode in ("L", "RGB"):
        picture, settings = picture.convert(mode), {"transparency": 0 if mode == "L" else (0, 0, 0)}
    else:
        picture = picture.convert(mode)
    content = encoded(picture, **settings)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert 0 < (expected[..., 3] == 0).mean() < 1
    found = photographs.decode(content)
    np.testing.assert_array_equal(found.transparency, expected[..., 3])
    again = reread(found)
    assert again.mode == ("LA" if mode in ("L", "LA") else "RGBA")
    np.testing.assert_array_equal(np.asarray(again.convert("RGBA")), expected)


def test_palettes_and_one_bit():
    found = photographs.decode(encoded(Image.fromarray(RGB).quantize(256)))
    np.testing.assert_allclose(
        found.pixels, values(np.asarray(Image.fromarray(RGB).quantize(256).convert("RGB"))), atol=1e-6
    )
    bits = GREY > 127
    np.testing.assert_allclose(photographs.decode(encoded(Image.fromarray(bits))).pixels, values(255 * bits), atol=1e-6)


def test_the_colour_profile_stays():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = photographs.decode(encoded(Image.fromarray(RGB), icc_profile=profile))
    assert reread(found).info["icc_profile"] == profile


@pytest.mark.parametrize("colour", [0, 2, 6])
def test_the_colour_profile_of_16_bits_stays(colour):
    """A grey one by Pillow, others by pypng; written by hand, read back by Pillow."""
    pytest.importorskip("png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = deep_png(RNG.integers(0, 2**16, (5, 7, (1, 0, 3, 0, 0, 0, 4)[colour]), np.uint16), colour)
    content = content[:33] + chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(profile)) + content[33:]
    found = photographs.decode(content)
    assert found.bits == 16 and found.notes == ()
    again = reread(found)
    again.load()
    assert again.info["icc_profile"] == profile


def test_a_colour_of_16_bits_that_is_transparent():
    pytest.importorskip("png")
    array = RNG.integers(0, 2**16, (5, 7, 3), np.uint16)
    array[2:4, 3] = 1, 256, 40_000
    array[0, 0] = 1, 256, 40_001  # another, of which 8 bits would be the same
    content = deep_png(array, 2)
    content = content[:33] + chunk(b"tRNS", struct.pack(">3H", 1, 256, 40_000)) + content[33:]
    found = photographs.decode(content)
    expected = np.full((5, 7), 65535)
    expected[2:4, 3] = 0
    np.testing.assert_array_equal(found.transparency, expected)
    np.testing.assert_allclose(found.pixels, values(array, 16), atol=1e-6)
    assert reread(found).mode == "RGBA"


@pytest.mark.parametrize(("bits", "gamma", "noted"), [(8, 45455, False), (8, 100_000, True), (16, 100_000, True)])
def test_a_gamma_that_is_dropped_is_noted(bits, gamma, noted):
    pytest.importorskip("png")
    content = encoded(Image.fromarray(RGB)) if bits == 8 else deep_png(RGB.astype(np.uint16), 2)
    found = photographs.decode(content[:33] + chunk(b"gAMA", struct.pack(">I", gamma)) + content[33:])
    assert found.notes == (("its gamma, 1, was dropped",) if noted else ())


def header_of(width, height):
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


BROKEN = {
    "text": (b"this is no image", "not a readable PNG, JPEG or WebP .it begins like none of them.; get it again"),
    "nothing": (b"", "not a readable"),
    "truncated PNG": (encoded(Image.fromarray(RGB))[:-60], "not a readable PNG, JPEG or WebP"),
    "truncated JPEG": (
        encoded(Image.fromarray(SMOOTH), "JPEG")[:-80],
        r"not a readable PNG, JPEG or WebP \((?i:truncated)",
    ),
    "beginning of a PNG": (encoded(Image.fromarray(RGB))[:20], "not a readable"),
    "bomb": (
        header_of(60_000, 60_000),
        "60000×60000 pixels, the limit is 67,108,864 in all; cut it into parts, or shrink it",
    ),
    "large": (header_of(9000, 9000), "9000×9000 pixels, the limit is 67,108,864"),
    "gif": (encoded(Image.fromarray(GREY), "GIF"), "begins like none of them"),
    "animated": (
        encoded(Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        "animated; save one frame",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case):
    content, named = BROKEN[case]
    with pytest.raises(ValueError, match=named):
        photographs.decode(content)


def test_a_jpeg_of_too_many_pixels():
    """Its size is in the header, which is all that is read: the rest is not there."""
    content = encoded(Image.fromarray(SMOOTH), "JPEG")
    at = content.index(b"\xff\xc0") + 5
    for height, named in ((3000, "30000×3000 pixels, the limit"), (30_000, "too many pixels, the limit is 67,108,864")):
        large = content[:at] + struct.pack(">HH", height, 30_000) + content[at + 4 :]
        with pytest.raises(ValueError, match=named):
            photographs.decode(large)


def test_truncated_16_bits():
    pytest.importorskip("png")
    with pytest.raises(ValueError, match="not a readable PNG"):
        photographs.decode(deep_png(RNG.integers(0, 2**16, (50, 70, 3), np.uint16), 2)[:-600])


def test_files_of_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "note.txt", "c.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in photographs.list_images(tmp_path)] == ["a.JPG", "b.png", "c.jpeg"]
    assert photographs.list_images(tmp_path / "note.txt") == [tmp_path / "note.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        photographs.list_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        photographs.list_images(tmp_path / "nowhere")


def test_what_is_not_to_be_read(tmp_path, monkeypatch):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not a file"):
        photographs.load(tmp_path / "pipe.png")
    assert photographs.size(tmp_path / "pipe.png") is None  # and does not wait for a writer
    (tmp_path / "long.png").write_bytes(b"x" * 101)
    monkeypatch.setattr(photographs, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="101 bytes, the limit is 100"):
        photographs.load(tmp_path / "long.png")
    assert photographs.size(tmp_path / "long.png") is None
