"""Guidance from the command's side: what is sampled, how often the network runs, and what cannot be guided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from warm_jax.diffusion import sampler
from warm_jax.runtime import workdirs
from warm_jax.sampling import batches, generate, runs, store
from warm_jax.training import train


def drawn(exp, weights, guide=None):
    return batches.Sampler(exp, batch_size=4, guide=guide)(weights, np.arange(4), np.array([1, 2, 3, 4]))


def randomised(exp, seed):
    return tiny.randomised(tiny.born(exp.model), np.random.default_rng(seed))


def test_guidance_by_no_class_is_the_formula():
    """sampler.sample of weak + w (strong - weak), written out here with the stand-in network's own predictions."""
    changes = {"sample__guidance": 2.5, "data__label_dropout": 0.1, "sample__solver": "euler"}
    exp = tiny.build(devices=1, **changes)
    weights = randomised(exp, 0)
    found = drawn(exp, weights)
    assert found.nfe == 2 * 4  # two networks at each of four steps
    one_hot = jax.nn.one_hot(jnp.array([1, 2, 3, 4]), 10)

    def predict(x, t):
        strong, weak = (exp.model.predict(weights, x, t, c) for c in (one_hot, jnp.zeros_like(one_hot)))
        return type(strong)(*(w + 2.5 * (s - w) for s, w in zip(strong, weak, strict=True)))

    keys = [jax.random.split(jax.random.key(seed))[0] for seed in range(4)]
    x = jnp.stack([80 * jax.random.normal(key, (28, 28, 1)) for key in keys])
    x, _ = sampler.sample(predict, exp.process, x, exp.process.levels(4).astype(np.float32), solver="euler")
    expected = np.clip(127.5 * np.asarray(x, np.float64) + 128, 0, 255).astype(np.uint8)
    assert np.abs(found.images.astype(int) - expected).max() <= 1
    plain = drawn(tiny.build(devices=1, **(changes | {"sample__guidance": 1.0})), weights)
    assert plain.nfe == 4 and np.any(plain.images != found.images)


def test_a_guide_that_is_the_model_itself_changes_nothing():
    changes = {"sample__solver": "euler", "sample__guidance": 3.0, "sample__guide": "elsewhere"}
    exp = tiny.build(devices=1, **changes)
    weights, other = randomised(exp, 0), randomised(exp, 1)
    plain = drawn(tiny.build(devices=1, sample__solver="euler"), weights).images.astype(int)
    assert np.abs(drawn(exp, (weights, weights), guide=exp).images.astype(int) - plain).max() <= 1
    assert np.any(drawn(exp, (weights, other), guide=exp).images != plain)
    np.testing.assert_array_equal(drawn(exp, weights).images, plain)  # a preview, drawn without the guide


def ends_of(exp, weights, guide=None):
    """Four samples as floats, and the evaluations."""
    draw = batches.Sampler(exp, batch_size=4, guide=guide)
    arguments = (weights, jnp.arange(4, dtype=jnp.uint32), jnp.arange(1, 5), jnp.asarray(draw.levels))
    (_, _, _, nfe), _, x, _ = jax.jit(lambda *given: draw._draw(*given, trajectory=False))(*arguments)
    return np.asarray(x), int(nfe)


def test_outside_its_interval_guidance_is_no_guidance():
    """Bit for bit, by no class and by another model. In it: what it costs more is counted where it is evaluated.

    Four steps of Heun's on EDM's grid look at 80 once, and at 7.5, 0.28 and 0.002 twice. The interval from the third
    level to the second holds the second alone.
    """
    plain = tiny.build(devices=1, data__label_dropout=0.1)
    weights, other = randomised(plain, 0), randomised(plain, 1)
    alone, evaluations = ends_of(plain, weights)
    assert evaluations == 7

    def guided(interval, guide=""):
        settings = {"sample__guidance": 3.0, "sample__guidance_interval": interval, "sample__guide": guide}
        exp = tiny.build(devices=1, data__label_dropout=0.1, **settings)
        return ends_of(exp, *(((weights, other), exp) if guide else (weights,)))

    for guide in ("", "elsewhere"):
        never, evaluations = guided((100, 200), guide)
        np.testing.assert_array_equal(never, alone)
        assert evaluations == 7
    levels = plain.process.levels(4)
    some, evaluations = guided((float(levels[2]), float(levels[1])))
    assert evaluations == 7 + 2 and np.abs(some - alone).max() > 0.01


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two checkpoints of a run with the stand-in network."""
    folder = tmp_path_factory.mktemp("guide")
    settings = {
        "train__steps": 4,
        "train__checkpoint_every": 2,
        "train__sample_every": 0,
        "model__channel_mult": (1, 1),
    }
    run = tiny.with_network(train.prepare(tiny.config(**settings), folder), tiny.Linear(heads=2))
    assert train.train(run, final_grid=False) == 0
    return folder


def prepare(workdir, tmp_path, **changes):
    return generate.prepare(tiny.config(**changes), workdir, "0-3", str(tmp_path / "out"), -1)


def test_an_earlier_checkpoint_guides(workdir, tmp_path):
    changes = {"sample__guidance": 1.5, "sample__guide": str(workdir), "sample__guide_checkpoint": 2}
    drawing = tiny.with_network(prepare(workdir, tmp_path, **changes), tiny.Linear(heads=2))
    run = drawing.run
    run.__dict__["guide"] = tiny.with_network(run.guide, tiny.Linear(heads=2))
    step, (own, guide) = runs.load_weights(run)
    assert step == 4 and np.any(own["gain"] != guide["gain"])
    assert runs.made_with(run, step, (own, guide)) != runs.made_with(run, step, (own, own))
    assert generate.sample(drawing) == 0 and len(store.drawn_images(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample__guidance": 2.0}, "never saw an image without its class"),
        ({"sample__guide": "x"}, "sample.guidance is 1, so it would do nothing"),
        ({"sample__guidance": 2.0, "sample__guide": "nowhere"}, "nowhere is no workdir of a run"),
        ({"sample__guidance": -1.0}, "sample.guidance is -1.0; it must be from 0 to 100"),
        ({"sample__guidance_interval": (5, 0.2)}, r"\(5, 0.2\); give two noise levels, the lower one first"),
        ({"sample__guidance_interval": (1, 1)}, "the lower one first"),
        ({"sample__guidance_interval": (0.2,)}, "give two noise levels"),
        ({"sample__guidance_interval": (-1, 2)}, "give two noise levels"),
        ({"sample__guidance_interval": (0.2, 5)}, "sample.guidance is 1, so it would do nothing"),
        (
            {"sample__guidance": 2.0, "sample__guidance_interval": (100, 200)},
            "none of the 4 levels lies in it: noise/signal goes from 80 to 0.002",
        ),
    ],
)
def test_what_cannot_guide_is_refused(workdir, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(workdir, tmp_path, **changes)


def test_a_weight_without_labels_is_refused(tmp_path):
    changes = {"data__num_classes": 0}
    run = tiny.with_network(train.prepare(tiny.config(train__steps=1, **changes), tmp_path), tiny.Linear(heads=2))
    assert train.train(run, final_grid=False) == 0
    with pytest.raises(ValueError, match="knows no classes to be guided by"):
        prepare(tmp_path, tmp_path, sample__guidance=2.0, **changes)


def test_a_single_class_guides_nothing(tmp_path):
    changes = {"data__num_classes": 1, "data__label_dropout": 0.1, "sample__guidance": 2.0}
    with pytest.raises(ValueError, match="knows one class only, which tells it nothing"):
        runs.check_request(tiny.config(**changes))


def test_a_guide_of_another_process_is_refused(workdir, tmp_path):
    own = tmp_path / "own"
    settings = {"process__bnr": 1.0, "train__steps": 1}
    run = tiny.with_network(train.prepare(tiny.config(**settings), own), tiny.Linear(heads=2))
    assert train.train(run, final_grid=False) == 0
    with pytest.raises(ValueError, match=r"process.bnr was 0.5 and is now 1.0"):
        prepare(own, tmp_path, sample__guidance=2.0, sample__guide=str(workdir), **settings)
    assert workdirs.load_config(workdir, tiny.config()).process.bnr == 0.5
