"""Where models lose bits: the variational bound of several BNRs by noise level and by frequency, on the same images.

With a perfect network every BNR would give the same curves' sums (method.md §16), so what differs is what the networks
fail to learn. Differences are taken image by image, from the first model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64


class Likelihoods(NamedTuple):
    """Bits a dimension; a row for each model, those of noise levels per e-fold of the level."""

    bnrs: Float64[np.ndarray, " model"]
    total: Float64[np.ndarray, " model"]
    total_se: Float64[np.ndarray, " model"]  # standard error over the images
    ends: Float64[np.ndarray, " model"]  # prior and last term, which are no network's
    difference: Float64[np.ndarray, " model"]  # from the first model
    difference_se: Float64[np.ndarray, " model"]
    edges: Float64[np.ndarray, " edges"]  # of the strata of noise over signal, rising
    by_level: Float64[np.ndarray, "model strata"]
    level_difference: Float64[np.ndarray, "model strata"]
    level_difference_se: Float64[np.ndarray, "model strata"]
    by_ring: Float64[np.ndarray, "model rings"]  # the sum over the levels; ring 0 is the mean colour
    count: np.ndarray  # images


class Part(NamedTuple):
    """What is known of one model: of each image its bits, by stratum, and without a network; the mean by ring."""

    bits: Float64[np.ndarray, " n"]
    by_level: Float64[np.ndarray, "n strata"]
    by_ring: Float64[np.ndarray, "strata rings"]
    ends: Float64[np.ndarray, " n"]
    edges: Float64[np.ndarray, " edges"]


def _standard_error(values: np.ndarray) -> np.ndarray | np.floating:
    """Of the mean over the images, the first axis."""
    return values.std(axis=0, ddof=1) / np.sqrt(len(values))


def likelihoods(parts: dict[float, Part]) -> Likelihoods:
    """The models of `parts`, by BNR, beside each other. ValueError where their levels or images are not the same."""
    bnrs, each = list(parts), list(parts.values())
    first = each[0]
    for bnr, part in parts.items():
        if len(part.edges) != len(first.edges) or not np.allclose(part.edges, first.edges, rtol=1e-3):
            raise ValueError(
                f"the model of BNR {bnr:g} has other noise levels, {part.edges[0]:.3g} to {part.edges[-1]:.3g}, than "
                f"that of BNR {bnrs[0]:g}, {first.edges[0]:.3g} to {first.edges[-1]:.3g}; show them one by one"
            )
    width = np.diff(np.log(first.edges))

    def stacked(values: Sequence[np.ndarray | np.floating]) -> Float64[np.ndarray, "..."]:
        return np.stack([np.asarray(value, np.float64) for value in values])

    return Likelihoods(
        bnrs=np.asarray(bnrs, np.float64),
        total=stacked([part.bits.mean() for part in each]),
        total_se=stacked([_standard_error(part.bits) for part in each]),
        ends=stacked([part.ends.mean() for part in each]),
        difference=stacked([(part.bits - first.bits).mean() for part in each]),
        difference_se=stacked([_standard_error(part.bits - first.bits) for part in each]),
        edges=first.edges,
        by_level=stacked([part.by_level.mean(0) / width for part in each]),
        level_difference=stacked([(part.by_level - first.by_level).mean(0) / width for part in each]),
        level_difference_se=stacked([_standard_error(part.by_level - first.by_level) / width for part in each]),
        by_ring=stacked([part.by_ring.sum(0) for part in each]),
        count=np.asarray(len(first.bits)),
    )
