"""The grid of corrupted images against scipy's blur, and against the noise itself."""

import dense
import jax
import numpy as np
import pytest

from warm_jax.analysis.corruption import corruption

BNRS, LEVELS = (0.0, 0.5, 2.0, np.inf), (0.1, 0.5, 3.0)
IMAGE = np.random.RandomState(0).uniform(-1, 1, (20, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def found():
    return corruption(jax.random.key(0), IMAGE, BNRS, LEVELS)


def test_targets_are_scipys_blur_and_what_it_removed(found):
    np.testing.assert_allclose(found.alphas, [[0, 0, 0], [0.05, 0.25, 1.5], [0.2, 1, 6], [0.2, 1, 6]])
    for row in range(4):
        for column in range(3):
            blurred = dense.blurred(IMAGE, found.alphas[row, column])
            np.testing.assert_allclose(found.blurred[row, column], blurred, atol=2e-6)
            np.testing.assert_allclose(found.residual[row, column], IMAGE - blurred, atol=2e-6)


def test_noise_is_white_of_level_beta_and_the_same_for_each_bnr(found):
    np.testing.assert_array_equal(found.betas, [LEVELS, LEVELS, LEVELS, (0, 0, 0)])
    noise = (found.states[:3] - found.blurred[:3]) / np.reshape(LEVELS, (1, 3, 1, 1, 1))
    np.testing.assert_allclose(noise[1:], noise[:1].repeat(2, 0), atol=2e-5)
    np.testing.assert_allclose(noise.std(axis=(2, 3, 4)), 1, atol=5 / np.sqrt(2 * IMAGE.size))
    np.testing.assert_allclose(noise.mean(axis=(2, 3, 4)), 0, atol=5 / np.sqrt(IMAGE.size))
    assert not np.allclose(noise[0, 0], noise[0, 1])


def test_infinity_is_the_largest_finite_blur_without_noise(found):
    np.testing.assert_array_equal(found.states[3], found.blurred[2])


@pytest.mark.parametrize("bad", [(0.0, np.inf), (-1.0,), (np.nan,), ()])
def test_bad_bnrs_are_refused(bad):
    with pytest.raises(ValueError, match=r"BNR|blur-to-noise"):
        corruption(jax.random.key(0), IMAGE, bad, LEVELS)
