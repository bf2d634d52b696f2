"""Distances of Gaussians: commuting ones in closed form, scipy's matrix square root, draws from known populations."""

import numpy as np
import pytest
import scipy.linalg

from warm_jax.metrics.frechet import INCEPTION, cautions, expected_bias, frechet_distance, frechet_infinity, score_name
from warm_jax.metrics.moments import Moments, moments


def covariance(d, seed):
    a = np.random.default_rng(seed).standard_normal((d, d))
    return a @ a.T / d


def test_commuting_gaussians_in_closed_form():
    # Diagonal covariances: d² = |Δμ|² + Σ (σ₁ - σ₂)².
    mean, deviations = np.array([1.0, -2.0, 0.5]), (np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 3.5]))
    a = Moments(mean, np.diag(deviations[0] ** 2), None)
    b = Moments(np.zeros(3), np.diag(deviations[1] ** 2), None)
    expected = 1 + 4 + 0.25 + 1 + 2.25 + 0.25
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_general_gaussians_match_the_matrix_square_root():
    a, b = Moments(np.ones(20), covariance(20, 0), None), Moments(np.zeros(20), covariance(20, 1), None)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = 20 + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_singular_covariances_need_no_epsilon():
    # Two lines at an angle of 60° in the plane: tr (Σ₁Σ₂)^½ = cos 60°, so d² = 1 + 1 - 2 · ½.
    u, v = np.array([1.0, 0.0, 0.0]), np.array([0.5, np.sqrt(0.75), 0.0])
    a, b = (Moments(np.zeros(3), np.outer(w, w), None) for w in (u, v))
    assert frechet_distance(a, b) == pytest.approx(1, abs=1e-7)
    point = Moments(np.zeros(3), np.zeros((3, 3)), None)
    assert frechet_distance(point, a) == pytest.approx(1, abs=1e-12)


def test_what_is_no_pair_of_covariances_is_refused():
    a = Moments(np.zeros(2), np.eye(2), None)
    with pytest.raises(ValueError, match="dimension 2 and of 3"):
        frechet_distance(a, Moments(np.zeros(3), np.eye(3), None))
    with pytest.raises(ValueError, match="not a covariance"):
        frechet_distance(a, Moments(np.zeros(2), np.diag([1.0, -1.0]), None))


def test_expected_bias_is_that_of_samples_of_a_known_gaussian():
    d, n, repeats = 8, 400, 300
    population = Moments(np.zeros(d), covariance(d, 3), None)
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(population.covariance)
    values = [frechet_distance(moments(rng.standard_normal((n, d)) @ root.T), population) for _ in range(repeats)]
    error = np.std(values) / np.sqrt(repeats)
    assert expected_bias(population, n) == pytest.approx(np.mean(values), abs=4 * error + 0.02 * np.mean(values))


def test_expected_bias_of_one_dimension():
    # (x̄)² + (σ̂ - σ)² of n normal numbers: σ²/n + σ²/(2n).
    assert expected_bias(Moments(np.zeros(1), np.array([[4.0]]), None), 100) == pytest.approx(4 / 100 * 1.5)


def test_extrapolation_removes_most_of_the_bias():
    d, n = 24, 1500
    population = Moments(np.zeros(d), covariance(d, 4), None)
    shifted = np.random.default_rng(5).standard_normal((n, d)) @ np.linalg.cholesky(population.covariance).T + 0.1
    truth = 0.01 * d
    biased = frechet_distance(moments(shifted), population)
    limit = frechet_infinity(shifted, population)
    assert biased - truth > 2 * abs(limit.value - truth)
    assert limit.slope > 0
    assert frechet_infinity(shifted, population) == limit


def test_names_carry_the_count_and_only_inception_is_called_fid():
    assert score_name("fid", INCEPTION, 50_000) == "fid50k"
    assert score_name("fid", INCEPTION, 2_000) == "fid2k"
    assert score_name("fid", INCEPTION, 1_500) == "fid1500"
    assert score_name("kid", INCEPTION, 5_000) == "kid5k"
    assert score_name("fid", "fashion_cnn", 5_000) == "fd_fashion_cnn_5k"
    assert score_name("fid", "efficientnet_lite0@128", 10_000) == "fd_efficientnet_lite0@128_10k"
    assert score_name("kid", "fashion_cnn", 999) == "kid_fashion_cnn_999"


def test_cautions_are_said_where_they_are_due():
    reference = Moments(np.zeros(4), np.eye(4), 10_000)
    assert cautions(Moments(np.zeros(4), np.eye(4), 1000), reference) == []
    assert "singular" in cautions(Moments(np.zeros(4), np.eye(4), 4), reference)[0]
    assert "perfect sampler would score about 0.45" in cautions(Moments(np.zeros(4), np.eye(4), 20), reference)[0]
    assert "identical" in cautions(Moments(np.zeros(4), np.zeros((4, 4)), 1000), reference)[0]
    unknown = Moments(np.zeros(4), np.eye(4), None)
    assert "does not say" in cautions(Moments(np.zeros(4), np.eye(4), 1000), unknown)[0]
