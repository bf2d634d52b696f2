"""The report on images whose statistics are known beforehand."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from warm_jax.analysis import inspection, spectra
from warm_jax.cli import flags
from warm_jax.data.sources import open_items
from warm_jax.diffusion import radial
from warm_jax.runtime import log


def encode(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def run(spec, folder, **options):
    assert inspection.run(spec, str(folder), progress=False, **options) == 0
    return json.loads((folder / "report.json").read_text())


def test_statistics(tmp_path, capsys):
    images = np.random.RandomState(0).randint(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    images[7] = images[3]
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(30) % 3)
    report = run(f"npz:{tmp_path / 'set.npz'}", tmp_path / "out")
    scaled = images / 127.5 - 1
    np.testing.assert_allclose(report["mean"], scaled.mean((0, 1, 2)))
    np.testing.assert_allclose(report["std"], scaled.std((0, 1, 2)))
    assert report["sigma_data"] == pytest.approx(scaled.std())
    assert report["classes"] == {"0": 10, "1": 10, "2": 10} and report["sizes"] == {"8×8": 30}
    assert report["duplicates"] == {"images_too_many": 1, "groups": [["image 3", "image 7"]]}
    assert report["count"] == report["readable"] == 30 and report["broken"] == report["to_prepare"] == []
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.size == (660, 198)  # three rows, a class each, of ten images of 8·8 pixels with a border of 2
    cell = np.asarray(sheet)[1:65, 1:65]
    np.testing.assert_array_equal(cell, images[0].repeat(8, axis=0).repeat(8, axis=1))
    assert f"sigma_data to use {scaled.std():.4f}" in capsys.readouterr().out


def test_spectrum_against_scipy_and_a_known_power_law(tmp_path, capsys):
    # Coefficients of variance k^-2 in scipy's DCT: an image whose spectrum is known.
    random, side = np.random.RandomState(1), 32
    radius = np.hypot(*np.indices((side, side)))
    coefficients = random.randn(200, side, side) / np.maximum(radius, 1)
    coefficients[:, 0, 0] = 0
    images = scipy.fft.idctn(coefficients, axes=(1, 2), norm="ortho")
    images = np.rint(np.clip(images * 127.5 + 127.5, 0, 255)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    items = open_items(f"npz:{tmp_path / 'set.npz'}")
    expected = (scipy.fft.dctn(images / 127.5 - 1, axes=(1, 2), norm="ortho") ** 2).mean(0)
    found = inspection.spectrum(items, list(range(200)), side)
    np.testing.assert_allclose(found.power, expected, rtol=1e-4, atol=1e-8)
    report = run(items.spec, tmp_path / "out")
    law = report["spectrum"]
    assert law["slope"] == pytest.approx(-2, abs=4 * law["slope_error"]) and law["slope_bands"] == [1, 16]
    assert law["slope_error"] < 0.03 and (law["images"], law["side"]) == (200, 32)
    assert f"spectrum          {law['told']}; spectrum.png" in capsys.readouterr().out
    lines = (tmp_path / "out" / "spectrum.csv").read_text().splitlines()
    assert lines[0] == "frequency,channel_power,standard_error" and len(lines) == 32
    for k in (1, 5, 31):
        ring = np.abs(radius - k) <= 0.5
        assert lines[k].split(",")[0] == str(k)
        assert float(lines[k].split(",")[1]) == pytest.approx(expected[ring].mean(), rel=1e-4)
    pytest.importorskip("matplotlib")
    assert Image.open(tmp_path / "out" / "spectrum.png").size == (720, 480)


def test_inspect_and_the_analysis_quote_one_slope(tmp_path):
    """Of colour images, whose luma has another: both are that of the channels' power, by scipy."""
    images = np.random.RandomState(3).randint(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    images[..., 1:] = images[..., 1:].mean(axis=1, keepdims=True)  # of two channels only what varies along one axis
    np.savez(tmp_path / "set.npz", images=images)
    law = run(f"npz:{tmp_path / 'set.npz'}", tmp_path / "out")["spectrum"]
    each = (scipy.fft.dctn(images / 127.5 - 1, axes=(1, 2), norm="ortho") ** 2).mean((0, -1))
    measured = spectra.measure([images])
    analysed = spectra.spectra(measured.power, (0.5,), (0.3,), covariance=measured.covariance)
    assert law["slope"] == pytest.approx(analysed.slope, abs=1e-6)
    assert law["slope"] == pytest.approx(radial.slope(each, 1, 6).value, abs=1e-4)
    luma = (scipy.fft.dctn((images / 127.5 - 1) @ [0.299, 0.587, 0.114], axes=(1, 2), norm="ortho") ** 2).mean(0)
    assert abs(law["slope"] - radial.slope(luma, 1, 6).value) > 0.05
    assert law["told"] == spectra.slope_in_words(analysed.law)


def test_pictures_stand_in_the_middle_of_their_cells(tmp_path):
    """Of 40×20, 20×40 and 30×30 pixels, drawn without enlarging; the rest of each cell is white."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, (width, height) in enumerate(((40, 20), (20, 40), (30, 31))):
            archive.writestr(f"{i}.png", encode(np.zeros((height, width, 3), np.uint8)))
    run(f"zip:{tmp_path / 'set.zip'}", tmp_path / "out")
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("L"))
    assert sheet.shape == (42, 3 * 42)
    for i, (width, height) in enumerate(((40, 20), (20, 40), (39, 40))):  # 30×31 is enlarged to 40 pixels
        rows, columns = np.nonzero(sheet[:, 42 * i : 42 * (i + 1)] < 128)
        left, right, top, bottom = columns.min(), 41 - columns.max(), rows.min(), 41 - rows.max()
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (width, height)
        assert right - left in (0, 1) and bottom - top in (0, 1)


def test_mixed_and_broken(tmp_path, monkeypatch, capsys):
    random = np.random.RandomState(2)
    contents = {
        "colour.png": encode(random.randint(0, 256, (20, 30, 3)).astype(np.uint8)),
        "grey.png": encode(random.randint(0, 256, (16, 16)).astype(np.uint8)),
        "alpha.png": encode(random.randint(0, 256, (16, 16, 4)).astype(np.uint8)),
        "deep.png": encode(random.randint(0, 256, (16, 16)).astype(np.uint16)),
        "broken.png": b"<html>",
    }
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "warm_jax.analysis.plots", raising=False)
    report = run(f"zip:{tmp_path / 'set.zip'}", tmp_path / "out")
    assert report["readable"] == 2 and len(report["mean"]) == 3
    assert len(report["broken"]) == 1 and "broken.png" in report["broken"][0]
    named = sorted(problem.split(":")[0] for problem in report["to_prepare"])
    assert named == ["alpha.png", "colour.png", "deep.png", "grey.png"]  # the readable ones are of two shapes
    assert "--image_size=32 --channels=3" in report["prepare"]
    assert report["sizes"] == {"16×16": 3, "20×30": 1} and report["spectrum"]["side"] == 16
    assert not (tmp_path / "out" / "spectrum.png").exists()
    assert "pip install 'warm_jax[plot]'" in capsys.readouterr().out


def test_many_sizes_and_orientations_are_to_prepare(tmp_path, capsys):
    """As a camera and the web give them: nothing of it can be trained on as it is."""
    folder, turned = tmp_path / "photos", Image.Exif()
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.full((64 + i, 80, 3), i, np.uint8)).save(folder / f"{i:02d}.png")
    report = run(str(folder), tmp_path / "out")  # a bare path
    assert len(report["to_prepare"]) == 40 and "there is no common size" in report["to_prepare"][7]
    said = capsys.readouterr().out
    assert f"--mode=prepare --images=folder:{folder} --image_size=64 --channels=3 --out=data/photos-64x64.zip" in said
    for i in range(40):
        (folder / f"{i:02d}.png").unlink()
    turned[0x0112] = 6
    for i in range(4):
        content = encode(np.full((40, 60), i, np.uint8), **({"exif": turned} if i == 2 else {}))
        (folder / f"{i}.png").write_bytes(content)
    report = run(str(folder), tmp_path / "again")
    assert report["to_prepare"] == ["2.png: is stored turned or mirrored (EXIF orientation 6)"]
    assert "--image_size=32 --channels=1" in report["prepare"]


def test_nothing_readable_and_a_limit(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("b.png", b"")
    report = run(f"zip:{tmp_path / 'set.zip'}", tmp_path / "out", limit=1)
    assert report["inspected"] == 1 and report["count"] == 2 and len(report["broken"]) == 1
    with pytest.raises(ValueError, match="at least 1"):
        run(f"zip:{tmp_path / 'set.zip'}", tmp_path / "out", limit=0)


def test_names_cannot_command_the_terminal(tmp_path, capsys):
    """ESC begins a colour, BEL rings, U+202E turns the line round; and the lock of whoever writes is no result."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/\x1b[31m\x07\u202eé.png", b"no image")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".writer.lock").write_text("{}")
    assert inspection.run(f"zip:{tmp_path / 'a.zip'}", str(tmp_path / "out"), progress=False) == 0
    said = capsys.readouterr().out
    assert r"a/\x1b[31m\x07\u202eé.png: not a readable" in said and "\x1b" not in said and "\u202e" not in said
    assert "written: report.json in" in said
    assert flags.fail(ValueError("a\x1b]0;title\x07\nb×"), 2) == 2
    assert capsys.readouterr().err == "error: a\\x1b]0;title\\x07 b×\n"
    log.warn("a\x1b[31m")
    log.say("b\x1b[31m\nc")
    assert capsys.readouterr() == ("b\\x1b[31m\nc\n", "WARNING: a\\x1b[31m\n")
