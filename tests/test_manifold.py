"""The departure from the forward process, where it has a closed form: a data set of one image makes p_t a Gaussian."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from warm_jax.analysis import distances, manifold
from warm_jax.diffusion import bnr, process

DIM = dense.H * dense.W
LEVELS = np.array([3.0, 0.4])
ONE = np.random.RandomState(0).uniform(-1, 1, (1, *dense.SHAPE)).astype(np.float32)
OTHER = np.random.RandomState(1).uniform(-1, 1, (1, *dense.SHAPE)).astype(np.float32)
MANY = np.random.RandomState(2).uniform(-1, 1, (20, *dense.SHAPE)).astype(np.float32)


def warm(ratio):
    return process.warm(dense.SHAPE, bnr.constant(ratio))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_gap_of_shifted_and_of_noisier_states_is_known(key, ratio):
    """-log N(m, β²): a shift d costs |d|² / 2β² nats, noise of k times the size (k² - 1) / 2 nats a dimension."""
    p, count = warm(ratio), 200
    forward = manifold.forward_states(p, ONE, LEVELS, key, count)
    shift = 0.2 * np.random.RandomState(3).randn(*dense.SHAPE).astype(np.float32)
    density_gap = jax.jit(lambda x: manifold.density_gap(p, ONE, x, forward, LEVELS))
    gap = density_gap(forward + shift)
    size = np.linalg.norm(shift)
    error = 4 * size / (LEVELS * DIM * np.sqrt(count))  # ε · d / β a dimension
    assert np.all(np.abs(gap - size**2 / (2 * LEVELS**2) / DIM) < error + 1e-5)
    centre = np.stack([dense.blurred(ONE[0], ratio * t) for t in LEVELS])[:, None]
    for k in (0.5, 1.2):
        scaled = (centre + k * (np.asarray(forward) - centre)).astype(np.float32)
        np.testing.assert_allclose(density_gap(scaled), (k**2 - 1) / 2, rtol=4 * np.sqrt(2 / (DIM * count)))


def test_forward_states_have_no_gap_and_moved_ones_the_more_the_farther(key):
    """Over ten repetitions with keys of their own, so that nothing is shared but the law."""
    p = warm(0.5)
    shift = np.random.RandomState(3).randn(*dense.SHAPE).astype(np.float32)
    shift /= np.linalg.norm(shift)

    @jax.jit
    def gaps(keys):
        x, y = (manifold.forward_states(p, MANY, LEVELS, key, 64) for key in keys)
        moved = [x + far * LEVELS[:, None, None, None, None].astype(np.float32) * shift for far in (0.0, 2.0, 8.0)]
        return jnp.stack([manifold.density_gap(p, MANY, states, y, LEVELS) for states in moved])

    found = np.stack([gaps(keys) for keys in jax.random.split(key, (10, 2))], axis=-1)  # [distance, level, repetition]
    mean, half = distances.interval(found)
    assert np.all(np.abs(mean[0]) < 2 * half[0]) and np.all(half[0] < 0.02)
    assert np.all(mean[1] - half[1] > mean[0] + half[0]) and np.all(mean[2] - half[2] > mean[1] + half[1])
    # Far from all images but its own, a state moved by d pays |d|² / 2β² as if there were one; never more.
    assert np.all(mean[2] < 32 / DIM + half[2]) and mean[2, 1] > 0.8 * 32 / DIM


def test_states_are_those_of_the_levels_and_share_their_noise(key):
    """Of one image x̂0 is constant, so Heun is exact: only that the prior left out B x0 of β = 80 remains."""
    ratio = 0.5
    p = warm(ratio)
    levels = p.levels(6)
    _, predict = manifold.empirical(jnp.asarray(ONE), ratio)
    reverse = jax.jit(lambda key: manifold.reverse_states(predict, p, levels, key, 4))(key)
    forward = manifold.forward_states(p, ONE, levels[1:-1], key, 4)
    rest = -levels[1:-1, None, None, None] / 80 * dense.blurred(ONE[0], 80 * ratio)
    np.testing.assert_allclose(reverse - forward, np.broadcast_to(rest[:, None], forward.shape), atol=2e-5)
    noise = (np.asarray(forward)[-1] - dense.blurred(ONE[0], 0.002 * ratio)) / 0.002
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.001


def noncentral_chi(shift, dim):
    """E |N(shift, 2 I)| in `dim` dimensions: of the difference of two states of unit noise (a Laguerre function)."""
    scale = 2 * scipy.special.gamma((dim + 1) / 2) / scipy.special.gamma(dim / 2)
    return scale * scipy.special.hyp1f1(-0.5, dim / 2, -(shift**2) / 4)


@pytest.mark.parametrize("shift", [0.0, 1.0, 6.0])
def test_energy_distance_of_gaussians(shift):
    dim, rng = 5, np.random.RandomState(0)
    x, y = rng.randn(2, 20, 100, dim).astype(np.float32)  # 20 levels for 20 repetitions
    x[..., 0] += shift
    found = np.asarray(distances.energy_distance(jnp.asarray(x), jnp.asarray(y)))
    expected = 2 * noncentral_chi(shift, dim) / noncentral_chi(0, dim) - 2
    assert abs(np.mean(found) - expected) < 3 * np.std(found, ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(distances.energy_distance(jnp.asarray(y), jnp.asarray(y)), 0, atol=1e-5)


def test_neighbour_distance_by_hand():
    """On a line 0, 3, 6, 9 the nearest other is 3 away; from 4 beside the line it is 5."""
    line = np.zeros((1, 4, 2), np.float32)
    line[0, :, 0] = [0, 3, 6, 9]
    beside = line + np.array([0, 4], np.float32)
    np.testing.assert_allclose(
        distances.neighbour_distance(jnp.asarray(beside), jnp.asarray(line)), 5 / 3 - 1, rtol=1e-6
    )
    np.testing.assert_allclose(distances.neighbour_distance(jnp.asarray(line), jnp.asarray(line)), 0, atol=1e-6)


def test_interval_is_students(key):
    values = np.random.RandomState(0).randn(3, 6)
    mean, half = distances.interval(values)
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(values, 1), scipy.stats.sem(values, axis=1))
    np.testing.assert_allclose(mean - half, low)
    np.testing.assert_allclose(mean + half, high)


@pytest.mark.parametrize(
    ("solver", "traced", "ratios", "steps"), [("euler", True, [0.0, 0.5], [4, 3]), ("heun", False, [0.5], [4])]
)
def test_a_predictor_of_the_wrong_image_departs_by_what_it_must(tmp_path, solver, traced, ratios, steps):
    """It leads to N(B x1 - β/80 B x1, β²), while p_t is N(B x0, β²): |d|² / 2β² nats at each level, both BNRs."""
    seeds, count = [0, 1, 2], 32
    result = manifold.manifold(
        manifold.empirical, ONE, ratios, steps, params_of=lambda bnr, seed: OTHER, seeds=seeds, count=count,
        solver=solver, traced=traced,
    )  # fmt: skip
    assert result.nfe.tolist() == [2 * number - 1 if solver == "heun" else number for number in steps]
    np.savez(tmp_path / "manifold.npz", **result._asdict())
    with np.load(tmp_path / "manifold.npz", allow_pickle=False) as stored:
        assert set(stored) == set(manifold.Manifold._fields)
    gap, departure, neighbour, energy = range(4)
    for i, ratio in enumerate(ratios):
        for j, number in enumerate(steps):
            levels = warm(ratio).levels(number)[1:-1]
            np.testing.assert_allclose(result.levels[j, : number - 1], levels, rtol=1e-6)
            assert np.all(np.isnan(result.levels[j, number - 1 :]))
            expected = []
            for level in levels:
                left = dense.blurred(OTHER[0], ratio * level) - level / 80 * dense.blurred(OTHER[0], ratio * 80)
                size = np.linalg.norm(left - dense.blurred(ONE[0], ratio * level))
                expected.append(size**2 / (2 * level**2) / DIM)
                error = 4 * size / (level * DIM * np.sqrt(count * len(seeds)))
                found = result.mean[gap, i, j, len(expected) - 1]
                assert abs(found - expected[-1]) < error + 2e-3 * expected[-1] + 1e-6
            average = scipy.integrate.trapezoid(result.mean[gap, i, j, : number - 1], -np.log(levels))
            np.testing.assert_allclose(result.average[gap, i, j], average / np.log(levels[0] / levels[-1]), rtol=1e-4)
            # At β = 0.002 the two Gaussians are 80 dims of noise apart: twice the gap, and distances by their means.
            last = number - 2
            np.testing.assert_allclose(result.mean[departure, i, j, last], 2 * expected[-1], rtol=1e-3)
            size = np.linalg.norm(OTHER - ONE) / (0.002 * noncentral_chi(0, DIM))
            np.testing.assert_allclose(result.mean[energy, i, j, last], 2 * size - 2, rtol=0.02)
            assert result.mean[neighbour, i, j, last] > 0.9 * size - 1


def test_without_a_density_only_distances_are_measured():
    result = manifold.manifold(
        manifold.empirical, ONE, [0.5], [8], params_of=lambda bnr, seed: ONE, seeds=[0, 1], count=4, solver="euler",
        density=False,
    )  # fmt: skip
    assert np.isnan(result.mean[:2]).all() and np.isfinite(result.mean[2:]).all()
    assert np.abs(result.mean[2:]).max() < 1e-2  # the exact sampler of one image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0]}, "at least 2 different seeds"),
        ({"seeds": [1, 1]}, "at least 2 different seeds"),
        ({"count": 1}, "2 states each, not .* and 1"),
        ({"steps": [1]}, r"numbers of steps of at least 2, not \[0.5\] and \[1\]"),
        ({"bnrs": [-1.0]}, "ratios of at least 0"),
    ],
)
def test_bad_requests_are_named(changes, message):
    request = {"bnrs": [0.5], "steps": [3], "seeds": [0, 1], "count": 4} | changes
    with pytest.raises(ValueError, match=message):
        manifold.manifold(manifold.empirical, ONE, **request)
