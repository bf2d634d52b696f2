"""Tiles of a large image: what they say together is what the whole image would be told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from warm_jax.diffusion.process import Prediction
from warm_jax.restoration import tiles


@pytest.mark.parametrize(
    ("length", "tile", "overlap"),
    [(28, 28, 14), (29, 28, 14), (100, 28, 14), (97, 32, 16), (64, 16, 0), (65, 16, 1), (50, 8, 7), (90, 16, 12)],
)
def test_weights_sum_to_one_and_are_nothing_at_inner_borders(length, tile, overlap):
    starts, weights = tiles.axis(length, tile, overlap)
    total, covered = np.zeros(length), np.zeros(length, int)
    for start, own in zip(starts, weights, strict=True):
        total[start : start + tile] += own
        covered[start : start + tile] += 1
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.min() >= 0 and covered.min() >= 1
    assert starts[0] == 0 and starts[-1] == length - tile
    assert np.all(tile - np.diff(starts) >= overlap)
    for k in range(len(starts)):
        margin = overlap // 4
        assert k == 0 or not weights[k, :margin].any()
        assert k == len(starts) - 1 or not weights[k, tile - margin :].any()


def test_weights_are_smooth():
    """Half a tile of 32 shared: no step above sin²'s steepest, π / (2 · 8) a pixel."""
    _, weights = tiles.axis(200, 32, 16)
    assert np.abs(np.diff(weights, axis=1)).max() < np.pi / 16 + 1e-6


@pytest.mark.parametrize(("length", "tile", "overlap"), [(20, 8, 8), (20, 8, -1), (7, 8, 4)])
def test_impossible_tiles_are_refused(length, tile, overlap):
    with pytest.raises(ValueError, match=r"from 0 to 7|less than a tile of 8"):
        tiles.axis(length, tile, overlap)


def pixelwise(x, t):
    return Prediction(jnp.sin(3 * x) + t[:, None, None, None], x**2)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_pixelwise_predictor_is_the_same_on_tiles(batch_size, key):
    shapes = []

    def seen(x, t):
        shapes.append(x.shape)
        return pixelwise(x, t)

    x, t = jax.random.normal(key, (2, 37, 50, 3)), jnp.array([0.5, 2.0])
    found = jax.jit(tiles.tiled(seen, (16, 12), batch_size=batch_size))(x, t)
    assert set(shapes) == {(batch_size, 16, 12, 3)}  # never more at a time
    expected = np.sin(3 * np.asarray(x)) + np.array([0.5, 2.0])[:, None, None, None], np.asarray(x) ** 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (70, 45)])
def test_a_small_kernel_is_the_same_on_tiles_up_to_the_images_borders(size, key):
    """Five taps each way reach two pixels: the tiles' own borders, which mirror, weigh nothing there. scipy says."""
    taps = np.array([0.1, -0.3, 0.9, 0.2, 0.4])

    def smooth(x, t):
        padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="symmetric")
        h, w = x.shape[1:3]
        once = sum(float(k) * padded[:, i : i + h] for i, k in enumerate(taps))
        return Prediction(sum(float(k) * once[:, :, i : i + w] for i, k in enumerate(taps)), jnp.zeros_like(x))

    x = jax.random.normal(key, (1, *size, 1))
    found = jax.jit(tiles.tiled(smooth, (16, 16), (8, 8)))(x, jnp.ones(1)).blurred
    image = np.asarray(x, np.float64)[0, ..., 0]
    expected = ndimage.correlate1d(ndimage.correlate1d(image, taps, axis=0), taps, axis=1)  # mode "reflect"
    np.testing.assert_allclose(found[0, ..., 0], expected, atol=3e-6)


def test_reflecting_up_goes_with_blur():
    """An image doubled by its mirror image, blurred, is the blurred image doubled: scipy's Gaussian, which mirrors."""
    image = np.random.default_rng(0).random((9, 13, 1)).astype(np.float32)
    up = tiles.reflected_up(image, (18, 26))
    blurred = ndimage.gaussian_filter(up[..., 0], 1.3)[:9, :13]
    np.testing.assert_allclose(blurred, ndimage.gaussian_filter(image[..., 0], 1.3), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((9, 13), (16, 16), (16, 16)),
        ((3, 40), (16, 16), (16, 40)),
        ((33, 32), (16, 16), (33, 32)),
    ],
)
def test_reflected_sizes(size, least, expected):
    image = np.arange(size[0] * size[1], dtype=np.float32).reshape(*size, 1)
    up = tiles.reflected_up(image, least)
    assert up.shape == (*expected, 1)
    np.testing.assert_array_equal(up[: size[0], : size[1]], image)
