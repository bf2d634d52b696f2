"""Broken files of every format: each is read as it is, or answered with one line that names it; never a crash."""

import collections
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from warm_jax.data import prepare
from warm_jax.data.sources import open_source

RANDOM = np.random.RandomState(0)
PIXELS = RANDOM.randint(0, 256, (3, 12, 12, 3)).astype(np.uint8)
COUNTS = collections.Counter()


def encode(pixels, kind):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def zipped(kind, compression):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for i, pixels in enumerate(PIXELS):
            archive.writestr(f"{i}.{kind.lower()}", encode(pixels, kind))
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.{kind.lower()}", i] for i in range(3)]}))
    return stream.getvalue()


def saved(save):
    stream = io.BytesIO()
    save(stream, images=PIXELS, labels=np.arange(3))
    return stream.getvalue()


def cifar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for i in range(1, 6):
            entry = tarfile.TarInfo(f"data_batch_{i}.bin")
            entry.size = 3073
            archive.addfile(entry, io.BytesIO(bytes([i]) + RANDOM.bytes(3072)))
    return stream.getvalue()


def idx():
    return b"\0\0\x08\x04" + b"".join(n.to_bytes(4, "big") for n in PIXELS.shape) + PIXELS.tobytes()


def damaged(content, random):
    """Cut off, overwritten at its beginning or anywhere, with a piece missing, or nothing but noise."""
    data, how = bytearray(content), random.randint(6)
    where = random.randint(len(data))
    if how == 0:
        return bytes(data[:where])
    if how == 1:
        data[: random.randint(1, 40)] = random.bytes(random.randint(1, 40))
    elif how == 2:
        for place in random.randint(len(data), size=random.randint(1, 20)):
            data[place] = random.randint(256)
    elif how == 3:
        del data[where : where + random.randint(1, 200)]
    elif how == 4:
        data[random.randint(min(64, len(data)))] = 255
    else:
        return random.bytes(random.randint(0, 300))
    return bytes(data)


FORMATS = {
    "zip of PNG": ("zip", "set.zip", lambda: zipped("PNG", zipfile.ZIP_STORED)),
    "zip of JPEG": ("zip", "set.zip", lambda: zipped("JPEG", zipfile.ZIP_DEFLATED)),
    "npz": ("npz", "set.npz", lambda: saved(np.savez)),
    "compressed npz": ("npz", "set.npz", lambda: saved(np.savez_compressed)),
    "idx": ("idx", "images-idx4-ubyte", idx),
    "cifar10": ("cifar10", "cifar-10-binary.tar.gz", cifar),
    "PNG": ("folder", "set/0.png", lambda: encode(PIXELS[0], "PNG")),
    "JPEG": ("folder", "set/0.jpg", lambda: encode(PIXELS[0], "JPEG")),
    "WebP": ("folder", "set/0.webp", lambda: encode(PIXELS[0], "WEBP")),
    "dataset.json": ("folder", "set/dataset.json", lambda: b'{"labels": [["0.png", 1], ["1.png", 0]]}'),
}
CASES = 120


@pytest.mark.parametrize("what", FORMATS)
def test_damaged_files(tmp_path, what):
    kind, name, make = FORMATS[what]
    path, content, random = tmp_path / name, make(), np.random.RandomState(len(what))
    path.parent.mkdir(exist_ok=True)
    if name.endswith("json"):
        for i in range(2):
            (path.parent / f"{i}.png").write_bytes(encode(PIXELS[i], "PNG"))
    spec = f"{kind}:{path.parent if kind == 'folder' else path}"
    path.write_bytes(content)
    open_source(spec).read(np.arange(1))  # undamaged, it is read
    for _ in range(CASES):
        path.write_bytes(damaged(content, random))
        try:
            source = open_source(spec)
            images, labels = source.read(np.arange(len(source)))
            assert images.dtype == np.uint8 and images.shape == (len(source), *source.image_shape)
            assert labels.min() >= -1 and labels.max() < max(1, source.num_classes)
            COUNTS[what, "read"] += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(path.parent) in str(error), error
            COUNTS[what, "refused"] += 1
    assert COUNTS[what, "refused"] > CASES / 4


@pytest.mark.parametrize("what", ["zip", "deflated zip", "prepared zip", "npz", "compressed npz"])
def test_no_flipped_byte_is_silent(tmp_path, what):
    """Half of them in the directory, where no CRC is: the same images and classes as were written, or an error."""
    made = {
        "zip": lambda: zipped("PNG", zipfile.ZIP_STORED),
        "deflated zip": lambda: zipped("PNG", zipfile.ZIP_DEFLATED),
        "prepared zip": lambda: zipped("PNG", zipfile.ZIP_STORED),
        "npz": lambda: saved(np.savez),
        "compressed npz": lambda: saved(np.savez_compressed),
    }
    path = tmp_path / f"set.{what[-3:]}"
    path.write_bytes(made[what]())
    if what == "prepared zip":
        source, path = path, tmp_path / "prepared.zip"
        assert prepare.run(str(source), str(path), progress=False) == 0
    content, random = path.read_bytes(), np.random.RandomState(len(what))
    end = content.rindex(b"PK\5\6")
    directory = int.from_bytes(content[end + 16 : end + 20], "little")
    refused = 0
    for case in range(240):
        place = random.randint(directory if case % 2 else 0, len(content))
        data = bytearray(content)
        data[place] ^= random.randint(1, 256)
        path.write_bytes(data)
        try:
            source = open_source(f"{path.suffix[1:]}:{path}")
            images, labels = source.read(np.arange(len(source)))
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
            refused += 1
            continue
        np.testing.assert_array_equal(images, PIXELS)
        assert labels.tolist() == [0, 1, 2], (place, data[place])
    assert refused > 120


def test_a_manifest_notices_what_a_zip_cannot(tmp_path):
    """A whole zip of other classes in place of the prepared one, and a damaged manifest."""
    (tmp_path / "in.zip").write_bytes(zipped("PNG", zipfile.ZIP_STORED))
    out = tmp_path / "out.zip"
    assert prepare.run(f"zip:{tmp_path / 'in.zip'}", str(out), progress=False) == 0
    content, described = out.read_bytes(), (tmp_path / "out.zip.manifest.json").read_bytes()
    parts = {entry.filename: zipfile.ZipFile(out).read(entry) for entry in zipfile.ZipFile(out).infolist()}
    parts["dataset.json"] = parts["dataset.json"].replace(b", 0]", b", 2]")
    with zipfile.ZipFile(out, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(ValueError, match="changed since it was prepared"):
        open_source(f"zip:{out}")
    out.write_bytes(content)
    random = np.random.RandomState(0)
    for _ in range(200):
        data = bytearray(described)
        data[random.randint(len(data))] ^= random.randint(1, 256)
        (tmp_path / "out.zip.manifest.json").write_bytes(data)
        try:
            np.testing.assert_array_equal(open_source(f"zip:{out}").read(np.arange(3))[0], PIXELS)
        except ValueError as error:
            assert "manifest" in str(error)


def test_damaged_databases(tmp_path):
    """LMDB and ArrayRecord are read by C++: in a process of their own, so that a crash would be seen."""
    lmdb = pytest.importorskip("lmdb")
    module = pytest.importorskip("array_record.python.array_record_module")
    environment = lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 20)
    with environment, environment.begin(write=True) as transaction:
        for i in range(30):
            transaction.put(b"%d" % i, RANDOM.bytes(3000))
    writer = module.ArrayRecordWriter(str(tmp_path / "set"), "group_size:1")
    for pixels in PIXELS:
        writer.write(encode(pixels, "PNG"))
    writer.close()
    program = f"""
import pathlib, sys
import numpy as np
sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from test_fuzz import damaged
from warm_jax.data.sources import open_items
random = np.random.RandomState(0)
for kind, name, file, cases in [("lmdb", "lmdb", "lmdb/data.mdb", 30), ("arrayrecord", "set", "set", 60)]:
    spec, file = f"{{kind}}:{tmp_path}/{{name}}", pathlib.Path({str(tmp_path)!r}, file)
    content, counts = file.read_bytes(), {{"read": 0, "refused": 0}}
    for case in range(cases):
        # Of LMDB only what is cut off: nothing protects a memory map from pages that point astray.
        file.write_bytes(content[: random.randint(len(content))] if "lmdb" in spec else damaged(content, random))
        try:
            items = open_items(spec)
            for i in range(len(items)):
                items.get(i)
            counts["read"] += 1
        except (ValueError, OSError) as error:
            assert "\\n" not in str(error) and {str(tmp_path)!r} in str(error), error
            counts["refused"] += 1
    print(spec.split(":")[0], counts)
    file.write_bytes(content)
    assert len(open_items(spec))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)


def test_there_were_500_cases():
    if not COUNTS:
        pytest.skip("the damaged files ran in another process")
    print(dict(COUNTS))
    assert sum(COUNTS.values()) == CASES * len(FORMATS) >= 500
