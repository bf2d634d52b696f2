"""The report on images whose statistics are known beforehand."""

import io
import json
import sys
import zipfile

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from warm_jax.analysis import inspection
from warm_jax.data.sources import open_items


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


def test_spectrum_against_scipy_and_a_known_power_law(tmp_path):
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
    np.testing.assert_allclose(inspection.spectrum(items, list(range(200)), side), expected, rtol=1e-4, atol=1e-8)
    report = run(items.spec, tmp_path / "out")
    assert report["spectrum"]["slopes"]["1-8"] == pytest.approx(-2, abs=0.1)
    lines = (tmp_path / "out" / "spectrum.csv").read_text().splitlines()
    assert lines[0] == "frequency,power" and len(lines) == 32
    for k in (1, 5, 31):
        ring = np.abs(radius - k) <= 0.5
        assert lines[k].split(",")[0] == str(k)
        assert float(lines[k].split(",")[1]) == pytest.approx(expected[ring].mean(), rel=1e-4)
    pytest.importorskip("matplotlib")
    assert Image.open(tmp_path / "out" / "spectrum.png").size == (720, 480)


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
    assert sorted(problem.split(":")[0] for problem in report["to_prepare"]) == ["alpha.png", "deep.png"]
    assert report["sizes"] == {"16×16": 3, "20×30": 1} and report["spectrum"]["side"] == 16
    assert not (tmp_path / "out" / "spectrum.png").exists()
    assert "pip install 'warm_jax[plot]'" in capsys.readouterr().out


def test_nothing_readable_and_a_limit(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("b.png", b"")
    report = run(f"zip:{tmp_path / 'set.zip'}", tmp_path / "out", limit=1)
    assert report["inspected"] == 1 and report["count"] == 2 and len(report["broken"]) == 1
    with pytest.raises(ValueError, match="at least 1"):
        run(f"zip:{tmp_path / 'set.zip'}", tmp_path / "out", limit=0)
