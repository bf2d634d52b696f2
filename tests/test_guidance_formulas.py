"""Guidance and clipping against their equations in numpy."""

import dense
import jax
import jax.numpy as jnp
import numpy as np

from warm_jax.diffusion import bnr, guidance, process, systems

X = np.random.RandomState(0).randn(3, *dense.SHAPE).astype(np.float32)
T = np.array([0.1, 0.7, 3.0], np.float32)


def strong(x, t):
    return process.Prediction(jnp.tanh(x) * t[:, None, None, None], x - 2)


def weak(x, t):
    return process.Prediction(0.3 * x, jnp.sin(x))


def test_guidance_moves_away_from_the_weak_model_in_both_heads():
    """weak + w (strong - weak): w = 0 the weak model, 1 the strong one, linear in between and beyond."""
    one, zero = (np.tanh(X) * T[:, None, None, None], X - 2), (0.3 * X, np.sin(X))
    for weight in (0.0, 0.4, 1.0, 1.5, 4.0):
        guided = jax.jit(guidance.guide(strong, weak, weight))(jnp.asarray(X), jnp.asarray(T))
        assert isinstance(guided, process.Prediction)
        for head, s, w in zip(guided, one, zero, strict=True):
            np.testing.assert_allclose(head, weight * s + (1 - weight) * w, atol=1e-5)


def test_no_guidance_costs_no_second_evaluation():
    def never(x, t):
        raise AssertionError("the weak model was asked")

    guided = guidance.guide(strong, never, 1.0)(jnp.asarray(X), jnp.asarray(T))
    np.testing.assert_array_equal(guided.blurred, strong(jnp.asarray(X), jnp.asarray(T)).blurred)


def test_an_interval_is_of_noise_over_signal_the_upper_bound_in_it():
    """EDM's σ is t of warm and hot; of DDPM √(1 - ᾱ) / √ᾱ, in float64 here."""
    warm, ddpm = process.warm(dense.SHAPE, bnr.constant(2.0)), systems.ddpm(dense.SHAPE)
    levels = jnp.asarray([80.0, 5.0, 4.99, 0.3, 0.2, 0.1])
    np.testing.assert_array_equal(guidance.within(warm, (0.2, 5.0))(levels), [False, True, True, True, False, False])
    kept = dense.linear_alpha_bar()
    kept = kept[1:]
    sigma, t = np.sqrt((1 - kept) / kept), np.arange(1, 1001)
    sure = np.abs(np.log(sigma) - np.log(5.0)) > 1e-3
    found = guidance.within(ddpm, (0.2, 5.0))(jnp.asarray(t / 1000, jnp.float32))
    np.testing.assert_array_equal(np.asarray(found)[sure], ((sigma > 0.2) & (sigma <= 5.0))[sure])


def test_an_interval_guides_the_images_whose_level_is_in_it():
    guided = guidance.guide(strong, weak, 3.0, lambda t: t > 0.5)(jnp.asarray(X), jnp.asarray(T))
    everywhere = guidance.guide(strong, weak, 3.0)(jnp.asarray(X), jnp.asarray(T))
    for head, moved, plain in zip(guided, everywhere, strong(jnp.asarray(X), jnp.asarray(T)), strict=True):
        np.testing.assert_allclose(head, np.where((T > 0.5)[:, None, None, None], moved, plain), atol=1e-5)


def test_clipping_keeps_the_image_in_range_and_the_heads_in_step():
    """x̂0 within [-1, 1], D̂ = a x̂0 by scipy's DCT or DDPM's √ᾱ, R̂ the rest; nothing moves where nothing sticks out."""
    level, t = 0.7, jnp.full(3, 0.7)
    clean = np.clip(0.3 * X + np.sin(X), -1, 1)
    warm = process.warm(dense.SHAPE, bnr.constant(2.0))
    ddpm = systems.ddpm(dense.SHAPE)
    for p, kept in ((warm, dense.gauss(2 * level)), (ddpm, np.full((6, 8), np.sqrt(dense.linear_alpha_bar()[700])))):
        clipped = jax.jit(guidance.clip(weak, p))(jnp.asarray(X), t)
        np.testing.assert_allclose(clipped.blurred, dense.filtered(clean, kept), atol=3e-6)
        np.testing.assert_allclose(clipped.residual, clean - dense.filtered(clean, kept), atol=3e-6)
    assert np.abs(clean).max() == 1 and np.abs(clean).min() < 0.1
