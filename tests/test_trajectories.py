"""The way of samples, as pictures: what is shown is what happened, and samples are the same with it and without."""

import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from PIL import Image

from warm_jax.diffusion import bnr, process, systems
from warm_jax.experiments import experiment, family
from warm_jax.runtime import mesh, pod
from warm_jax.sampling import batches, generate, trajectories
from warm_jax.training import train

pytestmark = pytest.mark.usefixtures("quick_compile")
STEPS = 4


def drawn(exp, **settings):
    """Four images by weights that are all drawn."""
    shapes = jax.eval_shape(exp.model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes)
    weights = jax.device_put(tiny.randomised(zeros, np.random.default_rng(0)), mesh.replicated(exp.mesh))
    return batches.Sampler(exp, batch_size=8, **settings)(weights, np.arange(4))


CASES = {
    "guided": {"sample__guidance": 2.0, "data__label_dropout": 0.1, "sample__clip": True},
    "stochastic": {"sample__solver": "stochastic", "sample__S_churn": 2.0},
    "multistep": {"sample__solver": "multistep", "sample__class_label": 3},
    "ddpm": {"system": "ddpm"},  # ancestral
    "ihdm": {"system": "ihdm"},
    "cold": {"system": "cold"},
}


_SLOW = ("stochastic", "multistep", "ddpm")  # of what has passed through the others already


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in _SLOW else ()) for c in CASES])
def test_samples_are_the_same_bytes_and_the_last_of_the_way(case):
    """For every kind of solver, on two devices."""
    changes = {"sample__steps": STEPS} | CASES[case]
    system = changes.pop("system", "warm")
    start = np.random.default_rng(0).normal(size=(8, 4, 4, 1)).astype(np.float32)
    exp = experiment.build(tiny.config(system, **changes), family.Measured(np.ones((28, 28)), start))
    exp = tiny.on_devices(tiny.with_network(exp, tiny.Linear(heads=exp.model.preconditioning.heads)), 2)
    plain, followed = drawn(exp), drawn(exp, trajectory=True)
    assert plain.trajectory is None and plain.images.std() > 1
    for name in ("images", "labels", "nfe"):
        np.testing.assert_array_equal(getattr(followed, name), getattr(plain, name))
    for which in followed.trajectory:
        assert which.shape == (4, STEPS + 1, 28, 28, 1)
        np.testing.assert_array_equal(which[:, -1], plain.images)
    assert len({state.tobytes() for state in followed.trajectory.states[0]}) > 2


def test_samples_of_a_unet_are_the_same_bytes():
    """In a batch that is padded, on two devices."""
    changes = {"model__channel_mult": (1,), "model__patch_size": 14, "sample__solver": "euler", "sample__steps": 3}
    exp = tiny.on_devices(experiment.build(tiny.config(**changes)), 2)
    plain, followed = drawn(exp), drawn(exp, trajectory=True)
    np.testing.assert_array_equal(followed.images, plain.images)
    assert plain.images.std() > 5


class Grey(nn.Module):
    """Says x0 = 0.3 everywhere: F = (D - c_skip x) / c_out with EDM's coefficients, σ_d = ½."""

    @nn.compact
    def __call__(self, x, condition, *rest, **labels):
        self.param("unused", nn.initializers.zeros, ())
        s = jnp.exp(4 * condition)[:, None, None, None]
        x = x * jnp.sqrt(s**2 + 0.25)
        return (0.3 - 0.25 / (s**2 + 0.25) * x) * jnp.sqrt(s**2 + 0.25) / (0.5 * s)


def test_states_are_those_of_the_closed_form_and_scaled():
    """Without blur, with x0 known to be g, x_j = g + s_j / s_0 (x_0 - g) exactly; shown over √(¼ + s²) / ½."""
    exp = tiny.build(Grey(), devices=1, sample__solver="euler", process__bnr=0.0)
    way = drawn(exp, trajectory=True).trajectory
    np.testing.assert_array_equal(way.clean, np.trunc(127.5 * 0.3 + 128))
    s = np.array([80.0, *(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in (1, 2, 3)), 0])
    s[1:4] **= 7
    key = jax.random.split(jax.random.key(2))[0]  # the start of seed 2: of the first half of its own key
    start = 80 * np.asarray(jax.random.normal(key, (28, 28, 1)), np.float64)
    states = 0.3 + (s / 80)[:, None, None, None] * (start - 0.3)
    shown = np.clip(127.5 * states * (0.5 / np.sqrt(0.25 + s**2))[:, None, None, None] + 128, 0, 255)
    assert np.abs(way.states[2] - shown).max() < 1 + 1e-3  # as bytes: rounded down
    assert np.mean(np.abs(way.states[2] - np.trunc(shown)) > 0) < 1e-3


def test_noise_is_shown_with_the_contrast_of_images():
    """Of the highest level: N(0, ½) clipped at ±1, whose variance is scipy's of a censored normal."""
    way = drawn(tiny.build(devices=1), trajectory=True).trajectory
    tail, inside = scipy.stats.norm.sf(2), scipy.stats.truncnorm(-2, 2, scale=0.5)
    expected = np.sqrt(2 * tail + (1 - 2 * tail) * inside.var())
    assert abs(way.states[:, 0].std() / 127.5 - expected) < 0.01


def test_scales():
    """0.5 / √(0.25 a₀² + s²): of a process without scale, a₀ = 1; of a variance-preserving one, a₀² + s² = 1."""
    warm = process.warm((8, 8, 1), bnr.constant(2.0))
    levels = np.array([80, 1, 0.002, 0], np.float32)
    expected = 0.5 / np.sqrt(0.25 + np.float64(levels) ** 2)
    np.testing.assert_allclose(trajectories.scales(warm, levels, 0.5), expected, rtol=1e-6)
    kept = systems.ddpm((8, 8, 1), "cosine")
    t = np.array([1, 0.5, 0], np.float32)
    s2 = np.asarray(kept.noise(jnp.asarray(t)), np.float64) ** 2
    np.testing.assert_allclose(trajectories.scales(kept, t, 0.3), 0.3 / np.sqrt(0.09 * (1 - s2) + s2), rtol=1e-5)
    for made, sigma_data in ((warm, 0.3), (kept, 0.7)):  # the sample, to the last bit
        assert trajectories.scales(made, np.zeros(1, np.float32), sigma_data) == 1


def test_what_is_said_of_levels():
    hot, warm = process.hot((8, 8, 1)), process.warm((8, 8, 1), bnr.constant(0.5))
    levels = np.array([80, 2.346, 0.00212, 0], np.float32)
    assert trajectories.captions(hot, levels) == {"noise": ["80", "2.35", "0.00212", "0"]}
    assert trajectories.captions(warm, levels)["blur"] == ["40", "1.17", "0.00106", "0"]
    scaled = systems.ddpm((8, 8, 1), "cosine")
    assert trajectories.captions(scaled, np.array([1, 0.5, 0], np.float32))["t"] == ["1", "0.5", "0"]


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(5, 48, [0, 1, 2, 3, 4]), (2, 10, [0, 1]), (10, 4, [0, 3, 6, 9]), (401, 3, [0, 200, 400])],
)
def test_levels_are_spread_evenly_with_both_ends(count, most, expected):
    assert trajectories.spread(count, most).tolist() == expected


def test_of_many_steps_some_are_kept():
    exp = tiny.build(devices=1, sample__solver="euler", sample__steps=100)
    draw = batches.Sampler(exp, batch_size=8, trajectory=True)
    assert len(draw.kept) == trajectories.FRAMES and draw.levels[draw.kept][[0, -1]].tolist() == [80, 0]
    followed = drawn(exp, trajectory=True)
    assert followed.trajectory.states.shape[1] == trajectories.FRAMES
    np.testing.assert_array_equal(followed.trajectory.states[:, -1], followed.images)


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("shape", "shown"), [((28, 28, 1), 2), ((16, 24, 3), 4), ((128, 64, 3), 1)])
def test_the_strip_and_the_animation(tmp_path, shape, shown):
    """Read back by Pillow: the images that went in, each pixel `shown` times, or means over squares of two."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 12, *shape), dtype=np.uint8)
    way = trajectories.Trajectory(noise, noise[::-1] // 2)
    p = process.warm(shape, bnr.constant(0.5))
    levels = p.levels(11).astype(np.float32)
    said = trajectories.write(tmp_path, np.array([5, 6, 7]), way, p, levels)
    assert "12 levels of 3 seeds" in said and not list(tmp_path.glob(".*"))
    strip = np.asarray(Image.open(tmp_path / "trajectory.png").convert("RGB"))

    def as_shown(image):
        image = image if shape[2] == 3 else image.repeat(3, -1)
        if shape[0] == 128:
            image = np.round(image.reshape(64, 2, 32, 2, 3).mean((1, 3)))
        return image.repeat(shown, 0).repeat(shown, 1)

    high, wide = as_shown(noise[0, 0]).shape[:2]
    top = len(strip) - 6 * (high + 6)  # three seeds, two rows each
    for row, (which, seed) in enumerate((w, s) for s in range(3) for w in way):
        for column, level in enumerate(np.round(np.linspace(0, 11, 10)).astype(int)):
            left = strip.shape[1] - (10 - column) * (wide + 2) + 2
            tile = strip[top + row * (high + 6) :][:high, left : left + wide]
            np.testing.assert_array_equal(tile, as_shown(which[seed, level]))
    assert (strip[:top] < 128).any() and (strip[:top, -wide:] < 128).any()  # levels are named, up to the last column

    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert animation.n_frames == 12 and animation.info["loop"] == 0  # for ever
        durations = []
        for level in range(12):
            animation.seek(level)
            durations.append(animation.info["duration"])
        last = np.asarray(animation.convert("RGB")).astype(int)
    assert durations == [250] * 11 + [2500]
    if shape[2] == 1:  # colours are 256 at most
        image = noise[0, 11].repeat(3, -1).repeat(3, 0).repeat(3, 1)  # 96 pixels wanted
        np.testing.assert_array_equal(last[18 : 18 + 84, :84], image)


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.config(train__steps=2, train__sample_every=0)
    assert train.train(tiny.with_network(train.prepare(config, folder), tiny.Linear()), final_grid=False) == 0
    return folder


def sample(workdir, out, trajectory, seeds="0-9", **changes):
    config = tiny.config(**{"train__steps": 2, "sample__batch_size": 8} | changes)
    drawing = generate.prepare(config, workdir, seeds, str(out), -1, trajectory=trajectory)
    return generate.sample(tiny.with_network(drawing, tiny.Linear()), trajectory)


def test_beside_the_same_samples(workdir, tmp_path, capsys):
    """Ten seeds in two batches."""
    assert sample(workdir, tmp_path / "plain", False) == sample(workdir, tmp_path / "followed", True) == 0
    assert "trajectory.png and trajectory.gif (5 levels of 10 seeds)" in capsys.readouterr().out
    plain, followed = (
        {path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("plain", "followed")
    )
    assert followed.keys() - plain.keys() == {"trajectory.png", "trajectory.gif"}
    assert all(followed[name] == content for name, content in plain.items())
    strip = np.asarray(Image.open(tmp_path / "followed" / "trajectory.png"))
    for seed in range(10):
        image = np.asarray(Image.open(tmp_path / "plain" / f"{seed:06d}.png")).repeat(2, 0).repeat(2, 1)
        for row in (2 * seed, 2 * seed + 1):
            top = len(strip) - (20 - row) * 62
            np.testing.assert_array_equal(strip[top : top + 56, -56:], image)

    assert sample(workdir, tmp_path / "plain", True) == 0  # also where all samples are there
    assert (tmp_path / "plain" / "trajectory.gif").read_bytes() == followed["trajectory.gif"]
    assert sample(workdir, tmp_path / "plain", False, sample__steps=3) == 0  # other samples: it is theirs no more
    assert not list((tmp_path / "plain").glob("trajectory.*"))
    assert sample(workdir, tmp_path / "some.npz", True, "0-2") == 0
    assert {path.name for path in tmp_path.glob("some*")} == {"some.npz", "some_trajectory.png", "some_trajectory.gif"}


def test_a_signal_leaves_no_half_trajectory(workdir, tmp_path, monkeypatch):
    """Also where all samples are there already: it is 75, and the same command makes it whole."""
    assert sample(workdir, tmp_path, False) == 0
    call = batches.Sampler.begin

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(batches.Sampler, "begin", interrupted)
        assert sample(workdir, tmp_path, True) == 75
    assert not list(tmp_path.glob("trajectory.*"))


def test_what_is_too_much_is_refused(workdir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"every state of 65 seeds; at most 64: name fewer, as --seeds=0-5"):
        sample(workdir, tmp_path / "out", True, "0-64")
    with pytest.raises(ValueError, match=r"2 × 5000 steps × 512 images of 784 numbers, 15.0 GiB; at most 8: lower"):
        sample(workdir, tmp_path / "out", True, sample__steps=5000, sample__batch_size=512)
    monkeypatch.setattr(pod, "count", lambda: 2)
    with pytest.raises(ValueError, match=r"one process, and here are 2; give --processes=1"):
        sample(workdir, tmp_path / "out", True)
    assert not (tmp_path / "out").exists()
