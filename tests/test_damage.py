"""Damage in checkpoints: what is restored is what was saved, or it is passed over or refused, and named."""

import collections
import json
import logging
import math
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_checkpoint import abstract, assert_restored, placed, restore, save, tree

from warm_jax.convert import from_edm
from warm_jax.runtime import checkpoint, digests, mesh
from warm_jax.sampling import runs


def flipped(content, rng):
    """With one bit changed."""
    at = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


# ── Digests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def words_by_hand(array):
    """Of an array's rows along its last axis: lists of its elements' own words, as Python's integers."""
    size = min(4, array.dtype.itemsize)
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    contents = [row.tobytes() for row in rows]
    width = rows.shape[1] * array.dtype.itemsize // size
    return width, [
        [int.from_bytes(content[i : i + size], "little") for i in range(0, len(content), size)] for content in contents
    ]


def g_by_hand(v, i):
    """MurmurHash3's finalizer, without its first shift, of a word and its number."""
    v = ((v ^ (i * 0x9E3779B1 % 2**32)) * 0x85EBCA6B) % 2**32
    v = ((v ^ (v >> 15)) * 0xC2B2AE35) % 2**32
    return v


def by_hand(array, version):
    """The formula with Python's integers, a word at a time."""
    array = np.asarray(array)
    width, rows = words_by_hand(array)
    if version == 1:
        sums = [[sum(row) % 2**32 for row in rows], [sum(row[k] for row in rows) % 2**32 for k in range(width)]]
        mixed = [[g_by_hand(v, i) for i, v in enumerate(half)] for half in sums]
        return [sum(g ^ (g >> 13) for g in half) % 2**32 for half in mixed]
    count = array.shape[-2] if array.ndim > 1 else 1
    period = max(1, min(count, 4096 // max(1, width)))
    period -= period % 2 == 0
    columns = []
    for first in range(0, math.prod(array.shape[:-2]) * count, count) if count else [0]:
        weighed = [(i % period * 0x3C6EF362 + 1, row) for i, row in enumerate(rows[first : first + count])]
        columns += [sum(a * row[k] for a, row in weighed) % 2**32 for k in range(width)]
    g = [g_by_hand(v, i) for i, v in enumerate(columns)]
    h = [((v ^ (v >> 16)) * 0x27D4EB2F) % 2**32 for v in g]
    return [sum(v ^ (v >> 13) for v in g) % 2**32, sum(v ^ (v >> 15) for v in h) % 2**32]


ARRAYS = [
    np.asarray(1.5, np.float32),
    np.arange(5, dtype=np.int32),
    np.random.RandomState(0).randn(3, 3, 4, 6).astype(np.float32),
    np.random.RandomState(1).randn(70, 2).astype(jnp.bfloat16),
    np.random.RandomState(2).randn(4, 3),
    np.arange(24, dtype=np.uint8).reshape(4, 6),
    np.arange(12).reshape(3, 4) % 3 == 0,
    np.zeros((0, 4), np.float32),
    np.zeros((1000, 300), np.float32),
    np.random.RandomState(3).randn(2, 40, 700).astype(np.float32),
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("array", ARRAYS, ids=[f"{array.dtype}{list(array.shape)}" for array in ARRAYS])
def test_a_digest_is_its_formula_on_host_and_devices(array, version):
    expected = by_hand(array, version)
    assert digests.of_host(array, version).tolist() == expected
    if array.ndim and array.dtype.itemsize <= 4:
        assert digests._on_devices(jnp.asarray(array), version).tolist() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_a_digest_is_the_same_however_the_array_lies(version):
    array = np.random.RandomState(0).randn(16, 24).astype(np.float32)
    devices = mesh.make_mesh(8)
    expected = digests.of_host(array, version).tolist()
    for axes in ((None, None), (("data",), None), (None, ("data",))):
        spec = jax.sharding.PartitionSpec(*(devices.axis_names if axis else None for axis in axes))
        lying = jax.device_put(array, jax.sharding.NamedSharding(devices, spec))
        assert digests._on_devices(lying, version).tolist() == expected
        assert digests.of_host(np.asarray(lying), version).tolist() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_every_bit_counts(version):
    """In an array of any shape each single flip changes both halves; what is swapped changes one at least."""
    array = np.random.RandomState(0).randn(7, 5).astype(np.float32)
    whole = digests.of_host(array, version)
    for at in range(array.nbytes * 8):
        content = bytearray(array.tobytes())
        content[at // 8] ^= 1 << at % 8
        assert (digests.of_host(np.frombuffer(content, np.float32).reshape(7, 5), version) != whole).all()
    for other in (array[::-1], array[:, ::-1], array[[1, 0, *range(2, 7)]], np.zeros_like(array)):
        assert (digests.of_host(other, version) != whole).any()


def test_pages_that_changed_places_count():
    """Of a convolution's kernel, whose rows are a quarter of a page: any two of its pages."""
    array = np.random.RandomState(0).randn(1, 1, 256, 256).astype(np.float32)
    whole, pages = digests.of_host(array), array.reshape(64, 1024)
    for one, other in ((0, 1), (3, 7), (0, 32), (16, 48)):
        swapped = pages.copy()
        swapped[[one, other]] = pages[[other, one]]
        assert (digests.of_host(swapped.reshape(array.shape)) != whole).all()


def test_no_array_is_gathered_on_one_device():
    """Of an array that lies in parts the compiled program sends sums alone."""
    devices = mesh.make_mesh(8)
    array = jnp.zeros((3, 3, 64, 128), jnp.float32)
    for spec in ((None, None, None, devices.axis_names), (None, None, devices.axis_names, None)):
        lying = jax.device_put(array, jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*spec)))
        text = digests._on_devices.lower(lying, digests.VERSION).compile().as_text()
        sent = re.findall(r"= \(?(?:[a-z]\w*\[([\d,]*)\])[^=]* all-(?:gather|to-all)[-\w]*\(", text)
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in sent]
        assert "all-reduce" in text and max(sizes, default=0) <= array.size // 64


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save(folder, [5, 10], devices=1)
    return folder


def test_no_flip_or_cut_is_silent(tmp_path, sound):
    """200 single bits and 50 truncations over all files of a checkpoint: seen, or without any effect."""
    folder, rng = shutil.copytree(sound, tmp_path / "c"), random.Random(0)
    files = sorted(path for path in (folder / "10").rglob("*") if path.is_file() and path.stat().st_size)
    reader, shapes, found = checkpoint.Checkpoints(folder, writable=False), abstract(1), collections.Counter()
    logging.disable(logging.CRITICAL)
    try:
        for number in range(250):
            path = files[number % len(files)]
            content = path.read_bytes()
            path.write_bytes(flipped(content, rng) if number % 5 else content[: rng.randrange(len(content))])
            try:
                assert_restored((10, reader.restore(10, train=shapes, ema=shapes)), 10)
                found["harmless"] += 1
            except ValueError as error:
                assert str(error).startswith(f"checkpoint 10 in {folder} cannot be read (item ")
                found["seen"] += 1
            path.write_bytes(content)
    finally:
        logging.disable(logging.NOTSET)
    assert found["seen"] > 50 and found["harmless"] > 50  # the rest is metadata that nothing depends on


def in_the_largest(folder):
    """XOR 0x10 at nine places of the file with the most numbers."""
    path = max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    for place in range(1, 10):
        content[place * len(content) // 10] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("item", ["train", "ema"])
def test_other_numbers_are_passed_over_and_refused_by_name(tmp_path, sound, caplog, item):
    """Whatever the storage makes of it: here another array lies in the place of the item."""
    folder = shutil.copytree(sound, tmp_path / "c")
    shutil.rmtree(folder / "10" / item)
    shutil.copytree(folder / "5" / item, folder / "10" / item)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert_restored(restore(folder), 5)
    said = f"checkpoint 10 in {folder} cannot be read (item {item}: b and 2 more are not what was saved)"
    assert f"{said}; trying the one before" in caplog.text
    with pytest.raises(ValueError, match="checkpoint 10 in .*item " + item):
        checkpoint.Checkpoints(folder, writable=False).restore(10, train=abstract(1), ema=abstract(1))


@pytest.mark.parametrize("damage", ["gone", "empty", "list", "other"])
def test_damaged_digests(tmp_path, sound, damage):
    """They are part of the checkpoint: without them nobody knows whether it is whole."""
    folder = shutil.copytree(sound, tmp_path / "c")
    path = folder / "10" / "digests"
    if damage == "gone":
        shutil.rmtree(path)
    else:
        (path / digests.FILE).write_text({"empty": "", "list": "[]", "other": "{}"}[damage], "utf-8")
    assert_restored(restore(folder), 5)


def test_a_checkpoint_without_digests_opens_with_a_note(tmp_path, sound, capsys):
    """As versions before wrote them."""
    folder = shutil.copytree(sound, tmp_path / "c")
    shutil.rmtree(folder / "10" / "digests")
    path = folder / "10" / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_bytes())
    stored["item_handlers"].pop("digests")
    path.write_text(json.dumps(stored), "utf-8")
    assert_restored(restore(folder), 10)
    said = capsys.readouterr().out
    assert said.count("note: checkpoint 10 in") == 1 and "no digests" in said


@pytest.mark.parametrize("damaged", [False, True])
def test_digests_of_the_first_version_still_count(tmp_path, sound, damaged):
    folder = shutil.copytree(sound, tmp_path / "c")
    path = folder / "10" / "digests" / digests.FILE
    assert all(
        value.startswith("2:") for item in json.loads(path.read_text("utf-8")).values() for value in item.values()
    )
    first = {
        item: {name: "".join(f"{half:08x}" for half in by_hand(array, 1)) for name, array in tree(seed).items()}
        for item, seed in (("train", 10 + damaged), ("ema", 1010))
    }
    path.write_text(json.dumps(first), "utf-8")
    assert_restored(restore(folder), 5 if damaged else 10)


def test_snapshots_have_digests_too(tmp_path):
    shapes, folder = abstract(1), tmp_path / "posthoc"
    snapshots = checkpoint.Checkpoints(folder, keep_last=None)
    for step in (2, 4):
        snapshots.save(step, None, None, (placed(tree(step), 1), placed(tree(100 + step), 1)), wait=True)
    snapshots.close()
    shutil.rmtree(folder / "4" / "averages")
    shutil.copytree(folder / "2" / "averages", folder / "4" / "averages")
    reader = checkpoint.Checkpoints(folder, writable=False)
    np.testing.assert_array_equal(reader.restore(2, averages=(shapes, shapes))["averages"][1]["b"], tree(102)["b"])
    with pytest.raises(ValueError, match=r"checkpoint 4 in .*item averages: 0/b and 5 more are not what was"):
        reader.restore(4, averages=(shapes, shapes))


def test_a_converted_workdir(tmp_path):
    """Its only checkpoint: refused, naming step and item, by all that use weights."""
    exp = tiny.build(devices=1)
    from_edm.save_workdir(exp, tiny.born(exp.model), tmp_path)
    run = runs.Run(exp, tmp_path, -1)
    assert runs.load_ema(run)[0] == 0
    in_the_largest(tmp_path / "checkpoints" / "0" / "ema")
    with pytest.raises(ValueError, match=r"none of the checkpoints \[0\] in .* can be read: checkpoint 0 .*item ema: "):
        runs.load_ema(run)
    with pytest.raises(ValueError, match=r"checkpoint 0 in .* cannot be read \(item ema: "):
        runs.load_ema(runs.Run(exp, tmp_path, 0))
