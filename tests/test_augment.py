"""Augmentation, against constructions that share nothing with it: numpy's flips and rotations, functions sampled at
transformed places, and the whole warp again with np.convolve and scipy's interpolation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from warm_jax.data import augment

transform, warp = jax.jit(augment.transform), jax.jit(augment.warp)


def nothing(count=1):
    return augment.Draws(*(jnp.zeros(count),) * 6, jnp.zeros((count, 2)))


def draws(**amounts):
    return nothing()._replace(**{name: jnp.asarray([value], jnp.float32) for name, value in amounts.items()})


def noise(*shape):
    return jnp.asarray(np.random.RandomState(0).uniform(-1, 1, shape), jnp.float32)


def smooth(x, y):
    """A function of places in pixels from the centre, whose shortest wave is 21 pixels."""
    return 0.6 * np.cos(0.25 * x + 0.1 * y + 0.5) + 0.4 * np.sin(0.2 * y - 0.15 * x)


def places(height, width):
    return np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)


def sampled(height, width):
    return jnp.asarray(smooth(*places(height, width))[None, :, :, None], jnp.float32)


def test_sym6_is_orthonormal_with_six_vanishing_moments():
    # Daubechies 1992, §6.4: 12 taps, sum √2, orthogonal to their even shifts; the mirror filter kills degrees 0 … 5.
    h, t = augment.SYM6, np.arange(12.0)
    assert h.sum() == pytest.approx(np.sqrt(2), abs=1e-12)
    for k in range(6):
        assert h[2 * k :] @ h[: 12 - 2 * k] == pytest.approx(float(k == 0), abs=1e-11)
        assert ((-1) ** t * (t / 11) ** k) @ h == pytest.approx(0, abs=1e-10)
    # Of the filters with those moments it is the least asymmetric; db6 begins with 0.1115 (table 6.1).
    assert h[0] == pytest.approx(0.0154041093, abs=1e-9)


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (2, 16, 32, 1), (1, 9, 7, 3)])
def test_nothing_is_the_identity(shape):
    images = noise(*shape)
    still = nothing(shape[0])
    np.testing.assert_allclose(transform(images, still), images, atol=1e-5)
    np.testing.assert_array_equal(augment.labels(still), np.zeros((shape[0], 9)))


def test_flips_are_numpys():
    images = noise(1, 16, 32, 3)
    for x, y in itertools.product((0, 1), (0, 1)):
        expected = images[:, :: -1 if y else 1, :: -1 if x else 1]
        np.testing.assert_allclose(transform(images, draws(x_flip=x, y_flip=y)), expected, atol=1e-5)


def test_plain_flips_are_exact_and_half():
    images = noise(400, 4, 6, 3)
    flipped = np.asarray(augment.flip(jax.random.key(1), images))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == images).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 5 * 10  # five standard deviations of a fair coin


@pytest.mark.parametrize("quarter", [-1, 1, 2])
def test_quarter_turns_are_numpys(quarter):
    turned = transform(sampled(32, 32), draws(rotation=quarter * np.pi / 2))
    # np.rot90 turns counter-clockwise as one sees it; sym6 is not quite symmetric: 0.05 pixels
    # before and after the turn, times √2 and a slope of 0.27 a pixel.
    np.testing.assert_allclose(
        turned, np.rot90(sampled(32, 32), quarter, axes=(1, 2)), atol=2 * 0.05 * np.sqrt(2) * 0.27
    )


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -5), (-2, 7), (31, 15)])
def test_integer_translations_are_exact(right, down):
    images = noise(1, 16, 32, 3)
    padded = np.pad(images, ((0, 0), (15, 15), (31, 31), (0, 0)), mode="reflect")
    expected = padded[:, 15 - down : 31 - down, 31 - right : 63 - right]
    moved = transform(images, draws(translation=[8 * right / 32, 8 * down / 16]))
    inner = (slice(None), slice(3, -3), slice(3, -3))  # the reflection's outer border is filtered with zeros beyond it
    tolerance, where = (1e-5, ...) if abs(right) < 20 else (1e-5, inner)
    np.testing.assert_allclose(np.asarray(moved)[where], expected[where], atol=tolerance)


@pytest.mark.parametrize(
    "amounts",
    [
        {"scale": 1.5},
        {"scale": -2.0},
        {"rotation": 0.7},
        {"anisotropy": 1.3},
        {"anisotropy": -1.0, "axis": 0.9},
        {"translation": [0.3, -0.45]},
        {"scale": 1.0, "rotation": -2.0, "anisotropy": 0.8, "axis": 2.0, "translation": [0.4, 0.2]},
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_transforms_move_what_is_there(amounts, size):
    """The result at p is the function at G⁻¹ p, where G⁻¹ is numpy's inverse of 3×3 matrices in the table's order."""
    height, width = size

    def matrix(a, b, c, d, x=0.0, y=0.0):
        return np.array([[a, b, x], [c, d, y], [0, 0, 1]])

    def turn(angle):  # counter-clockwise as seen, y down
        return matrix(np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))

    enlarge, stretch = 2 ** (0.2 * amounts.get("scale", 0)), 2 ** (0.2 * amounts.get("anisotropy", 0))
    axis, (right, down) = amounts.get("axis", 0), amounts.get("translation", (0, 0))
    forward = matrix(1, 0, 0, 1, 0.125 * width * right, 0.125 * height * down)
    forward = forward @ turn(axis) @ matrix(stretch, 0, 0, 1 / stretch) @ turn(-axis)
    forward = forward @ turn(amounts.get("rotation", 0)) @ matrix(enlarge, 0, 0, enlarge)
    x, y = places(height, width)
    from_x, from_y, _ = np.linalg.inv(forward) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    # Where it comes from well inside, reflection plays no part.
    inside = ((np.abs(from_x) < width / 2 - 5) & (np.abs(from_y) < height / 2 - 5)).reshape(height, width)
    assert inside.sum() > 60
    found = np.asarray(transform(sampled(height, width), draws(**amounts)))[0, :, :, 0]
    np.testing.assert_allclose(found[inside], smooth(from_x, from_y).reshape(height, width)[inside], atol=0.03)
    assert np.abs(found - sampled(height, width)[0, :, :, 0]).max() > 0.1


def test_warp_is_the_one_of_convolutions_and_scipy():
    height, width, h = 16, 20, augment.SYM6 / np.sqrt(2)
    image, random = noise(1, height, width, 1), np.random.RandomState(1)

    def filtered(x, axis, up):
        if up:
            x = np.insert(x, np.arange(1, x.shape[axis] + 1), 0, axis=axis)
            return np.apply_along_axis(lambda v: 2 * np.convolve(v, h)[5 : 5 + len(v)], axis, x)
        x = np.apply_along_axis(lambda v: np.convolve(v, h[::-1], mode="valid"), axis, x)
        return x[:: 2 if axis == 0 else 1, :: 2 if axis == 1 else 1]

    for _ in range(3):
        inverse, shift = np.eye(2) + 0.5 * random.randn(2, 2), 4 * random.randn(2)
        padded = np.pad(image[0, :, :, 0], ((height - 1,) * 2, (width - 1,) * 2), mode="reflect").astype(np.float64)
        fine = filtered(filtered(padded, 0, True), 1, True)
        # Fine samples stand half a pixel apart, that of pixel 0 on it.
        x, y = np.arange(-5, 2 * width + 5) / 2 - (width - 1) / 2, np.arange(-5, 2 * height + 5) / 2 - (height - 1) / 2
        at = inverse @ (np.stack(np.meshgrid(x, y)).reshape(2, -1) - shift[:, None])
        rows = (at[1] + (height - 1) / 2) * 2 + 2 * (height - 1)
        columns = (at[0] + (width - 1) / 2) * 2 + 2 * (width - 1)
        looked_up = scipy.ndimage.map_coordinates(fine, [rows, columns], order=1, mode="grid-constant")
        expected = filtered(filtered(looked_up.reshape(len(y), len(x)), 0, False), 1, False)
        found = warp(image, jnp.float32(inverse)[None], jnp.float32(shift)[None])
        np.testing.assert_allclose(found[0, :, :, 0], expected, atol=2e-4)


def test_far_away_is_mid_grey():
    moved = transform(jnp.ones((1, 8, 8, 3)), draws(translation=[60.0, 0.0]))
    np.testing.assert_allclose(moved, 0, atol=1e-6)


def test_label_moments():
    count, p = 40_000, 0.3
    found = np.asarray(jax.jit(lambda key: augment.labels(augment.draw(key, count, p)))(jax.random.key(3)), np.float64)
    # Means and variances from the table of draws: coins, normals, cos w - 1 and sin w of a uniform angle, each with
    # probability p. The axis is 0 half of the time: E[cos²r] = 3/4, E[sin²r] = 1/4.
    mean = np.array([1 / 2, p / 2, 0, -p, 0, 0, 0, 0, 0])
    second = np.array([1 / 2, p / 2, p, p * 3 / 2, p / 2, p * 3 / 4, p / 4, p, p])
    np.testing.assert_allclose(found.mean(0), mean, atol=5 * np.sqrt((second - mean**2) / count).max())
    np.testing.assert_allclose((found**2).mean(0), second, atol=0.025)
    moved = (found[:, 7:] != 0).any(axis=1)
    assert ((found[:, 7:] != 0).all(axis=1) == moved).all()  # one coin for both directions
    assert np.abs(np.corrcoef(found.T) - np.eye(9)).max() < 0.03


def test_zero_probability_only_flips():
    images = noise(64, 8, 8, 3)
    found, labels = jax.jit(augment.augment, static_argnums=2)(jax.random.key(0), images, 0.0)
    assert (np.asarray(labels)[:, 1:] == 0).all() and 10 < np.asarray(labels)[:, 0].sum() < 54
    expected = np.where(np.asarray(labels)[:, 0, None, None, None] == 1, images[:, :, ::-1], images)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_compiles_once_and_keys_differ():
    traces = []

    @jax.jit
    def step(key, images):
        traces.append(1)
        return augment.augment(key, images, 0.5)

    one, two = step(jax.random.key(0), noise(4, 8, 8, 3)), step(jax.random.key(1), noise(4, 8, 8, 3))
    assert len(traces) == 1 and one[0].dtype == jnp.float32 and one[1].shape == (4, 9)
    assert np.abs(one[1] - two[1]).max() > 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        augment.augment(jax.random.key(0), noise(1, 8, 8, 3), 1.5)
