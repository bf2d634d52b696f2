"""What the heads have to learn, against dense linear algebra, and against what predictors really leave."""

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from warm_jax.analysis import learning
from warm_jax.diffusion import bnr, oracle, process
from warm_jax.diffusion.process import Prediction

BNRS, BETAS = (0.0, 0.5, 2.0), (0.05, 0.4, 3.0)
PIXELS = dense.H * dense.W


def gaussian_images(n, seed=0):
    z = np.sqrt(dense.POWER) * np.random.RandomState(seed).randn(n, dense.H, dense.W)
    return scipy.fft.idctn(z, axes=(1, 2), norm="ortho")[..., None].astype(np.float32)


def test_energies_add_up_frequency_by_frequency():
    for f in [(0, 0), (1, 2), (5, 7)]:
        power = np.zeros((dense.H, dense.W))
        power[f] = 7.0
        found = learning.learning(power, BNRS, BETAS)
        for i, ratio in enumerate(BNRS):
            for j, beta in enumerate(BETAS):
                a = np.exp(-((ratio * beta) ** 2) * dense.LAM[f] / 2)
                got = [found.blurred[i, j], found.residual[i, j], found.cross[i, j]]
                np.testing.assert_allclose(
                    np.multiply(got, PIXELS), 7 * np.array([a**2, (1 - a) ** 2, 2 * a * (1 - a)]), atol=1e-12
                )
        np.testing.assert_allclose(found.blurred + found.residual + found.cross, found.clean, rtol=1e-12)
        assert found.clean == pytest.approx(7 / PIXELS)


def test_the_linear_part_is_dense_conditioning():
    """Of C, the posterior covariance of x0 in pixels: tr(B C Bᵀ) and tr((I-B) C (I-B)ᵀ) are left."""
    found, covariance, one = learning.learning(dense.POWER, BNRS, BETAS), dense.matrix(dense.POWER), np.eye(PIXELS)
    for i, ratio in enumerate(BNRS):
        for j, beta in enumerate(BETAS):
            b = dense.matrix(dense.gauss(ratio * beta))
            gain = covariance @ b.T @ np.linalg.inv(b @ covariance @ b.T + beta**2 * one)
            left = covariance - gain @ b @ covariance
            expected = [np.trace(left), np.trace(b @ left @ b.T), np.trace((one - b) @ left @ (one - b).T)]
            got = [found.clean_error[i, j], found.blurred_error[i, j], found.residual_error[i, j]]
            np.testing.assert_allclose(np.multiply(got, PIXELS), expected, rtol=1e-8, atol=1e-10)
            assert found.deblurring[i, j] == pytest.approx(np.trace((one - b) @ left) / np.trace(left), abs=1e-10)
            energy = np.trace(b @ covariance @ b.T)
            assert found.blurred_explained[i, j] == pytest.approx(1 - expected[1] / energy, abs=1e-10)
    assert np.isnan(found.residual_explained[0]).all() and np.all(found.deblurring[0] == 0)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_gaussian_oracle_leaves_what_the_linear_part_says(key, ratio):
    images, p = gaussian_images(3000), process.warm(dense.SHAPE, bnr.constant(ratio))
    expected = learning.learning(dense.POWER, (ratio,), BETAS)
    found = learning.explained(key, oracle.gaussian(p, dense.POWER), p, images, BETAS, batch_size=512)
    scores = []
    for name in ("blurred_explained", "residual_explained", "deblurring"):
        z = (getattr(found, name) - getattr(expected, name)[0]) / getattr(found, name + "_se")
        scores.append(z)
        assert getattr(found, name + "_se").max() < 0.02, name
    assert (
        np.abs(scores).max() < 4 and np.sqrt(np.mean(np.square(scores))) > 0.3
    )  # standard errors are neither too small nor too large
    noise = 5 * np.sqrt(2 / 3000)  # of a mean of 3000 squares of at least one normal variable
    for name in ("blurred", "residual", "clean_error", "blurred_error", "residual_error"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name)[0], rtol=noise)
    np.testing.assert_allclose(found.alphas, ratio * np.array(BETAS), rtol=1e-6)


def test_measured_numbers_are_sums_over_these_images(key):
    """A predictor that says nothing leaves all: the energies of the very targets, by scipy's blur."""
    images, p = gaussian_images(5), process.warm(dense.SHAPE, bnr.constant(2.0))
    found = learning.explained(key, lambda x, t: Prediction(0 * x, 0 * x), p, images, BETAS, batch_size=2)
    for j, beta in enumerate(BETAS):
        blurred = dense.blurred(images, 2 * beta)
        assert found.blurred[j] == pytest.approx(np.mean(blurred**2), rel=1e-5)
        assert found.residual_error[j] == pytest.approx(np.mean((images - blurred) ** 2), rel=1e-4)
        share = np.sum((images - blurred) * images) / np.sum(images.astype(np.float64) ** 2)
        assert found.deblurring[j] == pytest.approx(share, rel=1e-4)
    np.testing.assert_allclose(found.blurred_explained, 0, atol=1e-6)
    assert found.count == 5


def test_batches_do_not_matter_and_a_predictor_is_traced_once(key):
    images, p, traces = gaussian_images(10), process.warm(dense.SHAPE, bnr.constant(0.5)), []
    weight = jnp.asarray(0.3)

    def predict(weight, x, t, labels):
        traces.append(1)
        return Prediction(weight * x, labels[:, :1, None, None] * x)

    labels = np.eye(10, 4, dtype=np.float32)
    whole = jax.tree_util.Partial(predict, weight)
    found = [learning.explained(key, whole, p, images, BETAS, labels=labels, batch_size=size) for size in (3, 64)]
    assert len(traces) == 2
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-10)  # errors are differences of sums of order one


def test_without_blur_there_is_no_residual_to_explain(key):
    p = process.warm(dense.SHAPE, bnr.constant(0.0))
    found = learning.explained(key, oracle.gaussian(p, dense.POWER), p, gaussian_images(50), BETAS)
    assert np.isnan(found.residual_explained).all() and np.isnan(found.residual_explained_se).all()
    np.testing.assert_allclose(found.deblurring, 0, atol=1e-5)


def test_bad_input_is_named(key):
    p = process.hot(dense.SHAPE)
    with pytest.raises(ValueError, match="nothing to measure: 0 images"):
        learning.explained(key, oracle.gaussian(p, dense.POWER), p, gaussian_images(0), BETAS)
    with pytest.raises(ValueError, match=r"above 0, not .-1"):
        learning.learning(dense.POWER, BNRS, (-1.0,))
    with pytest.raises(ValueError, match="finite"):
        learning.learning(dense.POWER, (np.inf,), BETAS)
