"""What `import warm_jax` offers to scripts and notebooks."""

import importlib.metadata
import importlib.resources
import os
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
    weights = tiny.randomised(tiny.born(exp.model), rng)
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
        ({"steps": "18"}, "sample has the wrong type"),
        ({"guide": "elsewhere", "guidance": 2.0}, r"is made by guided\(weight, by=MODEL\)"),
        ({"guidance": 2.0}, "data.label_dropout is 0"),
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
        "warm_jax.load; assert 'warm_jax.api' in sys.modules and 'warm_jax.restoration' not in sys.modules; "
        "from warm_jax.training import train; assert warm_jax.training.train is train"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'fir'; it offers Model, fit, load"):
        warm_jax.fir  # noqa: B018


def test_what_it_offers():
    assert {"Model", "fit", "load", "restorer", "sample", "score", "__version__"} <= set(dir(warm_jax))
    assert all(callable(getattr(warm_jax, name)) for name in warm_jax.__all__)
    assert warm_jax.__version__ == importlib.metadata.version("warm_jax")
    assert importlib.resources.files("warm_jax").joinpath("py.typed").is_file()


@pytest.fixture
def traces(monkeypatch):
    """The sampling loops that were traced, each as its number of levels and its batch."""
    seen, real = [], sampler.sample

    def counted(predict, p, x, levels, **more):
        seen.append((len(levels), len(x)))
        return real(predict, p, x, levels, **more)

    monkeypatch.setattr(sampler, "sample", counted)
    return seen


def test_the_second_call_traces_nothing(linear, tmp_path, rng, traces):
    save(tmp_path, tiny.config(), rng)
    model = warm_jax.load(tmp_path)
    first = warm_jax.sample(model, range(8))
    np.testing.assert_array_equal(warm_jax.sample(model, range(8), labels=None), first)
    warm_jax.sample(model, range(100, 108), labels=2)  # other seeds and classes are arguments
    assert traces == [(5, 8)]
    again = warm_jax.sample(model, range(8), steps=6)
    np.testing.assert_array_equal(warm_jax.sample(model, range(8), steps=6), again)
    np.testing.assert_array_equal(warm_jax.sample(model.sampled_with(steps=6), range(8)), again)
    assert traces == [(5, 8), (7, 8)]
    warm_jax.sample(model, range(8), steps=6, solver="euler")
    warm_jax.sample(model, range(16))
    assert len(traces) == 4, "what is compiled in is told apart"


def test_it_says_what_it_is_in_a_line(linear, tmp_path, rng):
    save(tmp_path, tiny.config(), rng)
    said = repr(warm_jax.load(tmp_path))
    assert said == f"Model({str(tmp_path)!r}, step 3: warm 28×28×1, 10 classes, {28 * 28 * 2 + 2 + 2 + 20:,} weights)"


def test_guided_by_another_model(linear, tmp_path, rng):
    """As `sample.guide` on the command line; of weight 0 the images are the guide's own."""
    for name in ("own", "weak"):
        save(tmp_path / name, tiny.config(), rng)
    model, weak = warm_jax.load(tmp_path / "own"), warm_jax.load(tmp_path / "weak")
    config = tiny.config(sample__guidance=1.5, sample__guide=str(tmp_path / "weak"))
    generate.sample(generate.prepare(config, tmp_path / "own", "0-2", "", -1))
    drawn = np.stack([pictures.load_png(tmp_path / "own" / "samples" / f"00000{seed}.png") for seed in range(3)])
    guided = model.guided(1.5, by=weak)
    np.testing.assert_array_equal(warm_jax.sample(guided, range(3)), drawn)
    assert not np.array_equal(warm_jax.sample(model, range(3)), drawn)
    np.testing.assert_array_equal(
        warm_jax.sample(model.guided(0.0, by=weak), range(3)), warm_jax.sample(weak, range(3))
    )
    steps = guided.sampled_with(steps=6)  # the guide stays, on the same levels
    assert steps.guide is not None and steps.guide.experiment.config.sample.steps == 6


def test_guided_by_what_does_not_fit(linear, tmp_path, rng):
    save(tmp_path / "own", tiny.config(), rng)
    save(tmp_path / "other", tiny.config(process__bnr=2.0), rng)
    model = warm_jax.load(tmp_path / "own")
    for weight, by, named in (
        (1.5, None, "data.label_dropout is 0"),
        (1.0, model, "sample.guidance is 1, so it would do nothing"),
        (1.5, warm_jax.load(tmp_path / "other"), "sample.guide must be of the same process"),
        (101.0, model, "sample.guidance is 101.0; it must be from 0 to 100"),
    ):
        with pytest.raises(ValueError, match=named):
            model.guided(weight, by=by)


def test_a_restorer_of_a_loaded_model(linear, tmp_path, rng):
    save(tmp_path, tiny.config("amortised"), rng)
    workdirs.save_measured({"power": np.ones((28, 28))}, tmp_path)
    image = rng.uniform(-1, 1, (28, 28, 1)).astype(np.float32)
    found = warm_jax.restorer(warm_jax.load(tmp_path))(image, 0.5, 0.2)
    np.testing.assert_array_equal(found, warm_jax.restorer(tmp_path)(image, 0.5, 0.2))
    t = jnp.asarray([0.2])
    model = warm_jax.load(tmp_path, bnr=2.5)  # D̂ + R̂ of the state at t = 0.2 of BNR 0.5 / 0.2
    np.testing.assert_allclose(found, sum(model.predict(jnp.asarray(image[None]), t))[0], atol=1e-5)


def test_a_script_has_the_commands_devices_and_cache(tmp_path):
    """In a process of its own; where JAX has looked at its devices first, nothing fails."""
    code = """
import os, sys, jax
from configs import smoke
from warm_jax import api
if sys.argv[1] == "late":
    jax.devices()
api._set_up(smoke.get_config())
print(jax.device_count(), jax.config.jax_compilation_cache_dir == os.path.expanduser("~/.cache/warm_jax/xla"))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS",)}
    cores = min(8, len(os.sched_getaffinity(0)))
    shared = max(n for n in range(1, cores + 1) if 16 % n == 0)  # of a batch of 16
    for when, devices in (("early", shared), ("late", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, when], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [str(devices), "True"]
