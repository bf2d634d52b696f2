"""What the pictures of the manifold and the sweeps show is what they were given."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.container import ErrorbarContainer

from warm_jax.analysis import colours, sampling_plots
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
        "At NFE 17 BNR 10 is most off (gap 0.50000 ± 0.00010), BNR 0 least (0.00100 ± 0.00010); "
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


def test_what_is_named_as_most_off_is_measurably_off():
    """BNR 10 is farthest, by a value smaller than its error."""
    result = departures()
    half = result.average_half.copy()
    half[:, 2] = 0.6
    title = sampling_plots.manifold(result._replace(average_half=half)).get_suptitle().replace("\n", " ")
    assert title.startswith("At NFE 17 BNR 0.5 is most off (gap 0.01000 ± 0.00010), BNR 0 least")


@pytest.mark.parametrize(("bnrs", "density"), [((0.5,), False), ((0.5,), True), ((0.0, 0.5, 10.0), False)])
def test_one_nfe_has_axes_too(bnrs, density):
    """Of one model or several: its levels and its averages are within the axes, and a tick says the NFE."""
    result = departures()
    chosen = [list(BNRS).index(bnr) for bnr in bnrs]
    mean, average = (part[:, chosen, 1:] if density else part[:, chosen, 1:].copy() for part in result[4:8:2])
    if not density:
        mean[:2], average[:2] = np.nan, np.nan
    average = np.abs(average)
    result = result._replace(
        bnrs=np.array(bnrs), steps=result.steps[1:], nfe=NFE[1:], levels=result.levels[1:], mean=mean,
        half=0.1 * abs(mean), average=average, average_half=0.3 * average,
    )  # fmt: skip
    figure = sampling_plots.manifold(result)
    over_nfe = [axes for axes in figure.axes if axes.get_xlabel().startswith("NFE")]
    assert len(over_nfe) == (4 if density else 2)
    for axes in over_nfe:
        low, high = axes.get_xlim()
        assert 25 < low < 34 and 36 < high < 50
        assert [label.get_text() for label in axes.get_xticklabels()] == ["35"] and not len(axes.get_xticks(minor=True))
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in (*axes.get_yticks(), *axes.get_yticks(minor=True)) if bottom <= tick <= top]
        assert len(ticks) >= 2 and np.isfinite([low, high, bottom, top]).all()
        bars = [one for one in axes.containers if isinstance(one, ErrorbarContainer)]
        for bar in bars:
            x, y = bar.lines[0].get_data()
            assert low < x[0] < high and bottom < y[0] < top
    figure.canvas.draw()
    width, height = figure.get_window_extent().width, figure.get_window_extent().height
    renderer = figure.canvas.get_renderer()
    for text in (text for axes in figure.axes for text in axes.texts):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()


def test_a_bnr_has_its_colour_whatever_stands_beside_it():
    table_ = table([[0.2, 0.1], [0.3, 0.1], [0.4, 0.2]])
    few = table_._replace(bnrs=BNRS[1:], mean=table_.mean[1:], half=table_.half[1:])
    for result in (table_, few, table_._replace(bnrs=BNRS * 2)):
        bars = [one for one in sampling_plots.sweep(result).axes[1].containers if isinstance(one, ErrorbarContainer)]
        found = [bar.lines[0].get_color() for bar in bars]
        assert found == [colours.of_bnr(bnr) for bnr in result.bnrs]
    manifold = sampling_plots.manifold(departures())
    for axes in manifold.axes:
        for text in axes.texts:
            if text.get_text().startswith("BNR "):
                assert text.get_color() == colours.of_bnr(float(text.get_text()[4:]))


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
    assert written[(1, 2)] == "0.1191\n± 0.0030"
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
