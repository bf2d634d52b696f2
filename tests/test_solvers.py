"""Samplers in a hurry: laws of random solvers by another recursion, equal evaluations, and what is called best."""

import itertools

import numpy as np
import pytest

from warm_jax.analysis import solvers
from warm_jax.analysis.solvers import Table, Way

LAM = np.pi**2 * ((np.arange(4) / 4)[:, None] ** 2 + (np.arange(4) / 4) ** 2)
POWER = 1 / (LAM + 0.05)


def levels(steps, low, rho):
    """EDM, equation 5."""
    ramp = np.linspace(0, 1, steps)
    return np.append((80 ** (1 / rho) + ramp * (low ** (1 / rho) - 80 ** (1 / rho))) ** rho, 0)


def heun(a, wiener, t_i, t_j):
    """The factor of one step of EDM's solver on a state of each frequency, blur integrated exactly."""
    clean = wiener(t_i)
    noise = (1 - a(t_i) * clean) / t_i
    euler = 1 + (a(t_j) - a(t_i)) * clean + (t_j - t_i) * noise
    if t_j == 0:
        return euler
    there = wiener(t_j) * euler
    other = (euler - a(t_j) * there) / t_j
    return 1 + (a(t_j) - a(t_i)) * (clean + there) / 2 + (t_j - t_i) * (noise + other) / 2


def variance(solver, bnr, grid):
    """Of each frequency of the samples, by a recursion in numpy: conditional Gaussians, and EDM's churn."""
    a = lambda t: np.exp(-((bnr * t) ** 2) * LAM / 2)  # noqa: E731
    wiener = lambda t: POWER * a(t) / (POWER * a(t) ** 2 + t**2)  # noqa: E731
    left = lambda low, high: np.exp(-(bnr**2) * (high**2 - low**2) * LAM / 2)  # noqa: E731 a(high) / a(low)
    v, count = np.full_like(POWER, 6400.0), len(grid) - 1
    for t_i, t_j in itertools.pairwise(grid):
        if solver == "ancestral":
            # x_j given x_i and x̂0: precision-weighted mean of a_j x̂0 (variance t_j²) and x_i / r (variance q / r²).
            r = left(t_j, t_i)
            q = t_i**2 - r**2 * t_j**2
            gain = (a(t_j) * q * wiener(t_i) + r * t_j**2) / (q + r**2 * t_j**2)
            v = gain**2 * v + q * t_j**2 / (q + r**2 * t_j**2)
            continue
        up = t_i * (1 + min(2.0 / count, 2**0.5 - 1)) if 0.05 <= t_i <= 50 else t_i
        ratio = left(t_i, up)
        v = ratio**2 * v + up**2 - ratio**2 * t_i**2
        v = heun(a, wiener, up, t_j) ** 2 * v
    return v


@pytest.mark.parametrize("solver", ["ancestral", "stochastic"])
def test_the_law_of_random_solvers_is_exact(solver):
    grids, bnrs = [(0.002, 7.0), (0.07, 20.0)], [0.0, 0.5]
    nfe, found = solvers.gaussian_w2(POWER, solver, 6, bnrs, grids)
    assert nfe == {"ancestral": 6, "stochastic": 11}[solver]
    for i, j in np.ndindex(2, 2):
        std = np.sqrt(variance(solver, bnrs[j], levels(6, *grids[i])))
        expected = np.linalg.norm(std - np.sqrt(POWER)) / np.linalg.norm(np.sqrt(POWER))
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-6)


def test_deterministic_solvers_by_their_gains():
    a = lambda t: np.exp(-((0.5 * t) ** 2) * LAM / 2)  # noqa: E731
    wiener = lambda t: POWER * a(t) / (POWER * a(t) ** 2 + t**2)  # noqa: E731
    nfe, found = solvers.gaussian_w2(POWER, "heun", 5, [0.5], [(0.02, 20.0)])
    gain = 80 * np.prod([heun(a, wiener, *pair) for pair in itertools.pairwise(levels(5, 0.02, 20.0))], axis=0)
    expected = np.linalg.norm(np.abs(gain) - np.sqrt(POWER)) / np.linalg.norm(np.sqrt(POWER))
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)
    assert nfe == 9


def test_budgets_are_kept():
    """2 · steps - 1 evaluations of Heun's solver, one a step of the others: within 8 that is 4 steps and 8."""
    found = {solver: solvers.steps_within(solver, 8) for solver in ("multistep3", "heun", "stochastic")}
    assert found == {"multistep3": 8, "heun": 4, "stochastic": 4}
    with pytest.raises(ValueError, match="heun takes 3 evaluations for 2 steps"):
        solvers.steps_within("heun", 2)


WAYS = [
    Way(solver, grid, budget, budget, budget, 0.002 if grid == "edm" else 0.05, 7.0)
    for solver, budget, grid in itertools.product(("euler", "multistep"), (5, 9), solvers.GRIDS)
]
MEAN = np.array([[8.0, 7.0, 6.0, 3.2, 5.0, 4.0, 3.0, np.nan]]).T
FOUND = Table(np.array("fd"), np.array([0.5]), MEAN[..., None], MEAN, np.full((8, 1), 0.15))


def test_the_best_and_what_cannot_be_told_from_it():
    assert solvers.best(WAYS, FOUND, 0, 5) == (5, [])  # multistep on the fitted grid: 4
    assert solvers.best(WAYS, FOUND, 0, 9) == (6, [3])  # 3.0 ± 0.15, and 3.2 ± 0.15 meets it
    five, nine = solvers.recommendation(WAYS, FOUND)
    assert five.startswith("BNR 0.5, NFE ≤ 5: sample.solver=multistep sample.steps=5 sample.beta_min=0.05")
    assert "fd 3.00 ± 0.15" in nine and nine.endswith("as good: euler on the fitted grid)")


def test_the_picture_shows_the_tables():
    pytest.importorskip("matplotlib")
    from warm_jax.analysis import solver_plots

    figure = solver_plots.solvers(WAYS, [FOUND._replace(metric=np.array("w2")), FOUND])
    assert len(figure.axes) == 2 and figure.get_suptitle().endswith("BNR 0.5 multistep on the fitted grid")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    drawn = {(line.get_linestyle(), *line.get_ydata()) for line in lines if line.get_linestyle() in ("-", "--")}
    assert {("--", 8.0, 6.0), ("-", 7.0, 3.2), ("--", 5.0, 3.0)} <= drawn
    figure.draw_without_rendering()
