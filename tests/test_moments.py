"""Expected moments come from numpy.mean and numpy.cov over the whole array; foreign files are written here."""

import dataclasses

import numpy as np
import pytest

from warm_jax.metrics.moments import UINT8_RULE, Moments, Provenance, Statistics, load, moments, save

MINE = Provenance("fashion_cnn", "ab" * 32, UINT8_RULE, (32, 32, 1), "cd" * 32)


def features(n=500, d=6, offset=1000.0):
    # The offset would cost a naive Σxxᵀ - n mmᵀ six digits of the covariance.
    return offset + np.random.default_rng(0).standard_normal((n, d)) @ np.random.default_rng(1).standard_normal((d, d))


@pytest.mark.parametrize("sizes", [(500,), (1, 499), (0, 200, 0, 300), (7,) * 71 + (3,)])
def test_streamed_moments_are_those_of_the_whole_array(sizes):
    x = features()
    statistics = Statistics.empty(6)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        statistics = statistics.update(part)
    streamed = statistics.finalize()
    assert streamed.count == 500
    np.testing.assert_allclose(streamed.mean, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(streamed.covariance, np.cov(x, rowvar=False), rtol=1e-10)


def test_merging_shards_in_any_order_gives_the_same_moments():
    x = features()
    shards = [Statistics.empty(6).update(part) for part in np.split(x, [13, 200])]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = Statistics.empty(6)
        for i in order:
            merged = merged.merge(shards[i])
        np.testing.assert_allclose(merged.finalize().covariance, np.cov(x, rowvar=False), rtol=1e-10)


def test_float32_features_are_accumulated_in_float64():
    x = features().astype(np.float32)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments(x).covariance, expected, rtol=1e-9)


def test_bad_features_are_refused():
    x = features()
    x[3, 2] = np.nan
    x[9, 0] = np.inf
    with pytest.raises(ValueError, match="2 of 500 features are NaN"):
        Statistics.empty(6).update(x)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        Statistics.empty(6).update(features(1)).finalize()
    with pytest.raises(ValueError, match="dimension 6 and of 7"):
        Statistics.empty(6).merge(Statistics.empty(7))


def test_a_file_holds_the_moments_and_where_they_come_from(tmp_path):
    before = moments(features())
    save(tmp_path / "sub" / "reference.npz", before, MINE)
    after, provenance = load(tmp_path / "sub" / "reference.npz")
    assert provenance == MINE
    assert after.count == 500
    np.testing.assert_array_equal(after.mean, before.mean)
    np.testing.assert_array_equal(after.covariance, before.covariance)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["reference.npz"]  # no half-written file stays


def test_files_of_edm_and_clean_fid_are_read(tmp_path):
    x = features()
    np.savez(tmp_path / "edm.npz", mu=x.mean(axis=0), sigma=np.cov(x, rowvar=False))
    read, provenance = load(tmp_path / "edm.npz")
    assert read.count is None and provenance == Provenance()
    np.testing.assert_array_equal(read.mean, x.mean(axis=0))


@pytest.mark.parametrize(
    ("field", "other", "message"),
    [
        ("extractor", "inception_2015_12_05", "the samples have 'fashion_cnn'.*inception_2015_12_05"),
        ("extractor_hash", "00" * 32, "extractor hash differs: the samples have 'abab.*'0000"),
        ("resolution", (64, 64, 3), r"resolution differs: the samples have \(32, 32, 1\).*\(64, 64, 3\)"),
        ("uint8_rule", "round(255 x)", r"uint8 rule differs: .*trunc.*round\(255 x\)"),
        ("data_hash", "ef" * 32, "data hash differs: .*cdcd.*efef"),
    ],
)
def test_a_mismatch_names_both_values(field, other, message):
    theirs = dataclasses.replace(MINE, **{field: other})
    with pytest.raises(ValueError, match=message):
        MINE.require_same(theirs)
    MINE.require_same(dataclasses.replace(MINE, **{field: None}))  # unknown is not a mismatch
    MINE.require_same(MINE)


def test_unusable_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="expected mean, covariance, count or mu, sigma"):
        load(tmp_path / "other.npz")
    np.savez(tmp_path / "shapes.npz", mu=np.ones(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"\(3,\) does not go with a covariance of \(4, 4\)"):
        load(tmp_path / "shapes.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="not a readable npz"):
        load(tmp_path / "pickled.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "shapes.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable npz"):
        load(tmp_path / "cut.npz")
    np.savez(tmp_path / "nan.npz", mu=np.array([np.nan]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="not finite"):
        load(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match="not symmetric"):
        Moments(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), 10)
    with pytest.raises(ValueError, match="without a count"):
        save(tmp_path / "no.npz", Moments(np.zeros(2), np.eye(2), None), MINE)
