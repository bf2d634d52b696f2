"""Levels by information: equal in each step, by the closed form of Gaussian images in numpy float64."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.stats
import tiny

from warm_jax.data import sources
from warm_jax.diffusion import bnr, information, process, systems
from warm_jax.experiments import experiment, family
from warm_jax.sampling import runs

SHAPE, POWER = dense.SHAPE, dense.POWER


def nats(a, s):
    """Σ_f ½ ln(1 + P a² / s²)."""
    return 0.5 * np.sum(np.log1p(POWER * a**2 / s**2))


def of(name, t):
    """I at t from the papers' own a and s."""
    if name == "warm":
        return nats(dense.gauss(0.5 * t), t)
    alpha_bar = dense.cosine_alpha_bar(t)
    return nats(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


PROCESSES = {
    "warm": process.warm(SHAPE, bnr.constant(0.5)),
    "cosine": systems.ddpm(SHAPE, "cosine"),
}


@pytest.mark.parametrize("name", ["warm", "cosine"])
def test_each_step_removes_the_same_information(name):
    p, n = PROCESSES[name], 12
    levels = information.grid(p, POWER)(n)
    own = p.levels(1000)
    assert levels.shape == (n + 1,) and levels[-1] == 0 and np.all(np.diff(levels) < 0)
    np.testing.assert_allclose(levels[[0, -2]], own[[0, -2]], rtol=1e-6)
    steps = np.diff([of(name, t) for t in levels[:-1]])
    np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)


def test_levels_of_training_are_uniform_in_information(key):
    p = PROCESSES["warm"]
    t = np.asarray(jax.jit(information.uniform(p, POWER), static_argnums=1)(key, 4000), np.float64)
    low, high = of("warm", 80.0), of("warm", 0.002)
    share = (np.array([of("warm", one) for one in t]) - low) / (high - low)
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-3


def test_a_config_chooses_them():
    power = np.linspace(2, 0.01, 28 * 28).reshape(28, 28)
    made = experiment.build(
        tiny.config(sample__levels="information", train__levels="information"), family.Measured(power)
    )
    expected = information.grid(process.warm((28, 28, 1), bnr.constant(0.5)), power)(4)
    np.testing.assert_array_equal(made.sampled.levels(4), expected)
    drawn = np.asarray(made.process.draw_levels(jax.random.key(0), 500))
    assert np.median(drawn) < 0.1 and drawn.max() <= 80  # most that is to be learned of an image is at low noise
    plain = experiment.build(tiny.config(sample__levels="edm"))
    np.testing.assert_array_equal(plain.sampled.levels(4), plain.process.levels(4))
    assert experiment.needs_measuring(made.config) and not experiment.needs_measuring(plain.config)


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        ("warm", {"sample__levels": "spectral"}, "sample.levels is 'spectral'; choose edm or information"),
        ("warm", {"train__levels": "edm"}, "train.levels is 'edm'; it must be information, or unset"),
        ("ddpm", {"sample__levels": "edm"}, "sample.levels is edm, but ddpm has not EDM's grid"),
        ("warm", {"sample__levels": "information", "sample__rho": 5.0}, "but sample.rho is of EDM's grid: unset one"),
        *(
            (system, {"sample__levels": "information"}, "that add Gaussian noise, and of which x0 is predicted")
            for system in ("pfgmpp", "ihdm", "cold")
        ),
    ],
)
def test_what_cannot_be_says_why(system, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(tiny.config(system, **changes))


def test_a_spectrum_of_other_images_is_refused():
    with pytest.raises(ValueError, match="measure it again"):
        information.grid(PROCESSES["warm"], jnp.ones((8, 8)))


def test_a_run_that_measured_nothing_can_be_sampled_on_them(tmp_path):
    """The images of its config are measured then; scipy's DCT of all of them."""
    images = sources.open_source("bundled", image_size=28, channels=1).read(np.arange(10_000))[0] / 127.5 - 1.0
    power = np.mean(np.square(scipy.fft.dctn(images, axes=(1, 2), norm="ortho")), axis=(0, 3))
    found = runs.measured(tiny.config(sample__levels="information"), tmp_path)
    np.testing.assert_allclose(found.power, power, rtol=1e-4)
    assert runs.measured(tiny.config(), tmp_path) is None
