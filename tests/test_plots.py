"""Pictures show the numbers that they were given, and their words can be read."""

import itertools
import sys

import dense
import jax
import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.colors import same_color  # noqa: E402

from warm_jax.analysis import colours, corruption, learning, plots, spectra  # noqa: E402
from warm_jax.diffusion import radial  # noqa: E402

SIDE = 16
POWER = 8 / np.maximum(np.hypot(*np.indices((SIDE, SIDE))), 0.7) ** 2
BNRS, BETAS = (0, 0.5, 1, 2, 10), np.geomspace(0.02, 80, 31)


def drawn(figure, width):
    """The figure's pixels; also that no text leaves the picture and none lies on another of its axes."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    assert pixels.shape[1] == width
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        texts = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
        for text, box in boxes:
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= pixels.shape[0], text
        for (a, one), (b, other) in itertools.combinations(boxes, 2):
            assert not one.padded(-3).overlaps(other.padded(-3)), f"{a!r} on {b!r}"
    return pixels


def lines(axes):
    return [np.stack(line.get_data()) for line in axes.lines]


def shows(axes, x, y):
    """Whether one of the lines is this one."""
    return any(a.shape == (2, len(x)) and np.allclose(a, [x, y], equal_nan=True) for a in lines(axes))


def test_spectra():
    covariance = np.diag((0.05 * radial.radial(POWER).power) ** 2)
    s = spectra.spectra(POWER, BNRS, (0.1, 0.3, 1.0), covariance=covariance)
    figure = plots.spectra(s)
    drawn(figure, 1200)
    spectrum, cutoff, lost, schedule = figure.axes
    assert shows(spectrum, s.k, s.power) and shows(spectrum, s.k, s.blurred[2, 1])
    assert shows(cutoff, s.grid[~np.isnan(s.noise_cutoff)], s.noise_cutoff[~np.isnan(s.noise_cutoff)])
    assert shows(cutoff, s.grid, s.blur_cutoff[1]) and shows(lost, s.grid, 100 * s.lost[3])
    assert shows(schedule, s.grid, s.scheduled) and f"BNR {s.recommended:.2f}" in figure.get_suptitle()


def test_little_is_drawn_too():
    drawn(plots.spectra(spectra.spectra(np.ones((4, 6)), (0.5,), (2.0,))), 1200)
    drawn(plots.learning(learning.learning(np.ones((4, 6)), (0.5,), BETAS)), 1200)


def test_corruption():
    image = np.random.RandomState(0).uniform(-1, 1, (SIDE, SIDE, 3)).astype(np.float32)
    c = corruption.corruption(jax.random.key(0), image, (0, 0.5, 10, np.inf), (0.1, 0.5, 2.0))
    figure = plots.corruption(c)
    drawn(figure, 1200)
    step = SIDE + 1  # a gap of one pixel
    for axes, images in zip(figure.axes, (c.states, c.blurred, c.residual), strict=True):
        picture = np.asarray(axes.images[0].get_array())
        for row, column in [(0, 0), (2, 1), (3, 2)]:
            tile = picture[row * step : row * step + SIDE, column * step : column * step + SIDE]
            np.testing.assert_allclose(tile, np.clip((images[row, column] + 1) / 2, 0, 1), atol=1e-6)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0.1", "0.5", "2"]
    assert figure.axes[0].get_yticklabels()[3].get_text() == "BNR ∞\nblur alone"


def test_learning_with_measured_dots():
    result = learning.learning(dense.POWER, BNRS, BETAS)
    values = {name: np.full(3, 0.25) for name in learning.Explained._fields}
    betas = np.array([0.1, 1.0, 9.0])
    one = learning.Explained(**{**values, "count": np.asarray(5), "betas": betas, "alphas": 2 * betas})
    one = one._replace(residual_explained=np.array([-300, 0.25, 0.25]))
    other = one._replace(alphas=7 * betas)  # of a BNR that is not drawn
    figure = plots.learning(result, [one, other])
    drawn(figure, 1200)
    for axes, name in zip(figure.axes, ("deblurring", "blurred_explained", "residual_explained"), strict=True):
        for i in range(1, 5):
            assert shows(axes, BETAS, 100 * getattr(result, name)[i])
        dots = 100 * getattr(one, name)
        assert len([line for line in lines(axes) if np.array_equal(line, [betas, dots])]) == 1
    triangles = [line.get_xdata() for line in figure.axes[2].lines if line.get_marker() == "v"]
    np.testing.assert_array_equal(np.concatenate(triangles), [0.1])  # one dot far below the axes


def colour_of(axes, x, y):
    """The colours of the lines that are this one."""
    pairs = [(line.get_color(), np.stack(line.get_data())) for line in axes.lines]
    return {colour for colour, a in pairs if a.shape == (2, len(x)) and np.allclose(a, [x, y], equal_nan=True)}


@pytest.mark.parametrize("bnrs", [(0, 0.5, 1, 2, 10), (0.25, 2), (2, 0.5)])
def test_a_bnr_has_its_colour_whatever_stands_beside_it(bnrs):
    s = spectra.spectra(POWER, bnrs, (0.1, 0.3, 1.0))
    _, cutoff, lost, schedule = plots.spectra(s).axes
    result = learning.learning(POWER, bnrs, BETAS)
    curves = plots.learning(result).axes[0]
    image = np.zeros((4, 4, 3), np.float32)
    rows = plots.corruption(corruption.corruption(jax.random.key(0), image, (*bnrs, np.inf), (0.1,))).axes[0]
    for i, bnr in enumerate(bnrs):
        expected = {colours.of_bnr(bnr)}
        assert colour_of(curves, BETAS, 100 * result.deblurring[i]) == expected
        if bnr:
            assert colour_of(cutoff, s.grid, s.blur_cutoff[i]) == colour_of(lost, s.grid, 100 * s.lost[i]) == expected
        assert same_color(rows.get_yticklabels()[i].get_color(), colours.of_bnr(bnr))
    assert same_color(rows.get_yticklabels()[-1].get_color(), colours.of_bnr(np.inf))
    dotted = [line for line in schedule.lines if line.get_linestyle() == ":"]
    assert [line.get_color() for line in dotted] == [colours.of_bnr(0.5)]  # the paper's BNR


def test_dots_are_whole():
    """A measured dot at the first level and at the last, and one beyond 100 %: none is cut off by the axes."""
    result, values = learning.learning(dense.POWER, BNRS, BETAS), np.full(3, 0.25)
    one = learning.Explained(**{name: values for name in learning.Explained._fields})
    betas = np.array([BETAS[0], 1.0, BETAS[-1]])
    one = one._replace(count=np.asarray(5), betas=betas, alphas=2 * betas, deblurring=np.array([1.1, 0.5, 9.0]))
    figure = plots.learning(result, [one])
    drawn(figure, 1200)
    for axes in figure.axes:
        box = axes.get_window_extent()
        for line in axes.lines:
            if line.get_marker() in ("o", "v", "^") and len(line.get_xdata()):
                x, y = axes.transData.transform(np.stack(line.get_data(), 1)).T
                radius = line.get_markersize() / 72 * figure.dpi / 2
                assert x.min() - radius >= box.x0 and x.max() + radius <= box.x1
                inside = y + radius <= box.y1
                assert inside.all() or line.get_marker() == "o"
    triangles = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "^"]
    np.testing.assert_array_equal(np.concatenate(triangles), [BETAS[-1]])  # 900 %
    assert figure.axes[0].get_ylim()[1] == 120


def test_a_radial_spectrum_and_no_global_state():
    found = radial.radial(POWER)
    law = radial.slope(POWER)
    figure = plots.radial_spectrum(found, law)
    drawn(figure, 720)
    assert shows(figure.axes[0], found.k, found.power)
    assert figure.get_suptitle() == "Radial power spectrum: slope -2, fitted to k = 1 to 8"
    fitted = lines(figure.axes[0])[-1]
    np.testing.assert_allclose(fitted[1], np.exp(law.intercept) * np.arange(1, 9) ** law.value)
    drawn(plots.radial_spectrum(radial.radial(np.ones((3, 3))), radial.slope(np.ones((3, 3)))), 720)
    assert "matplotlib.pyplot" not in sys.modules


def test_results_go_to_a_file_without_pickles_and_come_back(tmp_path):
    results = [
        spectra.spectra(POWER, BNRS, (0.1, 0.3, 1.0)),
        corruption.corruption(jax.random.key(0), np.zeros((4, 4, 1), np.float32), (1.0,), (0.1,)),
        learning.learning(POWER, BNRS, BETAS),
    ]
    for result in results:
        np.savez(tmp_path / "result.npz", **result._asdict())
        with np.load(tmp_path / "result.npz", allow_pickle=False) as found:
            for name, value in result._asdict().items():
                np.testing.assert_array_equal(found[name], value)
