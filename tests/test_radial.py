"""Rings and power laws against definitions written out, and laws whose exponent is known."""

import numpy as np
import pytest

from warm_jax.diffusion import radial


def radius(height, width):
    """Half waves over the longer side, coefficient by coefficient."""
    size = max(height, width)
    return np.array(
        [[size * np.sqrt((k / height) ** 2 + (j / width) ** 2) for j in range(width)] for k in range(height)]
    )


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (1, 9), (2, 1)])
def test_rings_of_a_random_power_are_means_over_equal_frequencies(shape):
    power = np.random.default_rng(0).random(shape)
    found = radial.radial(power)
    expected = [power[np.abs(radius(*shape) - k) <= 0.5] for k in range(1, max(shape))]
    np.testing.assert_allclose(found.power, [ring.mean() for ring in expected], rtol=1e-12)
    np.testing.assert_array_equal(found.count, [ring.size for ring in expected])
    np.testing.assert_array_equal(found.k, np.arange(1, max(shape)))


@pytest.mark.parametrize("shape", [(32, 32), (28, 20)])
@pytest.mark.parametrize("exponent", [-2.0, -2.7, 0.0, 1.0])
def test_the_exponent_of_a_power_law_is_found_exactly(shape, exponent):
    power = 3 * np.maximum(radius(*shape), 0.5) ** exponent
    found = radial.slope(power, 1, 12)
    assert found.value == pytest.approx(exponent, abs=1e-9)
    assert found.intercept == pytest.approx(np.log(3), abs=1e-9) and found.misfit < 1e-9
    # Ring means against k itself are no power law: the plain fit is what this one is better than.
    if exponent == -2.0:
        spectrum = radial.radial(power)
        plain = np.polyfit(np.log(spectrum.k[:12]), np.log(spectrum.power[:12]), 1)[0]
        assert abs(plain - exponent) > 0.02


@pytest.mark.parametrize(("shape", "last"), [((32, 32), 16), ((28, 20), 14), ((5, 5), 3), ((8, 64), 32)])
def test_the_slope_that_is_quoted_is_of_the_lower_half(shape, last):
    """A power law up to N / 2 and anything above it: the exponent of the lower half, and the same as asked for."""
    r = np.maximum(radius(*shape), 0.5)
    power = np.where(r < last + 0.5, r**-1.7, 100.0)
    found = radial.slope(power)
    assert found.value == pytest.approx(-1.7, abs=1e-9) and (found.first, found.last) == (1, last)
    assert found[:2] == pytest.approx(radial.slope(power, 1, last)[:2], nan_ok=True)


def test_too_few_bands_have_no_slope():
    assert np.isnan(radial.slope(np.ones((3, 3))).value) and np.isnan(radial.slope(np.zeros((9, 9))).value)
    assert len(radial.radial(np.ones((1, 1))).k) == 0
