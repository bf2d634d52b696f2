"""Extraction with a network whose features are known: sums that numpy can do; and the shipped feature network."""

import gzip
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from warm_jax.metrics import fashion
from warm_jax.metrics.extract import (
    Extractor,
    Features,
    accumulate,
    collect,
    extract,
    load_features,
    rebatch,
    save_features,
)
from warm_jax.metrics.frechet import frechet_distance
from warm_jax.weights.tensors import read_safetensors

IMAGES = np.random.default_rng(0).integers(0, 256, (53, 8, 8, 3), dtype=np.uint8)


def known(traces):
    """Features 2 · the means of columns, logits the sums of channels; notes its traces."""

    def column_means(params, images):
        traces.append(images.shape)
        x = images.astype(jnp.float32)
        return Features(params * x.mean(axis=(1, 3)), x.sum(axis=(1, 2)))

    return Extractor("known", "ab" * 32, 8, jnp.float32(2), column_means)


KNOWN = known([])


def chunks(*sizes):
    return np.split(IMAGES, np.cumsum(sizes))


@pytest.mark.parametrize("sizes", [(), (1, 2, 30), (10,) * 5, (0, 53)])
@pytest.mark.parametrize("batch", [8, 53, 64])
def test_any_chunks_and_batches_give_the_features_in_order(sizes, batch):
    traces = []
    batches = list(extract(known(traces), chunks(*sizes), batch))
    assert [len(b.pool) for b in batches] == [batch] * (53 // batch) + [53 % batch] * (53 % batch > 0)
    features = collect(batches)
    np.testing.assert_allclose(features.pool, 2 * IMAGES.astype(np.float64).mean(axis=(1, 3)), rtol=1e-6)
    np.testing.assert_array_equal(features.logits, IMAGES.astype(np.float64).sum(axis=(1, 2)))
    assert len(traces) == 1  # the last batch is padded, not compiled again


def test_statistics_are_those_of_all_features():
    pool = 2 * IMAGES.astype(np.float64).mean(axis=(1, 3))
    moments = accumulate(extract(KNOWN, chunks(5, 5), 4), 8).finalize()
    assert moments.count == 53
    np.testing.assert_allclose(moments.mean, pool.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.covariance, np.cov(pool, rowvar=False), rtol=1e-5, atol=1e-3)
    assert accumulate([], 8).count == 0
    with pytest.raises(ValueError, match="no images"):
        collect([])


def test_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"must be uint8 .* not float32"):
        list(rebatch([IMAGES.astype(np.float32)], 4))
    with pytest.raises(ValueError, match=r"images of \(8, 8, 3\) and of \(8, 7, 3\)"):
        list(rebatch([IMAGES, IMAGES[:, :, :7]], 4))
    with pytest.raises(ValueError, match="8"):
        mesh = jax.make_mesh((8,), ("data",))
        list(extract(KNOWN, [IMAGES], 12, NamedSharding(mesh, P("data"))))


def bundled(name, header):
    data = resources.files("warm_jax.data").joinpath("bundled", name).read_bytes()
    return np.frombuffer(gzip.decompress(data), np.uint8, offset=header)


@pytest.fixture(scope="module")
def clothes():
    return bundled("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)


def test_eight_devices_give_the_number_of_one(clothes):
    extractor = fashion.load()
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    reference = accumulate(extract(extractor, [clothes[:500]], 128), extractor.dim).finalize()
    one = accumulate(extract(extractor, [clothes[500:1001]], 128), extractor.dim).finalize()
    eight = accumulate(extract(extractor, [clothes[500:1001]], 128, sharding), extractor.dim).finalize()
    assert eight.count == 501
    assert frechet_distance(eight, reference) == pytest.approx(frechet_distance(one, reference), rel=1e-5)


def test_the_shipped_network_knows_clothes_it_was_not_trained_on(clothes):
    labels = bundled("t10k-labels-idx1-ubyte.gz", 8)
    _, about = read_safetensors(fashion.WEIGHTS)
    logits = collect(extract(fashion.load(), [clothes[9000:]], 250)).logits
    accuracy = (logits.argmax(axis=1) == labels[9000:]).mean()
    assert accuracy > 0.85  # on half of the images behind the stored accuracy
    assert abs(float(about["accuracy"].split()[0]) - accuracy) < 0.02
    assert fashion.WEIGHTS.stat().st_size < 2_000_000


def test_padded_clothes_have_the_features_of_unpadded_ones(clothes):
    params = fashion.load().params
    padded = np.pad(clothes[:2], [(0, 0), (2, 2), (2, 2), (0, 0)])
    np.testing.assert_array_equal(*(fashion.apply(params, jnp.asarray(x)).pool for x in (padded, clothes[:2])))
    with pytest.raises(ValueError, match=r"28×28 or 32×32, not \(32, 32, 3\)"):
        fashion.apply(params, jnp.zeros((1, 32, 32, 3), jnp.uint8))


def test_the_offline_distance_puts_clothes_before_blur_before_noise(clothes):
    # Order known beforehand: other clothes (the floor), clothes with pairs of pixels averaged, uniform noise.
    extractor = fashion.load()

    def moments(images):
        return accumulate(extract(extractor, [images], 250), extractor.dim).finalize()

    reference = moments(clothes[:1000])
    blurred = ((clothes[1000:2000].astype(np.uint16) + np.roll(clothes[1000:2000], 3, axis=2)) // 2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 28, 28, 1), dtype=np.uint8)
    distances = [frechet_distance(moments(images), reference) for images in (clothes[1000:2000], blurred, noise)]
    assert 3 * distances[0] < distances[1] < distances[2] / 3


def test_shards_are_kept_and_belong_to_one_evaluation(tmp_path):
    features = collect(extract(KNOWN, [IMAGES], 16))
    provenance = KNOWN.provenance(IMAGES.shape[1:])
    save_features(tmp_path / "0.npz", features, provenance)
    read = load_features(tmp_path / "0.npz", provenance)
    np.testing.assert_array_equal(read.pool, features.pool)
    np.testing.assert_array_equal(read.logits, features.logits)
    with pytest.raises(ValueError, match=r"resolution differs: this evaluation have.*\(9, 8, 3\).*\(8, 8, 3\)"):
        load_features(tmp_path / "0.npz", KNOWN.provenance((9, 8, 3)))
    (tmp_path / "0.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable npz"):
        load_features(tmp_path / "0.npz", provenance)
