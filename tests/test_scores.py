"""Scores against closed forms, and against slow definitions written out here (brute force, scipy)."""

import numpy as np
import pytest
import scipy.stats

from warm_jax.metrics import neighbours
from warm_jax.metrics.neighbours import authenticity, density_coverage, nearest, precision_recall
from warm_jax.metrics.scores import (
    decibels,
    inception_score,
    kernel_distance,
    kid,
    log_spectral_distance,
    radial_power,
    sliced_wasserstein,
)


def normal(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d))


def test_inception_score_of_certain_and_of_ignorant_predictions():
    # p(y|x) one-hot and classes in equal number: KL = log K. p(y|x) = p(y): KL = 0.
    one_hot = 1e4 * np.tile(np.eye(7), (30, 1))
    assert inception_score(one_hot, splits=10) == pytest.approx((7, 0), abs=1e-9)
    assert inception_score(np.zeros((50, 7)), splits=5) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_of_splits_matches_scipy_entropies():
    logits = 3 * normal(103, 5, 0)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    parts = [p[:34], p[34:68], p[68:]]
    expected = [np.exp(np.mean([scipy.stats.entropy(q, part.mean(axis=0)) for q in part])) for part in parts]
    assert inception_score(logits, splits=3) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-10)
    with pytest.raises(ValueError, match="3 images cannot be cut into 10"):
        inception_score(logits[:3])


def test_kernel_distance_is_the_mean_over_distinct_pairs():
    x, y = normal(9, 4, 0), normal(6, 4, 1) + 1

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kernel_distance_is_unbiased():
    # Signs with mean s: products are ±1 with mean s·s', and (p + 1)³ is 8 or 0, so E k = 4 (1 + s s').
    rng = np.random.default_rng(0)

    def signs(n, s):
        return np.where(rng.random((n, 1)) < (1 + s) / 2, 1.0, -1.0)

    for s, t in ((0.0, 0.0), (0.4, 0.4), (0.5, -0.5)):
        values = [kernel_distance(signs(5, s), signs(8, t)) for _ in range(1000)]
        expected = 4 * (1 + s * s) + 4 * (1 + t * t) - 8 * (1 + s * t)
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / np.sqrt(len(values)))


def test_kid_of_equal_sets_is_zero_within_its_error_and_grows_with_a_shift():
    x, y = normal(2000, 8, 0), normal(2000, 8, 1)
    same = kid(x, y, subsets=50, subset_size=200)
    assert abs(same.value) < 4 * same.std / np.sqrt(20)  # 2000/200 disjoint subsets a side
    assert kid(x, y + 0.5, subsets=50, subset_size=200).value > 5 * same.std
    assert kid(x, y, subsets=50, subset_size=200) == same
    with pytest.raises(ValueError, match="subsets of 3000 need as many"):
        kid(x, y, subset_size=3000)


def test_precision_and_recall_on_constructed_sets():
    cloud = normal(300, 2, 0)
    far = cloud + 1000
    assert precision_recall(cloud, cloud) == (1, 1)
    assert precision_recall(cloud, far) == (0, 0)
    # Half of the samples are where the reference is, the reference has a mode that the samples miss.
    samples = np.concatenate([cloud, cloud - 1000])
    reference = np.concatenate([cloud, far, far])
    reference[300:] += normal(600, 2, 1)
    assert precision_recall(samples, reference) == pytest.approx((1 / 2, 1 / 3))


def test_precision_and_recall_match_brute_force_in_any_batch():
    samples, reference = normal(40, 3, 0), normal(50, 3, 1) + 0.8

    def inside(x, centres):
        count = 0
        for point in x:
            covered = False
            for c in centres:
                radius = sorted(np.linalg.norm(c - other) for other in centres)[3]
                covered |= np.linalg.norm(c - point) <= radius
            count += covered
        return count / len(x)

    expected = (inside(samples, reference), inside(reference, samples))
    assert 0 < expected[0] < 1
    for batch in (7, 1024):
        assert precision_recall(samples, reference, batch=batch) == pytest.approx(expected)
    with pytest.raises(ValueError, match="k = 50 neighbours"):
        precision_recall(samples, reference, k=50)


def test_density_and_coverage_on_a_line():
    """Of whole numbers as reference every radius is 1 for k = 1; a sample between two of them is in two balls."""
    line = np.arange(12.0)[:, None]
    assert density_coverage(line[:-1] + 0.25, line, k=1) == (2, 1)
    assert density_coverage(line[:3] + 0.25, line, k=1) == (2, 4 / 12)
    assert density_coverage(line[:3] + 100, line, k=1) == (0, 0)
    # A crowd at an outlier, which is in one ball of the five that count; whole numbers have exact distances.
    cloud = np.round(1e4 * normal(300, 4, 0))
    crowd = np.concatenate([cloud, np.full((1, 4), 1e6)])
    assert density_coverage(np.full((50, 4), 1e6) + 1, crowd) == (1 / 5, 1 / 301)


def test_coverage_of_half_of_the_modes_is_one_half():
    """And density is 1: an open ball around each reference image holds itself and k - 1 others."""
    cloud = np.round(1e4 * normal(300, 4, 0))
    for batch in (7, 1024):
        assert density_coverage(cloud, np.concatenate([cloud, cloud + 1e6]), batch=batch) == (1, 1 / 2)
        assert density_coverage(cloud, cloud, batch=batch) == (1, 1)
    with pytest.raises(ValueError, match="k = 5 neighbours need more features than 5 references"):
        density_coverage(cloud, cloud[:5])


def test_coverage_of_a_fresh_draw_is_one_minus_two_to_the_minus_k():
    """Of 2k points nearest to a reference image, half of which are samples, all k of the nearest are its own."""
    for k in (1, 3):
        found = density_coverage(normal(2000, 3, 0), normal(2000, 3, 1), k=k)
        assert found.coverage == pytest.approx(1 - 2.0**-k, abs=0.03) and found.density == pytest.approx(1, abs=0.05)


def test_duplicated_training_images_are_copies_and_held_out_ones_are_not():
    """Of a fresh draw those are closer that are mutual nearest neighbours: 2/3 on a line, 0.6215 in the plane.

    In the plane 6π / (8π + 3√3) (Pickard 1982).
    """
    expected = {1: 2 / 3, 2: 6 * np.pi / (8 * np.pi + 3 * np.sqrt(3))}
    for d, share in expected.items():
        rng = np.random.default_rng(d)
        training, held_out = rng.random((3000, d)), rng.random((3000, d))
        assert authenticity(training[:1000], training) == 0
        assert authenticity(held_out, training) == pytest.approx(1 - share, abs=0.03)
        mixed = np.concatenate([training[:500] + 1e-9, rng.random((500, d)) + 50])  # copies, and what is like nothing
        assert authenticity(mixed, training, batch=64) == 0.5


def test_a_copy_of_an_image_that_is_there_twice_is_found():
    training = np.concatenate([normal(50, 3, 0), normal(50, 3, 0)])
    assert authenticity(training[:20] + 1e-6, training) == 0
    assert authenticity(np.ones((4, 3)), np.zeros((9, 3))) == 1  # there is no distance to compare with


def test_the_nearest_match_brute_force_in_any_batch(monkeypatch):
    samples, training = normal(40, 3, 0), normal(50, 3, 1)
    across = np.linalg.norm(samples[:, None] - training, axis=2)
    order = across.argsort(axis=1)[:, :4]
    among = np.linalg.norm(training[:, None] - training, axis=2) + np.diag(np.full(50, np.inf))
    for batch, numbers in ((7, 30), (512, 2**25)):  # ten training images at once, and all
        monkeypatch.setattr(neighbours, "_NUMBERS", numbers)
        found = nearest(samples, training, 4, batch)
        np.testing.assert_array_equal(found.indices, order)
        np.testing.assert_allclose(found.distances, np.take_along_axis(across, order, axis=1), rtol=1e-12)
        np.testing.assert_allclose(found.own, among.min(axis=1)[order[:, 0]], rtol=1e-12)
    with pytest.raises(ValueError, match="k = 50 neighbours need more features than 50 training images"):
        nearest(samples, training, 50)


def test_the_nearest_of_bytes_are_exact():
    images = np.random.default_rng(0).integers(0, 256, (60, 784), dtype=np.uint8)
    found = nearest(images[:30], images)
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(30))
    np.testing.assert_array_equal(found.distances, 0)


def test_shuffled_splits_serve_sorted_samples():
    """Certain predictions, sorted by class: a split of one class scores 1; shuffled ones nearly all 5 classes."""
    logits = 1e4 * np.repeat(np.eye(5), 100, axis=0)
    assert inception_score(logits, splits=5) == pytest.approx((1, 0), abs=1e-9)
    shuffled = inception_score(logits, splits=5, shuffle=0)
    order = np.random.default_rng(0).permutation(500)
    counts = np.stack([np.bincount(order[i * 100 : (i + 1) * 100] // 100, minlength=5) for i in range(5)])
    expected = np.exp(scipy.stats.entropy(counts, axis=1))
    assert shuffled == pytest.approx((expected.mean(), expected.std()), rel=1e-9) and shuffled.value > 4.7


def test_sliced_wasserstein_of_a_shift():
    # On the direction θ a shift by v costs (θ·v)², whose mean over directions is |v|²/d.
    x = normal(50, 12, 0)
    shift = np.arange(12.0)
    expected = np.linalg.norm(shift) / np.sqrt(12)
    assert sliced_wasserstein(x + shift, x, projections=4000) == pytest.approx(expected, rel=0.05)
    assert sliced_wasserstein(x, x) == 0


@pytest.mark.parametrize(("n", "m"), [(4, 6), (5, 3), (7, 7), (1, 4)])
def test_sliced_wasserstein_of_unequal_counts_on_a_line(n, m):
    x, y = normal(n, 1, 0), normal(m, 1, 1)
    common = np.lcm(n, m)  # repeated to equal counts, sorted points are matched in order
    repeated = np.sort(np.repeat(x, common // n)), np.sort(np.repeat(y, common // m))
    expected = np.sqrt(np.mean((repeated[0] - repeated[1]) ** 2))
    assert sliced_wasserstein(x, y, projections=1) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_takes_images():
    images = np.random.default_rng(0).integers(0, 255, (10, 4, 4, 3), dtype=np.uint8)
    assert sliced_wasserstein(images + np.uint8(1), images) == pytest.approx(1, rel=0.1)
    with pytest.raises(ValueError, match="shape"):
        sliced_wasserstein(images, images[:, :2])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 8)])
def test_a_cosine_has_power_in_its_band_only(height, width):
    # A cos(πk(x+½)/W) has the orthonormal coefficient A √(HW/2) at (0, k); k counts half-periods over the shorter side.
    k = 3
    wave = 10 * np.cos(np.pi * k * (np.arange(width) + 0.5) / width)
    power = radial_power(np.broadcast_to(wave, (2, height, width))[..., None] + 100.0)
    band = k * max(height, width) // width
    radius = max(height, width) * np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width)
    inside = (np.rint(radius) == band).sum()
    expected = np.zeros(16)
    expected[band - 1] = 100 * height * width / 2 / inside
    np.testing.assert_allclose(power, expected, atol=1e-9)


def test_white_noise_is_flat_and_louder_noise_is_decibels_away():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, 16, 16, 3))
    quiet, loud = radial_power(10 * noise), radial_power(20 * rng.standard_normal((400, 16, 16, 3)))
    np.testing.assert_allclose(quiet, 100, rtol=0.1)
    np.testing.assert_allclose(decibels(loud, quiet), 20 * np.log10(2), atol=0.5)
    assert log_spectral_distance(loud, quiet) == pytest.approx(20 * np.log10(2), abs=0.2)
    assert log_spectral_distance(quiet, quiet) == 0
    with pytest.raises(ValueError, match="spectra of 16 and of 8"):
        log_spectral_distance(quiet, quiet[:8])


def test_powers_below_rounding_are_not_told_apart():
    assert log_spectral_distance(np.zeros(4), np.full(4, 1e-9)) < 1e-6


def test_spectra_take_bytes():
    images = np.random.default_rng(0).integers(0, 256, (1030, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_allclose(radial_power(images), (256**2 - 1) / 12, rtol=0.1)  # variance of a uniform byte
