"""Archives, notes and rows on disk: what is read is what was written, or an error names the file."""

import json
import random

import jax
import numpy as np
import pytest
import tiny
from test_damage import flipped

from warm_jax.convert import bundle
from warm_jax.evaluation import reference
from warm_jax.metrics import moments
from warm_jax.runtime import jsonl, log, pictures, workdirs
from warm_jax.sampling import store
from warm_jax.weights import archives


def mutated(content, rng):
    """Cut off, with bytes changed, with a part twice or missing."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return rng.choice((content[:a], bytes(changed), content[:b] + content[a:], content[:a] + content[b:]))


# ── Archives ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_change_of_an_archive_is_silent(tmp_path):
    """Statistics, measured.npz: 600 mutations, of which those of the directory pass the zip's own sums."""
    rng = random.Random(0)
    features = np.random.RandomState(0).randn(9, 4)
    pixels = np.zeros((2, 3, 3, 1), np.uint8)
    kept = reference.Reference("x", moments.moments(features), moments.Provenance("e", "h"), features, pixels, features)
    reference.save(tmp_path / "s.npz", kept)
    workdirs.save_measured({"power": features}, tmp_path)
    whole, measured = reference.load(tmp_path / "s.npz"), workdirs.load_measured(tmp_path)
    np.testing.assert_array_equal(measured["power"], features)
    assert set(measured) == {"power"}  # the digest is no array of it
    refused = 0
    for name, read, same in (
        ("s.npz", lambda: reference.load(tmp_path / "s.npz"), whole),
        ("measured.npz", lambda: workdirs.load_measured(tmp_path), measured),
    ):
        content = (tmp_path / name).read_bytes()
        for number in range(300):
            (tmp_path / name).write_bytes(flipped(content, rng) if number % 2 else mutated(content, rng))
            try:
                jax.tree.map(np.testing.assert_array_equal, vars_of(read()), vars_of(same))
            except ValueError as error:
                assert name in str(error)
                refused += 1
        (tmp_path / name).write_bytes(content)
    assert refused > 400


def vars_of(found):
    return found if isinstance(found, dict) else {**vars(found), "moments": vars(found.moments), "provenance": None}


def test_an_archive_of_others_is_read_without_a_digest(tmp_path):
    np.savez(tmp_path / "old.npz", a=np.arange(3))
    assert archives.read_npz(tmp_path / "old.npz")["a"].tolist() == [0, 1, 2]


def test_a_damaged_partial_is_drawn_again(tmp_path, capsys):
    made, rng = {"seed": 1}, random.Random(0)
    seeds = np.arange(3)
    first = store.File(tmp_path / "a.npz", made)
    first.add(seeds, store.Samples(np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64), 1))
    first.pause()
    (partial,) = tmp_path.glob("*.partial.npz")
    assert not len(store.File(tmp_path / "a.npz", made).missing(seeds))
    content = partial.read_bytes()
    for _ in range(100):
        partial.write_bytes(mutated(content, rng))
        again = store.File(tmp_path / "a.npz", made)
        assert len(again.missing(seeds)) in (0, 3)
        if not len(again.missing(seeds)):
            assert not np.any([image for image, _ in again._done.values()])
    assert "a.npz.partial.npz is damaged" in capsys.readouterr().out


def test_no_flip_of_an_exports_description_is_silent(tmp_path):
    exp = tiny.build(devices=1)
    bundle.save(tmp_path, exp, tiny.born(exp.model), None, {"sampler": None, "origin": {"source": "x"}})
    path, rng, refused = tmp_path / bundle.MODEL, random.Random(0), 0
    content, whole = path.read_bytes(), bundle.read_about(tmp_path)
    for _ in range(200):
        path.write_bytes(flipped(content, rng))
        try:
            found = bundle.read_about(tmp_path)
            assert {key: found.get(key) for key in whole if key != "sha256"} == {
                key: value for key, value in whole.items() if key != "sha256"
            }
        except ValueError as error:
            assert "model.json" in str(error)
            refused += 1
    assert refused > 100


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("torn", [b"", b'{"a": 1}\n', b'{"a": 1}\n{"fd', b'{"fd', b"\xff\n", b'{"a": 1}'])
def test_rows_are_appended_on_lines_of_their_own(tmp_path, torn, capsys):
    path = tmp_path / "results.jsonl"
    path.write_bytes(torn)
    jsonl.append(path, {"b": "é"})
    jsonl.append(path, {"c": 3})
    rows = jsonl.read(path)
    assert rows == ([{"a": 1}] if torn.startswith(b'{"a"') else []) + [{"b": "é"}, {"c": 3}]
    said = capsys.readouterr().err
    damaged = {b'{"a": 1}\n{"fd': 2, b'{"fd': 1, b"\xff\n": 1}.get(torn)
    assert (f"{path}, line {damaged} is no row" in said) if damaged else not said
    assert jsonl.read(path, ("c",)) == [{"c": 3}] and jsonl.read(tmp_path / "none.jsonl") == []


def test_metrics_with_foreign_bytes_go_on(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xee\xff\n[1]\n{"step": "x"}\n{"step": 5}\n{"st')
    metrics = log.Log(tmp_path, 3)
    metrics.write(4, {"loss": float("nan")})
    metrics.close()
    lines = path.read_bytes().splitlines()
    assert lines == [b'{"step": 1}', b"\xee\xff", b"[1]", b'{"step": "x"}', b'{"step": 4, "loss": null}']
    assert f"{path}: no numbers of a step in line 2, 3, 4, 6" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff", b'{"seed": ', b"[" * 100_000, b"[]", b'{"a": "\xee"}'])
def test_damaged_notes_name_themselves(tmp_path, content):
    config = tiny.config()
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "data.json").write_bytes(content)
    for read in (lambda: workdirs.check_same(config, tmp_path, ("seed",)), lambda: workdirs.load_config(tmp_path)):
        with pytest.raises(ValueError, match=r"config\.json is not a config"):
            read()
    with pytest.raises(ValueError, match=r"data\.json is damaged .*; restore it, or remove it"):
        workdirs.seen_data(tmp_path)


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"a\.npz cannot be written: the disk is full \([\d,.]+ MiB are free there\); make"
    ):
        archives.write_npz(tmp_path / "a.npz", a=np.zeros(2))
    assert not list(tmp_path.iterdir())


# ── What is there already ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_image_is_drawn_again(tmp_path, capsys):
    """200 flips and 50 cuts of a PNG: it is missing, or the image that was drawn."""
    rng, made, seeds = random.Random(0), {"steps": 1}, np.arange(2)
    folder = store.Folder(tmp_path, made)
    folder.begin()
    images = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    folder.add(seeds, store.Samples(images, seeds, 1))
    folder.settle()
    path, redrawn = tmp_path / "000001.png", 0
    content = path.read_bytes()
    for number in range(250):
        path.write_bytes(flipped(content, rng) if number < 200 else content[: rng.randrange(len(content))])
        missing = store.Folder(tmp_path, made).missing(seeds).tolist()
        assert missing in ([], [1])
        if not missing:
            np.testing.assert_array_equal(pictures.load_png(path), images[1])
        redrawn += len(missing)
    assert redrawn > 200 and f"{path} is damaged; drawing it again" in capsys.readouterr().out


def test_samples_of_other_settings_stay_until_the_new_can_be_drawn(tmp_path):
    seeds, old = np.arange(2), store.Folder(tmp_path, {"steps": 1})
    old.begin()
    old.add(seeds, store.Samples(np.zeros((2, 2, 2, 1), np.uint8), seeds, 1))
    old.settle()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = store.Folder(tmp_path, {"steps": 2})
    assert len(new.missing(seeds)) == 2  # all are drawn anew
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    new.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"] and len(new.missing(seeds)) == 2
    assert json.loads((tmp_path / "samples.json").read_bytes()) == {"steps": 2}
