"""What the pictures of the manifold and the sweeps show is what they were given."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.container import ErrorbarContainer

from warm_jax.analysis import sampling_plots
from warm_jax.analysis.manifold import MEASURES, Manifold
from warm_jax.analysis.sweep import Sweep

BNRS, NFE = np.array([0.0, 0.5, 10.0]), np.array([17, 35])


def departures():
    rng = np.random.RandomState(0)
    levels = np.array([[3.0, 0.3, np.nan], [9.0, 1.0, 0.1]])
    mean = rng.rand(4, 3, 2, 3) * np.array([1e-3, 1e-2, 1.0])[:, None, None] + 0 * levels
    average = np.array([[1e-3, -1e-5], [1e-2, 1e-5], [0.5, 2e-5]]) * np.ones((4, 1, 1))
    half = np.full_like(average, 1e-4)
    return Manifold(
        BNRS, np.array([9, 18]), NFE, levels, mean, 0.1 * mean, average, half, np.array(MEASURES), np.arange(3),
        np.array(8),
    )  # fmt: skip


def panels(figure):
    """The axes by what their y axis says."""
    return {axes.get_ylabel(): axes for axes in figure.axes if axes.get_ylabel()}


def named(axes):
    return {text.get_text() for text in axes.texts}


def test_the_manifold_shows_each_measure_and_says_what_is_seen(tmp_path):
    result = departures()
    figure = sampling_plots.manifold(result)
    assert figure.get_suptitle().replace("\n", " ") == (
        "At NFE 17 BNR 10 is most off (gap 0.50 ± 0.00010), BNR 0 least (0.0010 ± 0.00010); "
        "at NFE 35 no BNR is measurably off."
    )
    titles = {axes.get_title(): axes for axes in figure.axes}
    for name, levels, column in (("NFE 17", [3.0, 0.3], 0), ("NFE 35", [9.0, 1.0, 0.1], 1)):
        curves = [line for line in titles[name].lines if line.get_marker() not in ("None", "")]
        for i, line in enumerate(curves):
            np.testing.assert_array_equal(line.get_xdata(), levels)
            np.testing.assert_array_equal(line.get_ydata(), result.mean[0, i, column, : len(levels)])
        assert len(curves) == 3 and titles[name].xaxis_inverted() and titles[name].get_xscale() == "log"
    assert {"BNR 0", "BNR 0.5", "BNR 10"} <= named(titles["NFE 35"])
    figure.savefig(tmp_path / "manifold.png", dpi=30)


def test_without_a_density_the_distances_are_shown():
    result = departures()
    mean, average = result.mean.copy(), result.average.copy()
    mean[:2], average[:2] = np.nan, np.nan
    result = result._replace(mean=mean, half=abs(mean), average=average, average_half=abs(average))
    shown = panels(sampling_plots.manifold(result))
    assert all("distance" in name for name in shown) and len(shown) == 2


def table(values, half=None, metric="w2"):
    values = np.array(values)
    return Sweep(
        np.array(metric), BNRS, np.array([9, 18]), NFE, values[..., None], values,
        np.zeros_like(values) if half is None else half,
    )  # fmt: skip


def test_the_sweep_writes_its_numbers_and_draws_its_intervals(tmp_path):
    values = [[0.2261, 0.0433], [0.2607, 0.0515], [0.3115, 0.1191]]
    half = np.array([[0.01, 0.001], [0.02, 0.002], [0.03, 0.003]])
    figure = sampling_plots.sweep(table(values, half))
    heat, curves = figure.axes[:2]
    written = {text.get_position(): text.get_text() for text in heat.texts}
    assert written[(1, 2)] == "0.119\n± 0.0030"
    assert len(written) == 6
    bars = [one for one in curves.containers if isinstance(one, ErrorbarContainer)]
    for container, mean, spread in zip(bars, values, half, strict=True):
        np.testing.assert_allclose(container.lines[0].get_ydata(), mean)
        segments = np.array(container.lines[2][0].get_segments())[:, :, 1]
        np.testing.assert_allclose(segments[:, 1] - segments[:, 0], 2 * spread)
    assert {"BNR 0", "BNR 0.5", "BNR 10"} == named(curves)
    assert figure.get_suptitle() == (
        "At NFE 17 BNR 0 is lowest (0.23), BNR 10 highest (0.31); "
        "at NFE 35 BNR 0 is lowest (0.043), BNR 10 highest (0.12)."
    )
    figure.savefig(tmp_path / "sweep.png", dpi=30)


def test_what_cannot_be_told_apart_is_not_ranked():
    half = np.full((3, 2), 0.2)
    title = sampling_plots.sweep(table([[0.2, 0.5], [0.3, 0.5], [0.4, 0.5]], half)).get_suptitle()
    assert title == "At NFE 17 the ratios cannot be told apart (0.20 to 0.40); at NFE 35 all ratios give 0.50."


def test_missing_cells_and_single_seeds_can_be_drawn():
    values = np.array([[0.2, np.nan], [0.3, -0.1], [np.nan, 0.5]])
    figure = sampling_plots.sweep(table(values, np.full((3, 2), np.nan), "fid"))
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["-0.100", "0.200", "0.300", "0.500", "–", "–"]


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.0, 0.01, 1.0], [1.0, 0.99, 0.98, 0.02]])
def test_labels_do_not_meet(values):
    placed = sampling_plots._spread(values, 0.1)
    assert np.all(np.diff(np.sort(placed)) > 0.0999) and placed.min() >= 0 and placed.max() <= 1
    assert np.all(np.diff(placed[np.argsort(values, kind="stable")]) > 0)
