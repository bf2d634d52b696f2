"""What `prepare` writes, compared with Pillow called directly, and with itself after interruptions."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from warm_jax.data import manifest, prepare
from warm_jax.data.sources import open_source

RANDOM = np.random.RandomState(0)


def picture(height, width, seed=0):
    """Smooth colour, so that a resize is not all aliasing."""
    small = np.random.RandomState(seed).randint(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path, pictures, labels=None):
    contents = {f"{i:03d}.png": p if isinstance(p, bytes) else encode(p) for i, p in enumerate(pictures)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        if labels:
            archive.writestr("dataset.json", json.dumps({"labels": list(zip(contents, labels, strict=True))}))
    return f"zip:{path}"


def run(spec, out, **options):
    assert prepare.run(spec, str(out), progress=False, **options) == 0
    return open_source(("zip:" if out.suffix == ".zip" else "arrayrecord:") + str(out))


@pytest.mark.parametrize("suffix", [".zip", ".arrayrecord"])
def test_crop_and_resize_are_pillows(tmp_path, suffix):
    sizes = [(40, 60), (61, 33), (16, 16), (8, 12)]
    pictures = [picture(h, w, i) for i, (h, w) in enumerate(sizes)]
    source = run(write(tmp_path / "in.zip", pictures, [2, 0, 1, 1]), tmp_path / f"out{suffix}", image_size=16)
    pixels, labels = source.read(np.arange(4))
    for found, image, (h, w) in zip(pixels, pictures, sizes, strict=True):
        side = min(h, w)  # EDM's centre crop: rows (h - s)//2 … (h + s)//2
        square = np.asarray(image)[(h - side) // 2 : (h + side) // 2, (w - side) // 2 : (w + side) // 2]
        np.testing.assert_array_equal(
            found, np.asarray(Image.fromarray(square).resize((16, 16), Image.Resampling.LANCZOS))
        )
    assert labels.tolist() == [2, 0, 1, 1] and source.num_classes == 3


def test_lsun_church_from_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    pictures = {b"%040x" % i: picture(32, 48, i) for i in range(3)}
    environment = lmdb.open(str(tmp_path / "church_outdoor_train_lmdb"), map_size=1 << 20)
    with environment, environment.begin(write=True) as transaction:
        for name, image in pictures.items():
            transaction.put(name, encode(image, "WEBP", lossless=True))
    source = run(f"lmdb:{tmp_path / 'church_outdoor_train_lmdb'}", tmp_path / "out.zip", image_size=8, channels=3)
    for found, image in zip(source.read(np.arange(3))[0], pictures.values(), strict=True):
        square = image.crop((8, 0, 40, 32))
        np.testing.assert_array_equal(found, np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS)))


def test_edm_layout(tmp_path):
    pixels = RANDOM.randint(0, 256, (1005, 2, 2, 3)).astype(np.uint8)
    np.savez(tmp_path / "in.npz", images=pixels, labels=np.arange(1005) % 7)
    run(f"npz:{tmp_path / 'in.npz'}", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:  # as EDM's dataset_tool.py writes it
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        assert len(labels) == 1005 and labels["00001/img00001004.png"] == 1004 % 7
        for i in (0, 999, 1004):
            image = Image.open(io.BytesIO(archive.read(f"{i // 1000:05d}/img{i:08d}.png")))
            np.testing.assert_array_equal(np.asarray(image), pixels[i])


def test_colour_conversions(tmp_path):
    colour = picture(8, 8)
    rgba = colour.copy()
    rgba.putalpha(Image.fromarray(RANDOM.randint(0, 256, (8, 8)).astype(np.uint8)))
    deep = RANDOM.randint(0, 65536, (8, 8)).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    spec = write(
        tmp_path / "in.zip",
        [colour, colour.convert("L"), rgba, Image.fromarray(deep), encode(colour, exif=turned), colour.convert("P")],
    )
    found = run(spec, tmp_path / "rgb.zip", channels=3).read(np.arange(6))[0]
    np.testing.assert_array_equal(found[0], colour)
    np.testing.assert_array_equal(found[1], np.repeat(np.asarray(colour.convert("L"))[..., None], 3, axis=2))
    pixels = np.asarray(rgba).astype(float)
    over_white = pixels[..., :3] * pixels[..., 3:] / 255 + 255 - pixels[..., 3:]
    np.testing.assert_allclose(found[2], over_white, atol=1)
    np.testing.assert_array_equal(found[3], np.repeat(deep[..., None] // 256, 3, axis=2))
    np.testing.assert_array_equal(found[4], np.rot90(np.asarray(colour), -1))
    np.testing.assert_array_equal(found[5], colour.convert("P").convert("RGB"))
    found = run(spec, tmp_path / "grey.zip", channels=1).read(np.arange(6))[0]
    luma = np.asarray(colour).astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601
    np.testing.assert_allclose(found[0][..., 0], luma, atol=1)


@pytest.mark.parametrize("suffix", [".zip", ".arrayrecord"])
def test_grey_among_colour_becomes_rgb(tmp_path, suffix):
    """Where no channels are asked for; whichever comes first, and the manifest's hashes are of what is in the file."""
    pytest.importorskip("array_record") if suffix != ".zip" else None
    colour, grey = picture(8, 8), picture(8, 8, 1).convert("L")
    expected = [np.repeat(np.asarray(grey)[..., None], 3, axis=2), np.asarray(colour)]
    out = tmp_path / f"out{suffix}"
    found = run(write(tmp_path / "in.zip", [grey, colour, grey], [2, 0, 1]), out)
    pixels, labels = found.read(np.arange(3))
    np.testing.assert_array_equal(pixels, [expected[0], expected[1], expected[0]])
    described = manifest.read(out)
    assert labels.tolist() == [2, 0, 1] and described.image_shape == (8, 8, 3)
    assert [digest for _, _, digest in described.files] == [manifest.hash_pixels(image) for image in pixels]
    assert prepare.run(write(tmp_path / "in.zip", [grey, grey]), str(tmp_path / "grey.zip"), progress=False) == 0
    assert open_source(f"zip:{tmp_path / 'grey.zip'}").image_shape == (8, 8, 1)


def test_the_manifest_says_what_was_done(tmp_path):
    spec = write(tmp_path / "in.zip", [picture(8, 8, i) for i in range(3)], [0, 1, 0])
    for out in (tmp_path / "out.zip", tmp_path / "out.arrayrecord"):
        source = run(spec, out, image_size=(4, 8), channels=3)
        text = json.loads((tmp_path / f"{out.name}.manifest.json").read_text())
        assert text["count"] == 3 and text["image_shape"] == [4, 8, 3] and text["skipped"] == []
        assert text["settings"] == {
            **{"source": spec, "source_fingerprint": open_source(spec).fingerprint, "image_size": [4, 8]},
            **{"channels": 3, "crop": "center", "filter": "lanczos", "on_error": "raise"},
        }
        assert text["fingerprint"] == source.fingerprint
        described = manifest.read(out)
        pixels, labels = source.read(np.arange(3))
        assert [digest for _, _, digest in described.files] == [manifest.hash_pixels(p) for p in pixels]
        assert [label for _, label, _ in described.files] == labels.tolist() == [0, 1, 0]
    assert manifest.read(tmp_path / "out.zip").total == described.total  # whatever the container
    # A prepared file that changes afterwards is refused.
    write(tmp_path / "out.zip", [picture(4, 8, 9)])
    with pytest.raises(ValueError, match="changed since it was prepared"):
        open_source(f"zip:{tmp_path / 'out.zip'}")
    (tmp_path / "out.zip.manifest.json").write_text(json.dumps(text | {"total": "0"}))
    with pytest.raises(ValueError, match="broken manifest"):
        open_source(f"zip:{tmp_path / 'out.zip'}")


@pytest.mark.parametrize("suffix", [".zip", ".arrayrecord"])
def test_interrupted_is_uninterrupted(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(prepare, "CHUNK", 4)
    spec = write(tmp_path / "in.zip", [picture(8, 8, i) for i in range(18)], range(18))
    run(spec, tmp_path / f"whole{suffix}", image_size=4, workers=1)
    made, make = [], prepare._make

    def interrupted(items, index, settings):
        made.append(index)
        if index == stop_at:
            raise KeyboardInterrupt
        return make(items, index, settings)

    monkeypatch.setattr(prepare, "_make", interrupted)
    for place in (2, 9, 13):
        stop_at = place
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path / f"parts{suffix}", image_size=4, workers=2)
        assert not (tmp_path / f"parts{suffix}").exists()
    made.clear()
    stop_at = None
    run(spec, tmp_path / f"parts{suffix}", image_size=4, workers=3)
    assert min(made) == 12  # chunks that were finished are not done again
    one, other = tmp_path / f"whole{suffix}", tmp_path / f"parts{suffix}"
    assert one.read_bytes() == other.read_bytes()
    assert manifest.beside(one).read_bytes() == manifest.beside(other).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_again_and_otherwise(tmp_path, capsys, monkeypatch):
    spec = write(tmp_path / "in.zip", [picture(8, 8, i) for i in range(3)])
    run(spec, tmp_path / "out.zip", image_size=4)
    run(spec, tmp_path / "out.zip", image_size=4)
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "moved.zip").write_bytes((tmp_path / "in.zip").read_bytes())
    run(f"zip:{tmp_path / 'moved.zip'}", tmp_path / "out.zip", image_size=4)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="of other settings"):
        run(spec, tmp_path / "out.zip", image_size=8)
    monkeypatch.setattr(prepare, "_assemble", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "other.zip", image_size=4)
    with pytest.raises(ValueError, match=r"unfinished work of other settings \(image_size was \[4, 4\], is \[8, 8\]\)"):
        run(spec, tmp_path / "other.zip", image_size=8)


@pytest.mark.parametrize("suffix", [".zip", ".arrayrecord"])
def test_what_was_damaged_since_is_found(tmp_path, suffix, capsys):
    """A flipped bit in any image: when it is asked for again, and when it is read."""
    if suffix == ".arrayrecord":
        pytest.importorskip("array_record")
    spec = write(tmp_path / "in.zip", [picture(8, 8, i) for i in range(3)])
    out = tmp_path / f"out{suffix}"
    run(spec, out, image_size=4)
    whole, found = out.read_bytes(), 0
    places = [whole.index(b"IDAT", at) + 6 for at in [m.start() for m in re.finditer(b"\x89PNG", whole)]]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 8
        out.write_bytes(content)
        with pytest.raises(ValueError, match=rf"out{suffix} (was made .* damaged since|changed since it was prepared)"):
            run(spec, out, image_size=4)
        found += 1
        with pytest.raises(ValueError):
            open_source(f"{suffix[1:]}:{out}").read(np.arange(3))
    out.write_bytes(whole)
    run(spec, out, image_size=4)
    assert "and undamaged: nothing to do" in capsys.readouterr().out
    assert found == 3 or suffix != ".zip"


def test_broken_images(tmp_path, caplog):
    pictures = [picture(8, 8, 0), b"<html>", picture(8, 8, 2), encode(picture(8, 8, 3))[:-50]]
    spec = write(tmp_path / "in.zip", pictures, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"001.png: not a readable PNG.*data.on_error=skip"):
        run(spec, tmp_path / "out.zip", image_size=4)
    source = run(spec, tmp_path / "skip.zip", image_size=4, on_error="skip")
    assert source.read(np.arange(2))[1].tolist() == [0, 2]
    skipped = manifest.read(tmp_path / "skip.zip").skipped
    assert len(skipped) == 2 and "001.png" in skipped[0] and "003.png" in skipped[1]
    assert "skipped 2 of 4 images" in caplog.text
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        run(write(tmp_path / "none.zip", [b"x"]), tmp_path / "nothing.zip", on_error="skip")


def test_mixed_sizes_and_wrong_arguments(tmp_path):
    spec = write(tmp_path / "in.zip", [picture(8, 8), picture(8, 9)])
    with pytest.raises(ValueError, match=r"001.png is 8×9×3, those before it are 8×8×3; delete .*, and give --im"):
        run(spec, tmp_path / "out.zip")
    with pytest.raises(ValueError, match=r"001.png: 8×9 is not of the proportions 4×4"):
        run(spec, tmp_path / "none.zip", image_size=4, crop="none")
    for options, message in [
        ({"image_size": 0}, "must be a side"),
        ({"image_size": (8, 5000)}, "must be a side"),
        ({"channels": 2}, "channels is 2"),
        ({"crop": "left"}, "crop is 'left'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(spec, tmp_path / "out.zip", **options)
    with pytest.raises(ValueError, match=r"must end in .zip or .arrayrecord"):
        run(spec, tmp_path / "out.tar")


def test_a_damaged_chunk_is_made_again(tmp_path, monkeypatch):
    """A crash of the machine can leave a chunk that is not whole: the file is still that of an uninterrupted run."""
    rng = np.random.RandomState(0)
    np.savez(tmp_path / "in.npz", images=rng.randint(0, 256, (40, 6, 6, 3)).astype(np.uint8))
    spec = f"npz:{tmp_path / 'in.npz'}"
    monkeypatch.setattr(prepare, "CHUNK", 10)
    run(spec, tmp_path / "whole.zip")

    def cut_off(*arguments):
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(prepare, "_assemble", cut_off)
        run(spec, tmp_path / "out.zip")
    chunks = sorted((tmp_path / "out.zip.partial").glob("0*.zip"))
    assert len(chunks) == 4
    chunks[1].write_bytes(b"")
    chunks[2].write_bytes(chunks[2].read_bytes()[:500])
    run(spec, tmp_path / "out.zip")
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
