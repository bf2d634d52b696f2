"""Sweeps: the table that a second implementation found, scores by hand, and going on after a cut."""

import json

import gaussian_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from warm_jax.analysis import sweep
from warm_jax.analysis.sweep import Cell


@pytest.mark.parametrize("steps", gaussian_table.STEPS)
def test_heun_reproduces_the_gaussian_table(steps):
    column = gaussian_table.STEPS.index(steps)
    found = sweep.gaussian_w2(gaussian_table.POWER, list(gaussian_table.HEUN), [steps])
    assert found.nfe == gaussian_table.NFE[column]
    expected = [row[column] for row in gaussian_table.HEUN.values()]
    np.testing.assert_allclose(found.mean[:, 0], expected, atol=5.1e-5)  # the table's digits
    assert not found.half.any()


def test_multistep_reproduces_the_gaussian_table():
    found = sweep.gaussian_w2(gaussian_table.POWER, list(gaussian_table.MULTISTEP), [17, 35, 79], "multistep")
    assert found.nfe.tolist() == [17, 35, 79]
    np.testing.assert_allclose(found.mean, list(gaussian_table.MULTISTEP.values()), atol=5.1e-5)


def test_multistep3_reproduces_the_gaussian_table():
    found = sweep.gaussian_w2(gaussian_table.POWER, list(gaussian_table.MULTISTEP3), [9, 17, 35], "multistep3")
    assert found.nfe.tolist() == [9, 17, 35]
    np.testing.assert_allclose(found.mean, list(gaussian_table.MULTISTEP3.values()), atol=5.1e-5)


# ── Scores against the data ──────────────────────────────────────────────────────────────────────────────────────────


def points(*values):
    """Images of one pixel."""
    return jnp.asarray(values, jnp.float32)[:, None, None, None]


@jax.jit
def scores(samples, images):
    return sweep.against_data(samples, images, sweep.data_spread(images))


def against(samples, images):
    return {name: float(score) for name, score in scores(samples, images).items()}


def test_samples_of_a_single_image():
    """Of 0 and 1 only 0 comes: 2·½ - 0 - ½ over ½; both samples always meet, 2·1 - 1."""
    found = against(points(0, 0, 0), points(0, 1))
    assert found == pytest.approx({"energy": 1, "imbalance": 1, "nearest": 0}, abs=1e-6)


def test_samples_of_every_image_twice():
    """Of 2n samples a pair meets with chance 1 / (2n - 1); E|X - X'| is the data's, without the pairs i = j."""
    images = points(0, 1, 3)
    spread = (1 + 2 + 3) * 2 / 9
    within = spread * 36 / 30
    expected = {"energy": (2 * spread - within - spread) / spread, "imbalance": 3 / 5 - 1, "nearest": 0}
    assert against(points(0, 1, 3, 0, 1, 3), images) == pytest.approx(expected, abs=1e-6)


def test_nearest_is_the_rms_of_a_pixel():
    images = np.random.RandomState(0).uniform(-1, 1, (3, 4, 5, 2)).astype(np.float32)
    off = images + np.where(np.random.RandomState(1).rand(*images.shape) > 0.5, 0.01, -0.01).astype(np.float32)
    assert against(jnp.asarray(off), jnp.asarray(images))["nearest"] == pytest.approx(0.01, rel=1e-4)


def test_a_fair_sampler_finds_each_image_equally_often():
    """Two images of opposite sign and a symmetric prior: chance ½ each; count · imbalance is χ² - 1 of one degree."""
    image = np.random.RandomState(0).uniform(-1, 1, (1, 4, 4, 1)).astype(np.float32)
    found = sweep.empirical_sweep(np.concatenate([image, -image]), [0.0, 0.5], [6], [0, 1], count=64)
    assert set(found) == {"energy", "imbalance", "nearest"}
    assert np.all(found["nearest"].values < 1e-3)
    chi2 = 64 * (found["imbalance"].values * 63 / 64 + 1 / 64)
    assert np.all(chi2 < scipy.stats.chi2.ppf(0.9995, 1))
    assert found["imbalance"].nfe.tolist() == [11]


# ── Resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counted:
    """A measurement that keeps count: the score is a function of the cell."""

    def __init__(self):
        self.seen = []

    def __call__(self, cell):
        self.seen.append(cell)
        return 2 * cell.steps - 1, {"a": cell.bnr + cell.steps + 0.1 * cell.seed}


WANTED = sweep.cells([0.5, 2.0], [3, 9], [0, 1])


def test_what_is_done_is_not_measured_again(tmp_path):
    path, first, second = tmp_path / "sweep.jsonl", Counted(), Counted()
    rows = list(sweep.sweep(WANTED, first, path, {"x": 1}, stop=lambda: len(first.seen) == 3))
    assert first.seen == [Cell(0.5, 3, 0), Cell(0.5, 9, 0), Cell(2.0, 3, 0)] and len(rows) == 3
    rows = list(sweep.sweep(WANTED, second, path, {"x": 1}))
    assert second.seen == [cell for cell in WANTED if cell not in first.seen]
    assert [(row["bnr"], row["steps"], row["seed"]) for row in rows] == [tuple(cell) for cell in WANTED]
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert list(sweep.sweep(WANTED, lambda cell: pytest.fail("measured again"), path, {"x": 1})) == rows


def test_other_settings_are_measured_anew(tmp_path):
    path, again = tmp_path / "sweep.jsonl", Counted()
    list(sweep.sweep(WANTED, Counted(), path, {"checkpoint": 1}))
    list(sweep.sweep(WANTED, again, path, {"checkpoint": 2}))
    assert again.seen == WANTED
    assert len({json.loads(line)["key"] for line in path.read_text().splitlines()}) == 2 * len(WANTED)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path, again = tmp_path / "sweep.jsonl", Counted()
    rows = list(sweep.sweep(WANTED, Counted(), path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert list(sweep.sweep(WANTED, again, path)) == rows
    assert again.seen == WANTED[-1:] and path.read_bytes() == whole


def test_a_failure_keeps_what_is_done(tmp_path):
    path, counted = tmp_path / "sweep.jsonl", Counted()

    def fails(cell):
        if len(counted.seen) == 2:
            raise FloatingPointError("NaN")
        return counted(cell)

    with pytest.raises(FloatingPointError):
        list(sweep.sweep(WANTED, fails, path))
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"bnr": 1}'])
def test_other_damage_is_named(tmp_path, line):
    path = tmp_path / "sweep.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"sweep\.jsonl, line 1 is damaged .*; remove it"):
        list(sweep.sweep(WANTED, Counted(), path))


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_students_intervals(tmp_path):
    rows = list(sweep.sweep(sweep.cells([2, 0.5], [9, 3], [0, 1, 5]), Counted()))
    found = sweep.collect(rows, "a")
    assert found.bnrs.tolist() == [0.5, 2] and found.steps.tolist() == [3, 9] and found.nfe.tolist() == [5, 17]
    values = np.array([3.5, 3.6, 4.0])  # of BNR 0.5 and 3 steps, by seed
    np.testing.assert_allclose(found.values[0, 0], values)
    low, high = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose([found.mean[0, 0] - found.half[0, 0], found.mean[0, 0] + found.half[0, 0]], [low, high])
    np.savez(tmp_path / "sweep.npz", **found._asdict())
    with np.load(tmp_path / "sweep.npz", allow_pickle=False) as stored:
        assert str(stored["metric"]) == "a"


def test_what_is_missing_is_nan():
    rows = list(sweep.sweep([Cell(0.5, 3, 0), Cell(2.0, 9, 0)], Counted()))
    found = sweep.collect(rows, "a")
    np.testing.assert_array_equal(np.isnan(found.mean), [[False, True], [True, False]])
    assert np.isnan(found.half).all()
    with pytest.raises(ValueError, match="has two rows"):
        sweep.collect(rows + rows, "a")
    with pytest.raises(ValueError, match="score 'fid'"):
        sweep.collect(rows, "fid")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [3], [0]), "needs ratios"),
        (([1], [3, 3], [0]), r"numbers of steps, each named once, not \[3, 3\]"),
        (([-1], [3], [0]), "ratios are finite and at least 0"),
        (([float("nan")], [3], [0]), "ratios are finite"),
        (([1], [0], [0]), "steps at least 1"),
    ],
)
def test_bad_cells_are_named(request_, message):
    with pytest.raises(ValueError, match=message):
        sweep.cells(*request_)


def test_random_solvers_have_no_closed_form():
    with pytest.raises(ValueError, match="ancestral draws noise"):
        sweep.gaussian_w2(gaussian_table.POWER, [0.5], [3], "ancestral")
