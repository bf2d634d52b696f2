"""Where models lose bits: numbers of a constructed case, and a picture that shows its sum."""

import io

import numpy as np
import pytest
from PIL import Image

from warm_jax.analysis import likelihood_plots, likelihoods

EDGES = np.exp([0.0, 2.0, 3.0])  # strata 2 and 1 wide in ln β


def part(lost, edges=EDGES):
    """Images that cost 1, 2, 3, 4 bits in the first stratum and `lost` more in the second."""
    by_level = np.stack([np.arange(1.0, 5), np.full(4, 2.0 + lost)], axis=1)
    return likelihoods.Part(
        by_level.sum(1) + 0.5, by_level, np.outer(by_level.mean(0), [0.25, 0.75]), np.full(4, 0.5), edges
    )


def test_models_are_compared_image_by_image():
    made = likelihoods.likelihoods({0.0: part(0), 0.5: part(0.1), 2.0: part(1)})
    np.testing.assert_allclose(made.total, [5, 5.1, 6])
    np.testing.assert_allclose(made.total_se, np.std([1, 2, 3, 4], ddof=1) / 2)  # images differ by far
    np.testing.assert_allclose(made.difference, [0, 0.1, 1])
    np.testing.assert_allclose(made.difference_se, 0, atol=1e-12)  # and the models in the same way
    np.testing.assert_allclose(made.by_level, [[1.25, 2], [1.25, 2.1], [1.25, 3]])  # per e-fold
    np.testing.assert_allclose(made.level_difference, [[0, 0], [0, 0.1], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(made.by_ring, np.outer([4.5, 4.6, 5.5], [0.25, 0.75]))
    assert int(made.count) == 4


def test_other_levels_are_refused():
    with pytest.raises(ValueError, match=r"BNR 2 has other noise levels, 2 to 40\.2, than that of BNR 0"):
        likelihoods.likelihoods({0.0: part(0), 2.0: part(0, 2 * EDGES)})


@pytest.mark.parametrize("lost", [(0.0,), (0.0, 0.1)])
def test_the_picture_shows_the_sums(lost):
    made = likelihoods.likelihoods({float(i): part(more) for i, more in enumerate(lost)})
    figure, content = likelihood_plots.likelihoods(made), io.BytesIO()
    title = figure.get_suptitle()
    assert title.startswith("Bits a dimension of 4 images: 5.00 ± 0.65 at BNR 0")
    assert ("more than BNR 0, image by image: 0.1" in title) == (len(lost) == 2)
    assert "0.5000 bits of each are prior and last term" in likelihood_plots.sentence(made)
    figure.savefig(content, format="png")
    assert Image.open(content).size == (1200, 60 + 400 * len(lost))
