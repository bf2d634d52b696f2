"""What an earlier version left opens to the same bytes: a workdir, its samples, kept shards, averages, and an export.

`fixtures/workdir.tar.xz` was written by version 0.1.0 before its files were moved into rooms (commit 67cbc2a):

    configs/smoke.py, model.channels=4, model.channel_mult=(1,), train.steps=4, train.checkpoint_every=4,
    train.posthoc_every=2, train.posthoc_ema=(0.05,0.1), eval.count=20; then --mode=sample --seeds=0-3, evaluate, export

`hashes.json` in it has what that version read from it: sha256 of all numbers of each item.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from warm_jax.convert import bundle
from warm_jax.evaluation import evaluate, shards
from warm_jax.experiments import experiment, posthoc_ema
from warm_jax.runtime import checkpoint, workdirs
from warm_jax.sampling import batches, generate, runs
from warm_jax.training import step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fixture, unpacked."""
    to = tmp_path_factory.mktemp("earlier")
    with tarfile.open(pathlib.Path(__file__).with_name("fixtures") / "workdir.tar.xz") as archive:
        archive.extractall(to, filter="data")
    return to


@pytest.fixture(scope="module")
def config(folder):
    return workdirs.load_config(folder / "run")


@pytest.fixture
def no_sampling(monkeypatch):
    """Whatever would be drawn anew fails."""

    def refuse(self, *args):
        raise AssertionError("drawn anew")

    monkeypatch.setattr(batches.Sampler, "begin", refuse)
    monkeypatch.setattr(batches.Sampler, "compile", lambda *args: None)


def test_the_state_of_a_training(folder, config):
    expected = json.loads((folder / "hashes.json").read_text())
    exp = experiment.build(config)
    wanted = step.to_store(step.abstract_state(exp))
    number, items = checkpoint.Checkpoints(folder / "run" / "checkpoints", writable=False).restore_latest(**wanted)
    assert number == 4
    assert {name: runs.weights_hash(items[name]) for name in wanted} == {name: expected[name] for name in wanted}
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    made = posthoc_ema.reconstruct(folder / "run", posthoc_ema.plan(folder / "run", 4, 0.08), shapes)
    total = sum(np.abs(leaf).sum(dtype=np.float64) for leaf in jax.tree.leaves(made))
    assert total == pytest.approx(expected["averages_of_0.08_sum"], rel=1e-6)


def test_samples_are_kept(folder, config, no_sampling):
    samples = folder / "run" / "samples"
    before = {path.name: path.read_bytes() for path in samples.iterdir()}
    assert set(before) == {*(f"{seed:06d}.png" for seed in range(4)), "grid.png", "samples.json"}
    assert generate.sample(generate.prepare(config, folder / "run", "0-3", "", -1)) == 0
    assert {path.name: path.read_bytes() for path in samples.iterdir()} == before


def test_shards_are_kept(folder, config, no_sampling):
    [path] = (folder / "run" / "evaluations").glob("*/00000000-20.npz")
    with np.load(path) as stored:
        pool, pixels = stored["pool"], stored["pixels"]
    judging = evaluate.prepare(config, folder / "run", "", -1, "once", False)
    judged = shards.judge(judging, shards.Images(judging), 0, 20)
    np.testing.assert_array_equal(judged.pool, pool)
    np.testing.assert_array_equal(judged.pixels, pixels)


def test_an_export(folder):
    expected = json.loads((folder / "hashes.json").read_text())
    _, params, measured, _ = bundle.load(str(folder / "export"))
    assert runs.weights_hash(params) == expected["ema"]
    assert measured is None
