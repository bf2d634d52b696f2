"""Checkpoints: what is kept, on which devices it opens, and what happens to damaged ones."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_jax.runtime import checkpoint, mesh


def tree(step):
    """Different numbers for each step, of several shapes and dtypes."""
    rng = np.random.RandomState(step)
    return {"w": rng.randn(64, 8).astype(np.float32), "b": rng.randn(3).astype(np.float32), "n": np.int32(step)}


def placed(values, devices):
    return jax.device_put(values, mesh.replicated(mesh.make_mesh(devices)))


def abstract(devices, values=None):
    sharding = mesh.replicated(mesh.make_mesh(devices))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, values or tree(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def save(folder, steps, devices=8, **options):
    """Checkpoints of `steps`: `tree(step)` as the optimiser's half, and `tree(1000 + step)` as the weights."""
    checkpoints = checkpoint.Checkpoints(folder, **{"keep_last": 99} | options)
    for step in steps:
        checkpoints.save(step, placed(tree(step), devices), placed(tree(1000 + step), devices))
    checkpoints.close()


def restore(folder, devices=8):
    shapes = abstract(devices)
    return checkpoint.Checkpoints(folder, writable=False).restore_latest(train=shapes, ema=shapes)


def assert_restored(found, step):
    assert found[0] == step
    for item, values in (("train", tree(step)), ("ema", tree(1000 + step))):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[1][item]), values)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, [8]),
        ({"keep_last": 2}, [8, 7]),
        ({"keep_last": 2, "keep_every": 3}, [8, 7, 6, 3]),
        ({"keep_last": 1, "keep_every": 4}, [8, 4]),
    ],
)
def test_which_are_kept(tmp_path, options, kept):
    save(tmp_path, range(1, 9), **options)
    assert checkpoint.Checkpoints(tmp_path, writable=False).steps() == kept
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize(("saved", "restored"), [(8, 1), (1, 8), (8, 8)])
def test_other_devices(tmp_path, saved, restored):
    save(tmp_path, [5], devices=saved)
    found = restore(tmp_path, devices=restored)
    assert_restored(found, 5)
    for leaf in jax.tree.leaves(found[1]):
        assert len(leaf.sharding.device_set) == restored


def test_one_item_alone(tmp_path):
    save(tmp_path, [5])
    items = checkpoint.Checkpoints(tmp_path, writable=False).restore(5, ema=abstract(8))
    assert set(items) == {"ema"}
    np.testing.assert_array_equal(items["ema"]["b"], tree(1005)["b"])


def test_saving_copies_first(tmp_path):
    """The training loop donates the arrays to the next step while they are being written."""
    state = placed(tree(1), 8)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    checkpoints.close()
    np.testing.assert_array_equal(restore(tmp_path)[1]["train"]["w"], tree(1)["w"])


def test_nothing_there(tmp_path):
    assert restore(tmp_path) is None
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoint.Checkpoints(folder, writable=False).steps() == []
    assert not (tmp_path / "missing").exists()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save(folder, [5, 10])
    return folder


FILES = (  # a pattern for each kind of file that a checkpoint needs
    *("_CHECKPOINT_METADATA", "*/_METADATA", "*/_sharding", "*/manifest.ocdbt", "*/d/*"),
    *("*/array_metadatas/*", "*/ocdbt.process_0/manifest.ocdbt", "*/ocdbt.process_0/d/*"),
)


def assert_whole_or_passed_over(folder, caplog):
    """Either the damage does not matter and all of step 10 is there, or it is step 5, with a warning."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        found = restore(folder)
    if found[0] == 10:
        assert_restored(found, 10)
    else:
        assert_restored(found, 5)
        assert "checkpoint 10 in" in caplog.text and "cannot be read" in caplog.text
    return found[0]


@pytest.mark.parametrize("item", ["train", "ema"])
@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_file(tmp_path, sound, caplog, item, pattern, kept):
    folder = shutil.copytree(sound, tmp_path / "checkpoints")
    files = sorted((folder / "10").glob(pattern.replace("*/", f"{item}/", 1)))
    assert files
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * kept)])
    step = assert_whole_or_passed_over(folder, caplog)
    if pattern in ("*/manifest.ocdbt", "*/d/*"):  # those hold or find the numbers
        assert step == 5


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "train", "ema", "train/d", "ema/manifest.ocdbt", "*"])
def test_something_missing(tmp_path, sound, caplog, name):
    folder = shutil.copytree(sound, tmp_path / "checkpoints")
    for path in list((folder / "10").glob(name)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    step = assert_whole_or_passed_over(folder, caplog)
    if name != "_CHECKPOINT_METADATA":
        assert step == 5


def test_cut_off_in_the_middle_of_saving(tmp_path, sound):
    """Orbax writes beside the place and renames: what it left there is no checkpoint."""
    folder = shutil.copytree(sound, tmp_path / "checkpoints")
    shutil.copytree(folder / "10", folder / "15.orbax-checkpoint-tmp")
    (folder / "20.orbax-checkpoint-tmp-12345").mkdir()
    (folder / "10" / "train.orbax-checkpoint-tmp").mkdir()
    assert_restored(restore(folder), 10)
    save(folder, [15, 20])  # and it is in nobody's way
    assert_restored(restore(folder), 20)


def test_all_damaged(tmp_path, sound):
    folder = shutil.copytree(sound, tmp_path / "checkpoints")
    for step in (5, 10):
        shutil.rmtree(folder / str(step) / "ema")
    with pytest.raises(
        ValueError, match=r"none of the checkpoints \[10, 5\] in .* can be read: .*; move the folder away"
    ):
        restore(folder)


def test_a_tree_of_another_shape_is_no_match(tmp_path, sound):
    other = abstract(8, {**tree(0), "w": np.zeros((65, 8), np.float32)})
    with pytest.raises(ValueError, match="none of the checkpoints"):
        checkpoint.Checkpoints(sound, writable=False).restore_latest(train=other, ema=other)


def test_set_aside_after(tmp_path):
    save(tmp_path, [5, 10, 15])
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=2)
    checkpoints.set_aside_after(5)
    checkpoints.save(10, placed(tree(10), 8), placed(tree(1010), 8))  # the way is free to save it again
    checkpoints.close()
    assert checkpoint.Checkpoints(tmp_path, writable=False).steps() == [10, 5]
    assert_restored(restore(tmp_path), 10)
