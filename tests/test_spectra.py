"""Spectra of fields whose spectrum is known, information as dense determinants, and the BNR found by brute force."""

import dense
import numpy as np
import pytest
import scipy.fft

from warm_jax.analysis import spectra

LOG_LEVELS = np.geomspace(*spectra.LEVELS, 65)


def field(power, count, seed):
    """uint8 images whose DCT coefficients are independent normal of this variance, in squared grey levels."""
    z = np.sqrt(power) * np.random.default_rng(seed).standard_normal((count, *power.shape))
    z[:, 0, 0] = 0
    pixels = scipy.fft.idctn(z, axes=(1, 2), norm="ortho") + 127.5
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)[..., None]


def falling(side, level):
    """∝ 1/f²."""
    return level / np.maximum(np.hypot(*np.indices((side, side))), 1) ** 2


def test_measured_power_and_its_covariance_are_scipys():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 12, 3)).astype(np.uint8)
    found = spectra.measure([images[:20], images[20:40], images[40:]])
    each = (scipy.fft.dctn(images / 127.5 - 1, axes=(1, 2), norm="ortho") ** 2).mean(-1)
    np.testing.assert_allclose(found.power, each.mean(0), rtol=1e-4, atol=1e-8)
    ring = np.rint(12 * np.hypot(np.arange(8)[:, None] / 8, np.arange(12) / 12))
    bands = np.stack([each[:, ring == k].mean(1) for k in range(1, 12)])
    np.testing.assert_allclose(found.covariance, np.cov(bands) / 50, rtol=1e-3, atol=1e-3 * np.cov(bands).max() / 50)
    assert found.count == 50
    assert np.isnan(spectra.measure([images[:1]]).covariance).all()
    with pytest.raises(ValueError, match="no images"):
        spectra.measure([])


def test_white_noise_is_flat_within_its_standard_error():
    images = np.random.default_rng(1).integers(0, 256, (1500, 16, 16, 1)).astype(np.uint8)
    measured = spectra.measure([images])
    s = spectra.spectra(measured.power, (0.5,), (0.1,), covariance=measured.covariance)
    variance = (256**2 - 1) / 12 / 127.5**2  # of a uniform byte
    z = (s.power - variance) / s.standard_error
    assert np.abs(z).max() < 3.5 and 0.4 < np.sqrt(np.mean(z**2)) < 1.6
    assert abs(s.slope) < 3 * s.slope_error and s.slope_error < 0.02
    # A coefficient is nearly normal: its square has the variance 2 σ⁴, and a ring is a mean of them.
    expected = variance * np.sqrt(2 / 1500 / spectra.radial(measured.power).count)
    np.testing.assert_allclose(s.standard_error, expected, rtol=0.15)


def test_slope_of_one_over_f_squared_is_minus_two_within_its_standard_error():
    z = []
    for seed in range(12):
        measured = spectra.measure([field(falling(16, 3e4), 200, seed)])
        found = spectra.slope(measured.power, 1, 12, measured.covariance)
        z.append((found.value + 2) / found.standard_error)
        assert found.standard_error < 0.03
    assert np.abs(z).max() < 3 and 0.5 < np.sqrt(np.mean(np.square(z))) < 1.6  # χ² of 12: p > 0.002 on both sides


def test_information_lost_is_a_log_determinant_zero_at_bnr_0_and_monotone():
    s = spectra.spectra(dense.POWER, (0, 0.5, 1, 2, 10), (0.3,))
    assert np.all(s.lost[0] == 0)
    known = s.grid > 0.03  # below, BNR 0.5 loses less than float32 can tell
    assert np.all(np.diff(s.lost[:, known], axis=0) > -1e-6)
    covariance = dense.matrix(dense.POWER)
    for level in (20, 50, 75):
        beta = s.grid[level]
        nats = []
        for ratio in (0, *s.bnrs):
            b = dense.matrix(dense.gauss(ratio * beta))
            nats.append(0.5 * np.linalg.slogdet(np.eye(dense.H * dense.W) + b @ covariance @ b.T / beta**2)[1])
        assert s.information[level] == pytest.approx(nats[0], rel=1e-9)
        np.testing.assert_allclose(s.lost[:, level], 1 - np.array(nats[1:]) / nats[0], rtol=2e-4, atol=1e-6)


def brute_force(power, budget, betas):
    """The largest ratio of a fine list within the budget, in float64."""
    lam = np.pi**2 * np.add.outer(
        (np.arange(len(power)) / len(power)) ** 2, (np.arange(power.shape[1]) / power.shape[1]) ** 2
    )
    best = 0.0
    for ratio in np.geomspace(0.02, 20, 1500):
        left = [
            np.log1p(power * np.exp(-((ratio * b) ** 2) * lam) / b**2).sum() / np.log1p(power / b**2).sum()
            for b in betas
        ]
        if 1 - min(left) <= budget:
            best = ratio
    return best


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.15])
def test_recommended_bnr_is_what_a_scan_finds(budget):
    power = 8 * falling(16, 1.0)
    expected = brute_force(power, budget, LOG_LEVELS[::8])
    assert spectra.recommended_bnr(power, budget, LOG_LEVELS[::8]) == pytest.approx(
        expected, rel=0.006
    )  # a step is 0.5 %
    s = spectra.spectra(power, (0.5,), (0.1,), budget)
    assert s.recommended == pytest.approx(expected, rel=0.006)
    assert s.binding == pytest.approx(1.0)  # the loss grows with β here
    assert np.interp(1.0, s.grid, s.scheduled) == pytest.approx(expected, rel=0.02)


def test_the_recommended_bnr_need_not_bind_at_the_highest_level():
    power = 8 * falling(16, 1.0)
    power[0, 0] = 5000  # where only the mean is left, blur costs nothing
    betas = np.geomspace(0.1, 60, 20)
    expected = brute_force(power, 0.3, betas)
    s = spectra.spectra(power, (0.5,), (0.1,), 0.3, (0.1, 60))
    assert spectra.recommended_bnr(power, 0.3, betas) == pytest.approx(expected, rel=0.006)
    assert s.binding < 59 and s.recommended == pytest.approx(expected, rel=0.01)
    power[1:], power[0, 1:] = 1e-6, 1e-6
    assert spectra.recommended_bnr(power, 0.3, betas) == np.inf


def test_cut_offs_and_blurred_spectra_in_closed_form():
    side, level = 32, 40.0
    ring = np.rint(np.hypot(*np.indices((side, side))))
    power = level / np.maximum(ring, 1) ** 2  # constant on each ring: the radial spectrum is level / k² itself
    s = spectra.spectra(power, (0, 0.5, 2), (0.1, 0.4))
    cut = np.sqrt(level) / s.grid  # level / k² = β²
    inside = (cut > 1) & (cut < side - 1)
    np.testing.assert_allclose(s.noise_cutoff[inside], cut[inside], rtol=1e-9)
    assert np.isnan(s.noise_cutoff[~inside]).all() and 10 < inside.sum() < len(cut)
    lam = (np.pi * s.blur_cutoff[1:] / side) ** 2
    np.testing.assert_allclose(np.exp(-((s.bnrs[1:, None] * s.grid) ** 2) * lam), 0.5, rtol=1e-9)
    assert np.isinf(s.blur_cutoff[0]).all()
    a = np.exp(-(0.8**2) * np.pi**2 * np.add.outer((np.arange(side) / side) ** 2, (np.arange(side) / side) ** 2) / 2)
    for k in (1, 9, 31):
        assert s.blurred[2, 1, k - 1] == pytest.approx((power * a**2)[ring == k].mean(), rel=1e-9)


def test_the_last_crossing_counts_where_the_first_band_is_weak():
    ring = np.rint(np.hypot(*np.indices((16, 16))))
    power = 40 / np.maximum(ring, 1) ** 2
    power[ring == 1] = 0.1
    s = spectra.spectra(power, (0.5,), (0.1,))
    at = np.argmin(np.abs(s.grid - 1))
    assert s.noise_cutoff[at] == pytest.approx(np.sqrt(40) / s.grid[at], rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bnrs": (0.5, -1)}, r"at least 0, not .0.5, -1"),
        ({"bnrs": (float("inf"),)}, "finite"),
        ({"betas": (0.0,)}, r"above 0, not .0.0"),
        ({"budget": 1.0}, "between 0 and 1, not 1.0"),
        ({"levels": (1.0, 0.1)}, "not 1.0 and 0.1"),
        ({"power": np.zeros((4, 4))}, "not all 0"),
        ({"power": np.ones((2, 1))}, "images of 2×1 pixels"),
        ({"power": np.full((4, 4), np.nan)}, "finite"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        spectra.spectra(**{"power": dense.POWER, "bnrs": (0.5,), "betas": (0.1,), **change})
