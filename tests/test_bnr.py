"""BNR schedules against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from warm_jax.diffusion import bnr

H, W = 12, 16
LAM = np.pi**2 * ((np.arange(H) / H)[:, None] ** 2 + (np.arange(W) / W) ** 2)
POWER = 1 / (LAM + 0.01)


def information(alpha, beta):
    """Mutual information as a dense log-determinant: ½ log det(I + A Σ Aᵀ / β²)."""
    blur, covariance = np.diag(np.exp(-(alpha**2) * LAM / 2).ravel()), np.diag(POWER.ravel())
    return 0.5 * np.linalg.slogdet(np.eye(H * W) + blur @ covariance @ blur.T / beta**2)[1]


def test_constant():
    np.testing.assert_allclose(bnr.constant(0.5)(jnp.asarray([0.0, 1.0, 80.0])), [0, 0.5, 40])
    np.testing.assert_array_equal(bnr.constant(0.0)(jnp.asarray([3.0])), [0])


@pytest.mark.parametrize("bad", [-0.1, float("inf"), float("nan")])
def test_bad_ratio_is_named(bad):
    with pytest.raises(ValueError, match=f"not {bad}"):
        bnr.constant(bad)


@pytest.mark.parametrize("beta", [0.01, 0.3, 2.0, 50.0])
def test_information_lost_equals_log_determinant(beta):
    for alpha in (0.0, 0.05, 0.5, 4.0):
        expected = 1 - information(alpha, beta) / information(0, beta)
        np.testing.assert_allclose(bnr.information_lost(POWER, alpha, beta), expected, rtol=2e-4, atol=1e-6)


def test_information_lost_grows_with_the_ratio():
    lost = bnr.information_lost(POWER, jnp.asarray([0.0, 0.5, 1.0, 2.0, 10.0]) * 0.3, 0.3)
    assert lost[0] == 0 and np.all(np.diff(lost) > 0) and lost[-1] < 1


@pytest.mark.parametrize("fraction", [0.02, 0.2])
def test_budget_is_spent_exactly(fraction):
    betas = np.array([0.05, 0.4, 3.0])
    alphas = jax.jit(bnr.information_budget(POWER, fraction))(jnp.asarray(betas, jnp.float32))
    for alpha, beta in zip(alphas, betas, strict=True):
        spent = lambda a, beta=beta: information(a, beta) - (1 - fraction) * information(0, beta)  # noqa: E731
        np.testing.assert_allclose(alpha, scipy.optimize.brentq(spent, 1e-6, 40), rtol=1e-3)


def test_budget_on_a_scalar_and_where_only_the_mean_carries_information():
    flat = np.zeros((H, W))
    flat[0, 0] = 1
    assert bnr.information_budget(flat, 0.1)(jnp.asarray(0.5)) == pytest.approx(2 * W, rel=1e-3)


@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0, float("nan")])
def test_bad_budget_is_named(bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        bnr.information_budget(POWER, bad)
