"""DINOv2 against its authors' code with the same random weights (fixtures/make_dinov2_reference.py), ViT-S/14 whole."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_dinov2_reference import SHAPES, random_images, random_state, sampled

from warm_jax.metrics import dinov2

SMALL = (384, 12)


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "fixtures" / "dinov2_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state_dict():
    return random_state(*SMALL)


@pytest.fixture(scope="module")
def params(state_dict):
    return dinov2.convert(state_dict, *SMALL)


def relative(actual, expected):
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_every_block_matches_the_authors_code(params, reference):
    def run(params, images):
        network = dinov2.VisionTransformer(*SMALL)
        features, seen = network.apply({"params": params}, dinov2.preprocess(images), mutable=["intermediates"])
        return features, seen["intermediates"]

    features, seen = jax.jit(run)(params, random_images(1, SHAPES[0]))
    assert relative(sampled(np.asarray(seen["embedded"][0])), reference["embedded"]) < 1e-5
    tokens = np.asarray(seen["blocks"]["tokens"][0])
    assert len(tokens) == SMALL[1]
    for i, block in enumerate(tokens):
        assert relative(sampled(block), reference[f"block_{i}"]) < 1e-5, i
    assert features.shape == (1, SMALL[0]) and relative(features, reference["features"]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_resize_is_edm2s(shape, reference):
    x = np.asarray(dinov2.preprocess(jnp.asarray(random_images(1, shape))))
    assert x.shape == (1, 224, 224, 3)
    assert relative(x[:, ::13, ::13], reference[f"resized_{shape[0]}"]) < 2e-6


def test_positions_are_interpolated_as_the_authors_do(state_dict, reference):
    ours = np.asarray(dinov2.positions_at_224(jnp.asarray(state_dict["pos_embed"])))
    assert ours.shape == (1, 257, 384)
    assert relative(ours[:, :, ::48], reference["positions"]) < 1e-5  # theirs are at float32 places
    np.testing.assert_allclose(dinov2.position_matrix().sum(axis=1), 1, rtol=1e-14)
