"""A process in a file of the user's own: it is what it says, and what is wrong with one is a line."""

import re

import jax
import numpy as np
import pages
import pytest
import tiny

from warm_jax.diffusion import bnr, process, soundness
from warm_jax.experiments import config_files, experiment, family, process_files
from warm_jax.runtime import workdirs
from warm_jax.training import step

WARM = """
import dataclasses
from warm_jax.diffusion import dct, process


def make(image_shape, power):
    height, width, _ = image_shape

    def blur(t):
        return 0.5 * t

    def attenuation(t):
        return dct.attenuation(blur(t), height, width)

    hot = process.hot(image_shape)
    return dataclasses.replace(hot, blurs=True, blur=blur, attenuation=attenuation)
"""
SHAPE = (28, 28, 1)
ONES = np.ones((28, 28))


@pytest.fixture
def file(tmp_path):
    """A function from text to a file that holds it."""
    path = tmp_path / "mine.py"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_file_that_rebuilds_warm_is_warm(file):
    """The compiled program of a train step is the same text, and so are the grid and the prior: the same bytes."""
    texts = []
    for system, changes in (("warm", {}), ("own", {"process__file": file(WARM)})):
        exp = tiny.build(system=system, **changes)
        texts.append(step.trace_step(exp).lower().as_text())
        np.testing.assert_array_equal(exp.sampled.levels(7), process.warm(SHAPE, bnr.constant(0.5)).levels(7))
        assert exp.sampled.highest == 80.0 and exp.model.preconditioning.heads == 2
    assert texts[0] == texts[1]


def test_what_was_measured_reaches_the_file(file):
    text = "import dataclasses\nfrom warm_jax.diffusion import process, coloured\n\n\ndef make(shape, power):\n"
    text += "    return coloured.coloured(process.hot(shape), coloured.equal_snr(power))\n"
    power = np.linspace(2, 1, 28 * 28).reshape(28, 28)
    exp = experiment.build(tiny.config("own", process__file=file(text)), family.Measured(power))
    colour = np.asarray(exp.process.colour(jax.numpy.zeros(1)))[0, ..., 0]
    np.testing.assert_allclose(colour**2, power / power.mean(), rtol=1e-5)


def test_a_file_that_was_changed_is_not_taken_for_the_one_that_was_trained(file):
    name = file(WARM)
    measured = family.Measured(ONES, digest=process_files.digest(name))
    experiment.build(tiny.config("own", process__file=name), measured)
    file(WARM.replace("0.5", "0.6"))
    with pytest.raises(ValueError, match=r"mine\.py is not what this run was trained with"):
        experiment.build(tiny.config("own", process__file=name), measured)


def hot_with(line):
    """A file of hot diffusion with one change."""
    head = "import dataclasses, jax.numpy as jnp\nfrom warm_jax.diffusion import dct, process\n\n\n"
    return f"{head}def make(shape, power):\n    hot = process.hot(shape)\n    return {line}\n"


UNEVEN = "blurs=True, attenuation=lambda t: hot.attenuation(t).at[:, 3, 4].multiply"
WRONG = {
    "": "this file defines no make",
    "def make(shape, power)": "line 1: expected ':'",
    "import nowhere": "line 1: ModuleNotFoundError: No module named 'nowhere'",
    "def make(shape, power):\n    return 1 / 0": "line 2: ZeroDivisionError",
    "def make(shape):\n    return None": "TypeError: make",
    "def make(shape, power):\n    return None": "it gives NoneType; it must give a warm_jax.diffusion.process.Process",
    hot_with("process.hot((8, 8, 1))"): r"image_shape is \(8, 8, 1\); the images are \(28, 28, 1\)",
    hot_with("dataclasses.replace(hot, noise=lambda t: t[0])"): r"noise gives \(\) for 33 levels; it must give \(33,\)",
    hot_with("dataclasses.replace(hot, noise=lambda t: t + undefined)"): "line 7: NameError: name 'undefined'",
    hot_with("dataclasses.replace(hot, noise=lambda t: t + 1)"): "level 0 must be the clean image.* noise is 1",
    hot_with(
        "dataclasses.replace(hot, noise=lambda t: jnp.where(t > 50, jnp.nan, t))"
    ): "noise is nan at level 55.7362",
    hot_with("dataclasses.replace(hot, noise=lambda t: jnp.where(t > 50, 0, t))"): "noise is 0 at level .* above 0",
    hot_with("dataclasses.replace(hot, noise=lambda t: jnp.where(t > 50, 30, t))"): (
        r"signal-to-noise ratio, .* rises at frequency \(0, 0\): from 0\.0004688 at level 46\.\d+ to 0\.001111 at 55"
    ),
    hot_with(f"dataclasses.replace(hot, {UNEVEN}(-1.0))"): r"attenuation is -1 at level 0\.002, frequency \(3, 4\)",
    hot_with(f"dataclasses.replace(hot, {UNEVEN}(jnp.nan))"): r"attenuation is nan at level 0, frequency \(3, 4\)",
    hot_with(f"dataclasses.replace(hot, {UNEVEN}(1 - t[:, None] / 99))".replace("blurs=True, ", "")): (
        r"blurs is False, but attenuation at level \S+, frequency \(3, 4\) is not that of the mean"
    ),
    hot_with("dataclasses.replace(hot, colour=lambda t: jnp.zeros((*t.shape, 28, 28, 1)))"): (
        r"colour is 0 at level 0\.002, frequency \(0, 0\); it must be above 0"
    ),
    hot_with("dataclasses.replace(hot, colour=lambda t: jnp.ones((28, 28, 1)))"): r"colour gives \(28, 28, 1\)",
    hot_with("dataclasses.replace(hot, noise=lambda t: t**0.5 + t)"): "",
    hot_with("dataclasses.replace(hot, noise=lambda t: jnp.abs(t - 30)**0.5 + t)"): "level 0 must be the clean",
    hot_with("dataclasses.replace(hot, draw_levels=lambda key, n: jnp.zeros(n))"): "draw_levels gives 0.0; levels",
    hot_with("dataclasses.replace(hot, grid=lambda n: hot.grid(n)[::-1])"): "must fall from at most highest, 80, to 0",
    hot_with("dataclasses.replace(hot, solvers=('rk4',))"): r"solvers is \('rk4',\); choose from euler, heun",
}


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_with_a_file_is_a_line(file, number):
    text, message = list(WRONG.items())[number]
    name = file(text)
    if not message:  # such are right
        process_files.load(name, SHAPE, ONES, None)
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: .*{message}") as caught:
        process_files.load(name, SHAPE, ONES, None)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named():
    for given, message in ((None, "process.file is unset"), ("nowhere.py", "process.file is nowhere.py, and no such")):
        with pytest.raises(ValueError, match=message):
            process_files.load(given, SHAPE, ONES, None)


@pytest.mark.parametrize("name", ["hot", "warm", "pfgmpp"])
def test_the_shipped_processes_are_sound(name):
    made = {"hot": process.hot, "warm": lambda s: process.warm(s, bnr.constant(0.5)), "pfgmpp": None}[name]
    soundness.check(process.pfgmpp(SHAPE, 128.0) if made is None else made(SHAPE), SHAPE)


def test_the_file_of_the_documentation_is_the_one_that_is_shown():
    """And it is sound, twenty lines without its sentences, with a colour that is white at the data only."""
    path = pages.ROOT / "docs" / "my_process.py"
    text = path.read_text(encoding="utf-8")
    assert text in [block.text for block in pages.blocks((pages.ROOT / "docs" / "systems.md").read_text())]
    power = np.linspace(2, 0.01, 28 * 28).reshape(28, 28)
    made = process_files.load(str(path), SHAPE, power, None)
    ends = np.asarray(made.colour(jax.numpy.asarray([0.0, 1e6])))[..., 0]
    np.testing.assert_allclose(ends[0], 1, rtol=1e-6)
    np.testing.assert_allclose(ends[1] ** 2, power / power.mean(), rtol=1e-4)


def test_a_strangers_workdir_runs_nothing(file, tmp_path):
    """Only its config.json names the file: it is not read until the user names it, too."""
    path, left = file(f"open({str(tmp_path / 'was run')!r}, 'w').close()\n{WARM}"), tmp_path / "was run"
    made = tiny.config("own", process__file=path)
    workdirs.save_config(made, tmp_path)
    for config in (config_files.of_workdir(tmp_path), workdirs.load_config(tmp_path)):
        with pytest.raises(ValueError, match=re.escape(f"--config.process.file={path}")):
            experiment.build(config)
        assert not left.exists()
    experiment.build(workdirs.load_config(tmp_path, like=made))
    assert left.exists()
