"""Inception-v3 against torch-fidelity's with the same random weights (fixtures/make_inception_reference.py).

The resize is also held against its definition, one pixel at a time.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_inception_reference import BLOCKS, random_images, random_state, sampled

from warm_jax.metrics import inception, published
from warm_jax.metrics.frechet import INCEPTION

STEMS = {"MaxPool_1": "stem1", "MaxPool_2": "stem2"}


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "fixtures" / "inception_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state_dict(reference):
    dims = [tuple(int(n) for n in row if n) for row in reference["dims"]]
    return random_state(dict(zip(reference["names"].tolist(), dims, strict=True)))


@pytest.fixture(scope="module")
def params(state_dict):
    return jax.tree.map(jnp.asarray, inception.convert(state_dict))


def relative(actual, expected):
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_every_block_matches_the_reference(params, reference):
    def run(params, images):
        x = inception.preprocess(images)
        result, seen = inception.InceptionV3().apply({"params": params}, x, mutable=["intermediates"])
        return x, result, {name: values[0] for name, values in seen["intermediates"].items()}

    x, result, blocks = jax.jit(run)(params, random_images(1, 32, 40, 3))
    assert relative(x[:, ::13, ::13], reference["resized"]) < 1e-6
    for name in BLOCKS:
        ours = np.asarray(blocks[STEMS.get(name, f"{name}_out")])
        assert relative(sampled(ours), reference[f"block_{name}"]) < 1e-5, name
    assert result.pool.shape == (1, 2048) and result.logits.shape == (1, 1008)
    assert relative(result.pool, reference["pool"]) < 1e-5
    assert relative(result.logits, reference["logits_unbiased"]) < 1e-5
    assert relative(result.logits + params["fc_bias"], reference["logits"]) < 1e-5


@pytest.mark.parametrize("size", [32, 28, 299, 400])
def test_resize_is_tensorflow_1s(size):
    line = np.random.default_rng(0).random(size)
    expected = []
    for i in range(299):
        source = float(np.float32(i) * np.float32(size / 299))  # TensorFlow computes it in float32
        low = int(source)
        high = min(low + 1, size - 1)
        expected.append(line[low] + (line[high] - line[low]) * (source - low))
    np.testing.assert_allclose(inception.resize_matrix(size) @ line, expected, rtol=1e-12)


def test_grey_images_become_three_equal_channels():
    images = jnp.asarray(random_images(1, 299, 299, 1))
    x = np.asarray(inception.preprocess(images))
    expected = (np.asarray(images).astype(np.float64) - 128) / 128
    np.testing.assert_allclose(x, np.repeat(expected, 3, axis=-1), atol=1e-7)
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        inception.preprocess(jnp.zeros((1, 8, 8, 4), jnp.uint8))


def test_weights_that_are_not_inceptions_are_named(state_dict):
    without = {name: value for name, value in state_dict.items() if name != "Mixed_7c.branch_pool.bn.running_var"}
    with pytest.raises(ValueError, match=r"no Mixed_7c\.branch_pool\.bn\.running_var"):
        inception.convert(without)
    with pytest.raises(ValueError, match=r"fc_kernel has shape \(2048, 1000\), expected \(2048, 1008\)"):
        inception.convert(state_dict | {"fc.weight": np.zeros((1000, 2048), np.float32)})


def test_a_missing_or_wrong_file_says_where_to_get_it(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"curl -L -O https://github.com/mseitzer/pytorch-fid/releases"):
            inception.load(path)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"(?s)expected 6726825d….*truncated.*curl"):
        inception.load(tmp_path / "cut.pth")


def test_conversion_round_trip(tmp_path, params):
    source = hashlib.sha256(b"a .pth").hexdigest()
    published.save(tmp_path / "inception.safetensors", INCEPTION, params, source)
    extractor = inception.load(
        tmp_path / "inception.safetensors", dataclasses.replace(inception.PUBLISHED, sha256=source[:8])
    )
    assert (extractor.name, extractor.hash, extractor.dim) == (INCEPTION, source, 2048)
    jax.tree.map(np.testing.assert_array_equal, extractor.params, params)
    with pytest.raises(ValueError, match="not the converted inception_2015_12_05"):
        inception.load(tmp_path / "inception.safetensors")
