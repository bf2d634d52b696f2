"""The signal-to-noise ratio along a process, for its picture: closed forms, and grids that take their own steps."""

import numpy as np
import pytest
import tiny
from test_systems import start

from warm_jax.analysis import analyze, process_plots, processes
from warm_jax.diffusion import coloured, process, systems

POWER = 0.3 / (0.05 + (np.arange(12)[:, None] / 12) ** 2 + (np.arange(12) / 12) ** 2)
SHAPE = (12, 12, 1)


def test_the_ratio_and_where_it_is_one():
    """Of hot diffusion P / t² by rings; each ring drowns where t² is its power."""
    hot = process.hot(SHAPE)
    found = processes.ratio(hot, POWER)
    radius = np.rint(np.hypot(*np.meshgrid(np.arange(12), np.arange(12), indexing="ij")))
    rings = np.array([POWER[radius == k].mean() for k in range(12)])
    np.testing.assert_allclose(found.levels, hot.levels(64)[::-1])
    np.testing.assert_allclose(found.ratio[1:], np.clip(rings / found.levels[1:, None] ** 2, 1e-6, 1e6), rtol=1e-5)
    drowned = np.interp(found.drowned, np.linspace(0, 1, 65), found.levels)
    np.testing.assert_allclose(drowned, np.sqrt(rings), rtol=0.02)


def test_equal_snr_drowns_all_at_once():
    found = processes.ratio(coloured.coloured(systems.ddpm(SHAPE), coloured.equal_snr(POWER)), POWER)
    np.testing.assert_allclose(found.drowned, found.drowned[0], atol=1e-5)


def test_processes_with_steps_of_their_own():
    ihdm = processes.ratio(systems.ihdm(SHAPE, start, 20), POWER)
    assert ihdm.levels[[0, -1]].tolist() == [0, 20] and np.isfinite(ihdm.drowned[-1])
    cold = processes.ratio(systems.cold(SHAPE, start, np.array([0.0, 1.0, 2.0])), POWER)
    assert np.all(cold.ratio == 1e6) and np.all(np.isnan(cold.drowned))
    figure = process_plots.processes({"ihdm": ihdm, "cold": cold})
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["ihdm", "cold"]


@pytest.mark.parametrize(
    ("names", "message"), [(("hot", "pink"), "analysis.systems: .*'pink'"), (("own",), "names own")]
)
def test_systems_that_are_none(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        analyze.prepare(tiny.config(analysis__systems=names), tmp_path, "process", -1)
