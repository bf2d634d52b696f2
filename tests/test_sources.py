"""Every source gives back the pixels that were written, by Pillow, numpy, lmdb or by hand; every bad file an error."""

import gzip
import io
import json
import os
import pathlib
import pickle
import shlex
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from warm_jax.data import arrays, decoding, manifest, prepare, records
from warm_jax.data.sources import open_items, open_source

RANDOM = np.random.RandomState(0)
COLOUR = RANDOM.randint(0, 256, (6, 8, 10, 3)).astype(np.uint8)
LABELS = [4, 0, 1, 1, 2, 0]


def encode(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(stream, kind, **options)
    return stream.getvalue()


def names(count=6, extension="png"):
    return [f"{i // 4:05d}/img{i:08d}.{extension}" for i in range(count)]


def write_zip(path, contents, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        if labels is not None:
            archive.writestr("dataset.json", labels if isinstance(labels, str) else json.dumps({"labels": labels}))
    return f"zip:{path}"


def write_folder(path, contents, labels=None):
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    if labels is not None:
        (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return f"folder:{path}"


def pngs(pixels=COLOUR):
    return dict(zip(names(len(pixels)), map(encode, pixels), strict=True))


def one_line(caught):
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_edm_layout_round_trip(tmp_path, write):
    pairs = list(zip(names(), LABELS, strict=True))
    spec = write(tmp_path / "set", pngs() | {"notes.txt": b"not an image"}, pairs[::-1])
    source = open_source(spec, image_size=(8, 10), channels=3)
    pixels, labels = source.read(np.array([5, 0, 0]))
    np.testing.assert_array_equal(pixels, COLOUR[[5, 0, 0]])
    assert labels.tolist() == [0, 4, 4] and labels.dtype == np.int32
    assert (len(source), source.image_shape, source.num_classes, source.spec) == (6, (8, 10, 3), 5, spec)
    again = pickle.loads(pickle.dumps(source))  # what a worker process is sent
    np.testing.assert_array_equal(again.read(np.arange(6))[0], COLOUR)


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_extensions_nesting_and_what_is_ignored(tmp_path, write):
    contents = {
        "b/deep/er/1.PNG": encode(COLOUR[0]),
        "a.WebP": encode(COLOUR[1], "WEBP", lossless=True),
        "c.JpEg": encode(np.full((8, 10, 3), 77, np.uint8), "JPEG"),
        "__MACOSX/._a.png": b"\0\5\x16\7",
        "b/.hidden.png": b"",
        "readme.md": b"",
    }
    source = open_source(write(tmp_path / "set", contents))
    pixels, labels = source.read(np.arange(3))
    np.testing.assert_array_equal(pixels, [COLOUR[1], COLOUR[0], np.full((8, 10, 3), 77)])  # in the order of names
    assert labels.tolist() == [-1] * 3 and source.num_classes == 0


def test_npz_round_trip(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "set.npz", images=np.asfortranarray(COLOUR), labels=np.array(LABELS))
        pixels, labels = open_source(f"npz:{tmp_path / 'set.npz'}", channels=3).read(np.arange(6))
        np.testing.assert_array_equal(pixels, COLOUR)
        assert labels.tolist() == LABELS
    np.savez(tmp_path / "grey.npz", COLOUR[..., 0])
    pixels, labels = open_source(f"npz:{tmp_path / 'grey.npz'}").read(np.arange(6))
    np.testing.assert_array_equal(pixels[..., 0], COLOUR[..., 0])
    assert labels.tolist() == [-1] * 6


def test_lmdb_round_trip(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(tmp_path / "church"), map_size=1 << 20)
    with environment, environment.begin(write=True) as transaction:
        for i in (3, 1, 0, 2):
            transaction.put(b"%040x" % i, encode(COLOUR[i], "WEBP", lossless=True))
    source = open_source(f"lmdb:{tmp_path / 'church'}", image_size=(8, 10))
    pixels, labels = pickle.loads(pickle.dumps(source)).read(np.array([2, 0, 3, 1]))
    np.testing.assert_array_equal(pixels, COLOUR[[2, 0, 3, 1]])  # in the order of keys
    assert labels.tolist() == [-1] * 4 and open_items(source.spec).name(2) == f"{2:040x}"
    records._environment.cache_clear()  # as in a new worker, all of whose threads open the database
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: source.read(np.array([i]))[0][0], [0, 1, 2, 3] * 20))
    np.testing.assert_array_equal(parts, np.tile(COLOUR[:4], (20, 1, 1, 1)))


def test_cifar10_round_trip(tmp_path):
    pixels = RANDOM.randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    records = [bytes([i % 10]) + pixels[i].transpose(2, 0, 1).tobytes() for i in range(12)]
    files = {f"data_batch_{i}.bin": records[2 * i - 2 : 2 * i] for i in range(1, 6)} | {"test_batch.bin": records[10:]}
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, parts in reversed(files.items()):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = sum(map(len, parts))
            archive.addfile(entry, io.BytesIO(b"".join(parts)))
            (tmp_path / name).write_bytes(b"".join(parts))
    for path in (tmp_path / "cifar-10-binary.tar.gz", tmp_path):
        found, labels = open_source(f"cifar10:{path}", image_size=32, channels=3).read(np.arange(10))
        np.testing.assert_array_equal(found, pixels[:10])
        assert labels.tolist() == list(range(10))
        np.testing.assert_array_equal(open_source(f"cifar10:{path}@test").read(np.arange(2))[0], pixels[10:])
    (tmp_path / "test_batch.bin").write_bytes(records[0][:-1])
    with pytest.raises(ValueError, match="not a multiple of 3073"):
        open_source(f"cifar10:{tmp_path}@test")
    with tarfile.open(tmp_path / "python.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"has no data_batch_1.bin; it must be cifar-10-binary"):
        open_source(f"cifar10:{tmp_path / 'python.tar.gz'}")


def test_arrayrecord_round_trip(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "set.arrayrecord"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for pixels in COLOUR:
        writer.write(encode(pixels))
    writer.close()
    source = open_source(f"arrayrecord:{path}")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(np.array([4, 1]))[0], COLOUR[[4, 1]])
    files = [(f"{i}.png", label, "") for i, label in enumerate(LABELS)]
    manifest.write(path, manifest.Manifest({}, (8, 10, 3), files, [], source.fingerprint))
    with pytest.raises(ValueError, match="changed since it was prepared"):  # the classes are part of what is hashed
        open_source(f"arrayrecord:{path}")


def test_tfds_round_trip():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=5):
        source = open_source("tfds:mnist", image_size=28, channels=1)
        pixels, labels = source.read(np.array([3, 1]))
        examples = tfds.data_source("mnist", split="train")
        np.testing.assert_array_equal(pixels, np.stack([examples[i]["image"] for i in (3, 1)]))
        assert labels.tolist() == [examples[i]["label"] for i in (3, 1)]
        assert (len(source), source.num_classes) == (5, 10)
        assert source.fingerprint != open_source("tfds:mnist@test").fingerprint
    with pytest.raises(ValueError, match="tfds build no_such_set --file_format=array_record") as caught:
        open_source("tfds:no_such_set")
    one_line(caught)


def test_nothing_imports_tensorflow(tmp_path):
    spec = write_zip(tmp_path / "set.zip", pngs())
    program = f"""
import sys, numpy as np
from warm_jax.data import augment, pipeline, sources
next(pipeline.batches(sources.open_source({spec!r}), seed=0, batch_size=2, memory_limit=0))
heavy = [m for m in ("tensorflow", "tensorflow_datasets", "torch", "lmdb", "matplotlib") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("package", ["lmdb", "tensorflow_datasets"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    spec, extra = ("tfds:mnist", "tfds") if package != "lmdb" else (f"lmdb:{tmp_path}", "lmdb")
    with pytest.raises(ValueError, match=rf"pip install 'warm_jax\[{extra}\]'") as caught:
        open_source(spec)
    one_line(caught)


def grey(mode):
    return Image.fromarray(COLOUR[0]).convert(mode)


def deep_rgb():
    # Pillow writes no 16-bit RGB: a PNG by hand, of one red pixel.
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">3H", 0xFFFF, 0x1234, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def odd_images():
    animated = io.BytesIO()
    grey("L").save(animated, "PNG", save_all=True, append_images=[grey("L").rotate(180)])
    wide = Image.new("1", (9000, 8000))
    return {
        "16-bit grey": (encode(Image.fromarray(np.arange(80, dtype=np.uint16).reshape(8, 10))), "more than 8 bits"),
        "16-bit RGB": (deep_rgb(), "more than 8 bits"),
        "CMYK": (encode(grey("CMYK"), "JPEG"), "colour mode CMYK"),
        "alpha": (encode(grey("RGBA")), "transparency"),
        "grey alpha": (encode(grey("LA")), "transparency"),
        "transparent palette": (encode(grey("P"), transparency=0), "transparency"),
        "animated": (animated.getvalue(), "animated"),
        "bomb": (encode(wide), "9000×8000 pixels, the limit is"),
        "empty": (b"", "not a readable PNG"),
        "text": (b"<html>404</html>", "not a readable PNG"),
        "gif": (encode(grey("P"), "GIF"), "not a readable PNG"),
        "truncated": (encode(COLOUR[0])[:-60], "not a readable PNG"),
        "truncated JPEG": (encode(COLOUR[0], "JPEG")[:-60], "not a readable PNG"),
    }


@pytest.mark.parametrize(("what", "write"), [(w, z) for w in odd_images() for z in (write_zip, write_folder)])
def test_odd_images_are_named_or_skipped(tmp_path, caplog, what, write):
    content, message = odd_images()[what]
    contents = pngs() | {"00000/img00000002.png": content}
    spec = write(tmp_path / "set", contents, list(zip(names(), LABELS, strict=True)))
    opened = []
    with pytest.raises(ValueError, match=message) as caught:
        opened.append(open_source(spec))
        opened[0].read(np.arange(6))
    assert "00000/img00000002.png" in one_line(caught)
    assert bool(opened) == what.startswith("truncated"), "what a header shows is found before"
    source = open_source(spec, on_error="skip")
    pixels, labels = source.read(np.arange(5))
    np.testing.assert_array_equal(pixels, np.delete(COLOUR, 2, axis=0))
    assert labels.tolist() == [4, 0, 1, 2, 0] and source.num_classes == 5
    assert len(source.skipped) == 1 and "img00000002.png" in source.skipped[0]
    assert source.fingerprint != open_items(spec).fingerprint
    assert "skipped 1 of 6 images" in caplog.text and "img00000002.png" in caplog.text


def test_what_expands_without_loss_is_read(tmp_path):
    palette = grey("P")
    contents = {"1.png": encode(grey("1")), "2.png": encode(grey("L")), "3.png": encode(palette)}
    items = open_items(write_zip(tmp_path / "a.zip", contents))
    pixels = [decoding.decode(items.get(i)[0], "") for i in range(3)]
    np.testing.assert_array_equal(pixels[0][..., 0], np.where(np.asarray(grey("1")), 255, 0))
    np.testing.assert_array_equal(pixels[1][..., 0], np.asarray(grey("L")))
    indices, colours = np.asarray(palette), np.array(palette.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(pixels[2], colours[indices])


def test_sizes_and_channels_that_differ(tmp_path, caplog):
    contents = pngs() | {"00001/img00000005.png": encode(COLOUR[5, :7])}
    spec = write_zip(tmp_path / "mixed.zip", contents)
    with pytest.raises(ValueError, match=r"img00000005.png: is 7×10 pixels, not 8×10 .*--mode=prepare"):
        open_source(spec)
    assert open_source(spec, on_error="skip").image_shape == (8, 10, 3)
    assert "7×10" in caplog.text
    with pytest.raises(ValueError, match=r"is 8×10 pixels, not 32×32 .*--mode=prepare --images=zip:"):
        open_source(spec, image_size=32)
    with pytest.raises(ValueError, match=r"has 3 channels, not 1 .*--mode=prepare"):
        open_source(spec, channels=1)
    with pytest.raises(ValueError, match=r"none of its 6 images can be read"):
        open_source(spec, channels=1, on_error="skip")
    grey = write_zip(tmp_path / "grey.zip", pngs(COLOUR[..., 0]))
    with pytest.raises(ValueError, match=r"has 1 channels, not 3 .*--mode=prepare"):
        open_source(grey, channels=3)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:/evil.png", "..\\evil.png"])
def test_a_path_outside_the_zip(tmp_path, name):
    with pytest.raises(ValueError, match="a path outside the zip"):
        open_source(write_zip(tmp_path / "evil.zip", pngs() | {name: encode(COLOUR[0])}))


def test_a_zip_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("zeros.png", "w") as entry:
        for _ in range(513):
            entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"zeros.png unpacks to \d+ bytes, the limit is"):
        open_source(f"zip:{path}")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("[1, 2", "dataset.json is not"),
        ("[1, 2]", "dataset.json is not"),
        ('{"classes": []}', "dataset.json is not"),
        ("[" * 100_000, "dataset.json is not"),
        ([[n, "cat"] for n in names()], "must be an integer"),
        ([[n, [0, 1]] for n in names()], "must be an integer"),
        ([[n, -1] for n in names()], "labels run from -1"),
        ([[n, 10**30] for n in names()], "beyond 64 bits"),
        ([[n, 1] for n in names()[1:]], "no class for 1 of 6 images"),
        ([[n, 1] for n in [*names(), "gone.png"]], "names 1 images that are not there, 'gone.png'"),
    ],
)
def test_labels_that_do_not_match(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(write_zip(tmp_path / "set.zip", pngs(), labels))
    one_line(caught)


def test_empty_missing_and_unreadable(tmp_path):
    for spec in (write_zip(tmp_path / "e.zip", {"notes.txt": b""}), write_folder(tmp_path / "e", {"notes.txt": b""})):
        with pytest.raises(ValueError, match="no images"):
            open_source(spec)
    for kind in ("zip", "folder", "npz", "idx", "arrayrecord", "cifar10", "lmdb"):
        with pytest.raises(FileNotFoundError):
            open_source(f"{kind}:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="use folder:"):
        open_source(f"zip:{tmp_path}")
    with pytest.raises(ValueError, match="not a readable LMDB"):
        open_source(f"lmdb:{tmp_path}")


def test_no_permission(tmp_path, monkeypatch):
    spec = write_zip(tmp_path / "set.zip", pngs())

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "set.zip"))

    monkeypatch.setattr("pathlib.Path.open", refuse)  # a test that runs as root can read everything
    with pytest.raises(PermissionError, match=r"set.zip"):
        open_source(spec)


def test_what_is_no_file_in_a_folder(tmp_path, monkeypatch):
    spec = write_folder(tmp_path / "set", pngs())
    os.mkfifo(tmp_path / "set" / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png: not a file"):
        open_source(spec)
    (tmp_path / "set" / "pipe.png").unlink()
    (tmp_path / "set" / "pipe.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"pipe.png: cannot be read .*repair the link.*data.on_error=skip"):
        open_source(spec)
    (tmp_path / "set" / "pipe.png").unlink()
    os.truncate(tmp_path / "set" / names()[3], decoding.MAX_BYTES + 1)  # sparse: it takes no room
    monkeypatch.setattr("warm_jax.data.files._HASHED_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"img00000003.png: has 536870913 bytes, the limit is"):
        open_source(spec).read(np.array([3]))


def test_npz_errors(tmp_path):
    path = tmp_path / "set.npz"
    for content, message in [
        ({"pictures": COLOUR}, "the images must be called images"),
        ({"images": COLOUR.astype(np.float32)}, "they must be uint8"),
        ({"images": COLOUR.transpose(0, 3, 1, 2)}, "they must be uint8"),
        ({"images": COLOUR, "labels": np.zeros(5, int)}, "5 labels for 6 images"),
        ({"images": COLOUR, "labels": np.zeros((6, 10), int)}, "one integer an image"),
        ({"images": COLOUR[:0]}, "no images"),
        ({"images": np.array([{}, 1], object)}, "never unpickled"),
    ]:
        np.savez(path, **content)
        with pytest.raises(ValueError, match=message) as caught:
            open_source(f"npz:{path}")
        one_line(caught)


def test_fingerprints(tmp_path):
    pairs = list(zip(names(), LABELS, strict=True))
    one = write_zip(tmp_path / "1.zip", pngs(), pairs)
    variants = [
        write_zip(tmp_path / "2.zip", pngs(COLOUR[::-1]), pairs),
        write_zip(tmp_path / "3.zip", pngs(), [*pairs[:-1], (names()[-1], 1)]),
        write_zip(tmp_path / "4.zip", pngs()),
        write_folder(tmp_path / "5", pngs(), pairs),
        write_folder(tmp_path / "6", pngs(COLOUR[::-1]), pairs),
    ]
    same = write_zip(tmp_path / "elsewhere.zip", dict(reversed(pngs().items())), pairs)
    assert open_source(one).fingerprint == open_source(same).fingerprint
    prints = [open_source(spec).fingerprint for spec in [one, *variants]]
    assert len(set(prints)) == 6
    manifest.write(tmp_path / "1.zip", manifest.Manifest({}, (8, 10, 3), [], [], prints[1]))
    with pytest.raises(ValueError, match=f"is {prints[0]}, its manifest says {prints[1]}"):
        open_source(one)


def test_both_protocols(tmp_path):
    source = open_source(write_zip(tmp_path / "set.zip", pngs()))
    assert isinstance(source, arrays.Source) and isinstance(source.items, arrays.Items)
    assert isinstance(open_source("bundled"), arrays.Source) and isinstance(open_items("bundled"), arrays.Items)


def test_an_orientation_to_apply_is_refused(tmp_path):
    """Pixels are read as they are stored: on its side. Which way is up is decided by `prepare`, once."""
    upright, turned, broken = Image.Exif(), Image.Exif(), b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"
    upright[0x0112], turned[0x0112] = 1, 6
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
        files = {f"{i}.{kind.lower()}": encode(COLOUR[i], kind, **options) for i in range(4)}
        files |= {f"5.{kind.lower()}": encode(COLOUR[5], kind, exif=upright, **options)}
        if kind == "JPEG":
            files["6.jpeg"] = encode(COLOUR[5], kind, exif=broken, **options)
        spec = write_folder(tmp_path / kind, files)
        open_source(spec).read(np.arange(len(files)))
        (tmp_path / kind / f"3.{kind.lower()}").write_bytes(encode(COLOUR[3], kind, exif=turned, **options))
        message = (
            rf"3.{kind.lower()}: is stored turned or mirrored \(EXIF orientation 6\).*--mode=prepare --images=folder:"
        )
        with pytest.raises(ValueError, match=message) as caught:
            open_source(spec, image_size=(8, 10)).read(np.arange(len(files)))
        one_line(caught)
        assert len(open_source(spec, on_error="skip")) == len(files) - 1


def test_linked_folders_and_broken_links(tmp_path, caplog):
    """Class folders behind links are read, circles are not walked, and what leads nowhere is named or skipped."""
    far, top = tmp_path / "far", tmp_path / "set"
    write_folder(far, {"x/1.png": encode(COLOUR[1]), "x/y/2.png": encode(COLOUR[2])})
    spec = write_folder(top, {"a/0.png": encode(COLOUR[0]), "notes.txt": b""})
    (top / "b").symlink_to(far / "x")
    (top / "a" / "again").symlink_to(top)
    (far / "x" / "y" / "up").symlink_to("..")
    source = open_source(spec)
    np.testing.assert_array_equal(source.read(np.arange(3))[0], COLOUR[:3])
    assert caplog.text.count("links to a folder that it lies in; left out") == 2
    before = source.fingerprint
    (top / "d").symlink_to(tmp_path / "unmounted")  # it may have been a class
    (top / "c.png").symlink_to("c.png")
    (top / "notes.md").symlink_to("nowhere")
    with pytest.raises(
        ValueError, match=r"c.png: cannot be read \(.*repair the link.*data.on_error=skip .*; and 1 more"
    ):
        open_source(spec)
    source = open_source(spec, on_error="skip")
    np.testing.assert_array_equal(source.read(np.arange(3))[0], COLOUR[:3])
    assert len(source.skipped) == 2 and "c.png" in source.skipped[0] and "set/d: cannot be read" in source.skipped[1]
    assert "skipped 2 of 5 images" in caplog.text and source.fingerprint != before


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    spec, whole = write_folder(tmp_path / "set", pngs()), pathlib.Path.read_bytes

    def refuse(path):
        if path.name == "img00000002.png":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # a test that runs as root can read everything
    with pytest.raises(ValueError, match=r"img00000002.png: cannot be read \(Permission denied\)"):
        open_source(spec)
    assert len(open_source(spec, on_error="skip")) == 5


def test_names_that_are_not_utf8(tmp_path):
    spec = write_folder(tmp_path / "set", pngs())
    os.rename(tmp_path / "set" / names()[2], os.fsencode(tmp_path / "set") + b"/00000/br\xe9.png")
    np.testing.assert_array_equal(open_source(spec).read(np.arange(6))[0], COLOUR[[2, 0, 1, 3, 4, 5]])
    assert open_items(spec).name(0) == r"00000/br\xe9.png"
    (tmp_path / "set" / os.fsdecode(b"00000/br\xe9.png")).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"br\\xe9.png: not a readable PNG") as caught:
        open_source(spec).read(np.arange(6))
    caught.value.args[0].encode("utf-8")


def test_bare_paths(tmp_path):
    """A kind is told by a file's ending, or by what lies in a folder; the source is the same as with it."""
    write_folder(tmp_path / "photos", pngs())
    write_zip(tmp_path / "set.ZIP", pngs())
    np.savez(tmp_path / "set.npz", images=COLOUR)
    for name, kind in (("photos", "folder"), ("set.ZIP", "zip"), ("set.npz", "npz")):
        path = tmp_path / name
        bare = open_source(str(path))
        assert bare.spec == f"{kind}:{path}" and bare.fingerprint == open_source(f"{kind}:{path}").fingerprint
    assert open_source(f"{tmp_path}/photos/").spec == f"folder:{tmp_path}/photos"
    with pytest.raises(FileNotFoundError, match=r"nowhere.zip"):
        open_source(str(tmp_path / "nowhere.zip"))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*must be one of bundled"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "one.png").write_bytes(encode(COLOUR[0]))
    with pytest.raises(ValueError, match=r"one.png: no kind of source is known by such a name"):
        open_source(str(tmp_path / "one.png"))
    with pytest.raises(ValueError, match=r"set.ZIP: is a file; .* leave out folder:"):
        open_source(f"folder:{tmp_path / 'set.ZIP'}")


def test_bare_paths_of_databases(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(tmp_path / "church"), map_size=1 << 20)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", encode(COLOUR[0]))
    assert open_source(str(tmp_path / "church")).spec == f"lmdb:{tmp_path / 'church'}"
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(
        b"\0\0\x08\x03" + struct.pack(">3I", 6, 8, 10) + COLOUR[..., 0].tobytes()
    )
    found, _ = open_source(str(tmp_path / "mnist")).read(np.arange(6))
    np.testing.assert_array_equal(found[..., 0], COLOUR[..., 0])


def test_the_command_that_prepares_is_one_that_can_be_typed(tmp_path, monkeypatch, capsys):
    """For a folder as it came: its size is the config's, and afterwards it can be trained on."""
    folder = tmp_path / "my photos"
    write_folder(folder, {f"{i}.jpg": encode(COLOUR[i], "JPEG") for i in range(3)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run once: python -m warm_jax --mode=prepare") as caught:
        open_source(str(folder), image_size=4, channels=1)
    command, _, rest = str(caught.value).partition("run once: ")[2].partition(" and then use ")
    asked = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command)[3:])
    assert asked.pop("mode") == "prepare" and rest.endswith("no classes (data.num_classes)")
    size, channels = int(asked.pop("image_size")), int(asked.pop("channels"))
    assert prepare.run(**asked, image_size=size, channels=channels, progress=False) == 0
    assert open_source(rest.partition(",")[0], image_size=4, channels=1).image_shape == (4, 4, 1)


def test_sizes_that_differ_where_none_is_wished(tmp_path, monkeypatch):
    """The first image's is nobody's wish, and so in no command: a usual one is, and both images are named."""
    shapes = [(70, 90), (102, 185), (80, 66)]
    photos = {f"{i}.png": encode(RANDOM.randint(0, 256, (*s, 3)).astype(np.uint8)) for i, s in enumerate(shapes)}
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", photos)
    with pytest.raises(ValueError, match=r"photos: 1.png: is 102×185 pixels, not 70×90 as 0.png; run once: ") as caught:
        open_source("photos")
    assert "--image_size=64 --out=data/photos-64x64.zip" in str(caught.value)
    assert "FILE.py" not in str(caught.value) and "--channels" not in str(caught.value)


def test_arrays_beyond_memory_or_packed_beyond_reason(tmp_path, monkeypatch):
    """Known from headers, before anything is unpacked."""
    monkeypatch.setattr(arrays, "_PACKED_LIMIT", 1 << 22)  # in place of 256 MiB, for a small file
    path, shape = tmp_path / "bomb.npz", (6, 1024, 1024, 1)
    np.savez_compressed(path, images=np.zeros(shape, np.uint8))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"unpacks from [\d,]+ to 6,291,456 bytes.*at most 100 to 1") as caught:
        open_source(f"npz:{path}")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    one_line(caught)
    noisy = np.tile(RANDOM.randint(0, 256, 6 << 14).astype(np.uint8), 64).reshape(shape)
    np.savez_compressed(path, images=noisy)
    assert len(open_source(f"npz:{path}")) == 6  # it is packed less
    content = b"\0\0\x08\x03" + struct.pack(">3I", *shape[:3]) + bytes(6 << 20)
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="to 6,291,456 bytes"):
        open_source(f"idx:{tmp_path / 'images-idx3-ubyte.gz'}")
    np.savez(tmp_path / "set.npz", images=COLOUR)
    monkeypatch.setattr(arrays, "free_memory", lambda: 1900)
    with pytest.raises(ValueError, match="takes 1,440 bytes of memory, 1,900 are free; use a zip of PNGs"):
        open_source(f"npz:{tmp_path / 'set.npz'}")


def test_free_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(arrays, "_CONTAINER", tmp_path)
    assert arrays.free_memory() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert arrays.free_memory() is None or arrays.free_memory() > 3000
