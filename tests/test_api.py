"""What `import warm_jax` offers to scripts and notebooks."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import warm_jax
from warm_jax.diffusion import sampler
from warm_jax.experiments import experiment
from warm_jax.runtime import checkpoint, pictures, workdirs
from warm_jax.sampling import generate


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def linear(monkeypatch):
    """Every experiment that is built has the stand-in network."""
    monkeypatch.setattr(experiment, "_network", lambda config, shape, around, two: tiny.Linear(heads=around.heads))


def save(workdir, config, rng):
    """A workdir with random weights in a checkpoint of step 3; the weights."""
    exp = experiment.build(config)
    weights = tiny.randomised(exp.model.init(jax.random.key(0)), rng)
    workdir.mkdir(exist_ok=True)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    checkpoints.save(3, {"step": jnp.zeros(())}, weights, wait=True)
    checkpoints.close()
    workdirs.save_config(config, workdir)
    return weights


def test_load_and_predict(linear, tmp_path, rng):
    weights = save(tmp_path, tiny.config(), rng)
    model = warm_jax.load(tmp_path)
    assert model.step == 3 and model.num_classes == 10
    x, t = jnp.asarray(rng.normal(size=(2, 28, 28, 1)), jnp.float32), jnp.asarray([0.5, 2.0])
    blurred, residual = model.predict(x, t, np.array([4, -1]))
    # EDM's preconditioning around the stand-in's formula, in float64; class -1 is told as no class at all.
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    s = np.array([0.5, 2.0]).reshape(2, 1, 1, 1)
    total = np.sqrt(0.25 + s**2)
    raw = w["gain"] * np.asarray(x) / total + w["level"] * np.log(s) / 4
    second = np.asarray(model.experiment.to_sample.preconditioning.conditions(t)[1]).reshape(2, 1, 1, 1)
    raw = raw + w["blur"] * second + np.stack([w["class"][4], 0 * w["class"][4]])[:, None, None]
    out = s * 0.5 / total
    np.testing.assert_allclose(blurred, 0.25 / total**2 * np.asarray(x) + out * raw[..., :1], atol=2e-5)
    np.testing.assert_allclose(residual, out * raw[..., 1:], atol=2e-5)


def test_samples_are_those_of_the_command(linear, tmp_path, rng):
    config = tiny.config()
    save(tmp_path, config, rng)
    generate.sample(generate.prepare(config, tmp_path, "0-2", "", -1))
    drawn = np.stack([pictures.load_png(tmp_path / "samples" / f"00000{seed}.png") for seed in range(3)])
    model = warm_jax.load(tmp_path)
    np.testing.assert_array_equal(warm_jax.sample(model, [2, 0]), drawn[[2, 0]])
    np.testing.assert_array_equal(
        warm_jax.sample(model, [1, 2], labels=[3, 5])[1], warm_jax.sample(model, [2], labels=5)[0]
    )


def test_the_class_that_the_config_names(linear, tmp_path, rng):
    save(tmp_path, tiny.config(sample__class_label=3), rng)
    model = warm_jax.load(tmp_path)
    by_label = warm_jax.sample(model, [5, 6], labels=np.int64(3))
    np.testing.assert_array_equal(warm_jax.sample(model, [5, 6]), by_label)
    assert not np.array_equal(warm_jax.sample(model, [5, 6], labels=4), by_label)


def test_other_settings(linear, tmp_path, rng):
    save(tmp_path, tiny.config("amortised"), rng)
    workdirs.save_measured({"power": np.ones((28, 28))}, tmp_path)
    model = warm_jax.load(tmp_path, bnr=2.0, solver="euler")
    beta = jnp.asarray([0.3, 7.0])
    np.testing.assert_allclose(model.process.blur(beta), [0.6, 14.0], rtol=1e-6)  # α = BNR · β
    x = model.process.prior(jax.random.key(0), (1, 28, 28, 1))
    levels = model.process.levels(3)
    assert sampler.sample(model.predict, model.process, x, levels, solver="euler")[1].nfe == 3
    np.testing.assert_allclose(model.sampled_with(bnr=0.5).process.blur(beta), [0.15, 3.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"step": 3}, "sample has no step; it has .*steps"),
        ({"bnr": 2.0}, "sample.bnr is 2.0.*trained at BNR 0.5"),
        ({"solver": "rk4"}, "'rk4'; choose one of heun"),
        ({"steps": 0}, "sample.steps is 0; it must be from 1"),
        ({"steps": "18"}, "wrong type"),
        ({"guide": "elsewhere", "guidance": 2.0}, "guided by another.*--mode=sample"),
    ],
)
def test_refused_settings(linear, tmp_path, rng, settings, named):
    save(tmp_path, tiny.config(), rng)
    with pytest.raises(ValueError, match=named):
        warm_jax.load(tmp_path, **settings)


def test_refused_requests(linear, tmp_path, rng):
    save(tmp_path, tiny.config(), rng)
    model = warm_jax.load(tmp_path)
    for seeds, labels, named in (
        ([], None, "at least one whole number"),
        ([-1], None, "0 to 2\\^32"),
        ([0], 10, "labels are 10; this model knows 10 classes"),
        ([0, 1], [1, 2, 3], "3 labels for 2 seeds"),
    ):
        with pytest.raises(ValueError, match=named):
            warm_jax.sample(model, seeds, labels=labels)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4"):
        warm_jax.load(tmp_path, checkpoint=4)
    with pytest.raises(FileNotFoundError, match="no workdir of a run"):
        warm_jax.load(tmp_path / "nowhere")


def test_the_names_cost_nothing_until_they_are_used():
    code = (
        "import sys, warm_jax; assert 'warm_jax.api' not in sys.modules and 'jax' not in sys.modules; "
        "warm_jax.load; assert 'warm_jax.api' in sys.modules; "
        "from warm_jax import evaluate, train; assert train.train and evaluate.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'fir'; it offers fit, load"):
        warm_jax.fir  # noqa: B018
