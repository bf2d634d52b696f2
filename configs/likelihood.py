"""The settings of the metrics `bpd` and `bpd_ode`, the same for every data set."""

from ml_collections import ConfigDict


def defaults(images: str = "") -> ConfigDict:
    """How bits a dimension are measured. `images`: the held-out ones; empty: the test split of `data.source`."""
    likelihood = ConfigDict()
    likelihood.images = images  # a source; empty and no test split known: the training images, and the row says so
    likelihood.count = 10_000  # images at most, spread over the source
    likelihood.strata = 24  # noise levels an image, one evaluation of the network each
    likelihood.above = 0.03  # the bits above this noise level are said apart
    likelihood.seed = 0  # of levels and noise; the same for all models that are compared
    likelihood.batch_size = 100  # images at a time
    likelihood.ode_count = 200  # bpd_ode: images at most, spread over the source
    likelihood.ode_tolerance = 1e-4  # bpd_ode: error of a step, relative and absolute
    likelihood.ode_probes = 1  # bpd_ode: for the divergence
    return likelihood
