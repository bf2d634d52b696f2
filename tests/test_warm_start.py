"""Training that begins from hot weights: at step 0 it is the hot model, and what does not fit is said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from networks import jit

from warm_jax.convert import warm_start
from warm_jax.convert.from_edm import save_workdir
from warm_jax.diffusion import loss
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint
from warm_jax.training import step, train

# Small, but a patch holds several pixels, and each has both heads.
PLAIN = {
    "model__patch_size": 2,
    "model__channel_mult": (1,),
    "train__batch_size": 8,
}


def random_params(exp, seed=0):
    """Weights of the model's shapes, none zero."""
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def hot():
    exp = experiment.build(tiny.config("hot", **PLAIN))
    return exp, random_params(exp)


@pytest.fixture(scope="module")
def hot_workdir(hot, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "hot"
    workdir.mkdir()
    save_workdir(*hot, workdir)
    return workdir


def test_loss_at_step_0_is_the_hot_models(hot, key):
    """With blur in the inputs D̂ is what the hot network says of them and R̂ is 0; without, even the loss is the same."""
    exp, params = hot
    warm = experiment.build(tiny.config("amortised", **PLAIN, process__bnr_zero=1.0))
    widened = warm_start.widen(jax.eval_shape(warm.model.init, key), params, patch_size=2)
    labels = jnp.eye(10)[:8]
    x0 = jax.random.uniform(key, (8, 28, 28, 1), minval=-1)

    def evaluator(model):
        def evaluate(weights, example, ratio):
            at = model.of(model.process.follow(lambda beta: ratio * beta)) if model.process.follow else model
            found = at.predict(weights, example.x, example.t, labels)
            return found, *loss.two_head(lambda x, t: found, example, at.preconditioning.weight)

        return jit(evaluate)

    of_hot, of_warm = evaluator(exp.model), evaluator(warm.model)
    sharp = loss.draw(exp.process, key, x0)
    np.testing.assert_array_equal(loss.draw(warm.process, key, x0).x, sharp.x)  # the same draw, whoever makes it
    expected, found = of_hot(params, sharp, 0.0), of_warm(widened, sharp, 0.0)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    np.testing.assert_allclose(found[0].blurred, expected[0].blurred, atol=1e-5)
    assert not np.asarray(found[0].residual).any() and float(expected[1]) > 0.1
    assert found[2].residual.max() < 1e-6 * found[2].blurred.min()  # its target is 0 but for rounding
    blurred = loss.draw(warm.process.follow(lambda beta: 2 * beta), key, x0)
    expected, found = of_hot(params, blurred, 0.0), of_warm(widened, blurred, 2.0)
    np.testing.assert_allclose(found[0].blurred, expected[0].blurred, atol=1e-5)
    assert not np.asarray(found[0].residual).any() and np.abs(blurred.x - sharp.x).max() > 0.1


def test_a_training_begins_there_and_says_so(hot, hot_workdir, tmp_path, capsys, monkeypatch):
    def init_state(exp):  # takes long to compile, and here no number of it may be left
        return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), step.abstract_state(exp))

    monkeypatch.setattr(train, "init_state", init_state)
    (hot_workdir / "origin.json").write_text(json.dumps({"source": "x.pkl", "licence": "not for sale"}))
    config, workdir = tiny.config("warm", **PLAIN), tmp_path / "run"
    run = tiny.on_devices(train.prepare(config, workdir, str(hot_workdir)), 1)
    state = train._restore(run, checkpoint.Checkpoints(workdir / "checkpoints"))
    said = capsys.readouterr().out
    assert f"beginning from the weights of step 0 in {hot_workdir}" in said and "licence: not for sale" in said
    for tree in (state.params, state.ema):
        flat = {"/".join(e.key for e in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(hot[1]):
            name = "/".join(e.key for e in path)
            mine = flat.pop(name)
            if name.startswith("out_conv/"):  # 4 pixels of a patch, one channel, two heads
                mine = np.asarray(mine).reshape(*leaf.shape[:-1], 4, 2)
                assert not mine[..., 1].any()
                mine = mine[..., 0]
            np.testing.assert_array_equal(mine, leaf)
        assert flat.keys() == {"map_second/kernel"} and not flat["map_second/kernel"].any()
    note = json.loads((workdir / "init.json").read_text())
    assert note["workdir"] == str(hot_workdir) and note["licence"] == "not for sale"
    # Cut off before its first checkpoint, it begins anew from the same, and from nothing else.
    with pytest.raises(ValueError, match=r"began from the weights in .*hot; give --init_from="):
        train.prepare(config, workdir)
    with pytest.raises(ValueError, match=r"began from the weights in .*hot; give --init_from="):
        train.prepare(config, workdir, str(tmp_path / "other"))
    (workdir / "init.json").write_text(json.dumps(note | {"weights": "0" * 64}))
    with pytest.raises(ValueError, match="has other weights than"):
        warm_start.weights(run.experiment, run.begins_from, workdir, state.params)


def test_a_run_that_has_begun_remembers(hot_workdir, tmp_path, capsys):
    config, workdir = tiny.config("warm", **PLAIN), tmp_path / "run"
    note = {"workdir": str(hot_workdir), "checkpoint_step": 0, "weights": ""}
    workdir.mkdir()
    (workdir / "init.json").write_text(json.dumps(note))
    assert warm_start.prepare(config, workdir, "", begun=True) is None
    assert "goes on" not in capsys.readouterr().out
    assert warm_start.prepare(config, workdir, str(hot_workdir), begun=True) is None
    assert "it goes on from its own checkpoint" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"began from the weights in .*hot; leave --init_from out"):
        warm_start.prepare(config, workdir, str(tmp_path), begun=True)
    (workdir / "init.json").unlink()
    with pytest.raises(ValueError, match="began from random weights; leave --init_from out"):
        warm_start.prepare(config, workdir, str(hot_workdir), begun=True)
    for damaged in ("{", "[]", '{"workdir": "x"}'):
        (workdir / "init.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"init\.json is damaged"):
            warm_start.prepare(config, workdir, "", begun=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__channels": 16}, r"do not fit this network: dec_14x14_block0/affine/bias is \(8,\) there and \(16,\)"),
        ({"model__num_blocks": 2}, r"block2/affine/bias is missing there and \(8,\) here.*; and \d+ more"),
        ({"data__num_classes": 0}, r"map_label/bias is \(8,\) there and not wanted here"),
        ({"model__architecture": "ncsnpp"}, "model.architecture is 'ddpmpp' there and 'ncsnpp' here"),
        ({"model__sigma_data": 1.0}, "model.sigma_data is 0.5 there and 1.0 here"),
        ({"model__preconditioning": "clean"}, "model.preconditioning is 'edm' there and 'clean' here"),
    ],
)
def test_what_does_not_fit_is_listed(hot_workdir, tmp_path, changes, message):
    config = tiny.config("warm", **PLAIN | changes)
    with pytest.raises(ValueError, match=message):
        warm_start.prepare(config, tmp_path, str(hot_workdir), begun=False)


def test_other_wrong_beginnings(hot_workdir, tmp_path):
    config = tiny.config("warm", **PLAIN)
    with pytest.raises(FileNotFoundError, match="no workdir of a run"):
        warm_start.prepare(config, tmp_path, str(tmp_path / "nowhere"), begun=False)
    (hot_workdir / "origin.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be trained on in place; .*--init_from="):
        train.prepare(config, hot_workdir)
