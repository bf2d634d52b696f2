"""CIFAR-10 at 32×32 with its ten classes, a tenth of them hidden, so that samples can be guided.

    python -m warm_jax --config=cifar10_conditional
    python -m warm_jax --config=cifar10_conditional --mode=sample --config.sample.guidance=1.5

Published FID (50,000 samples, the best of three rounds, 35 evaluations, no guidance, no class hidden in training): 1.79
hot (Karras et al. 2022), 1.74 pfgmpp with D = 2048 (Xu et al. 2023); none for the others. For those numbers set
--config.data.label_dropout=0. Duration as in `cifar10.py`, which says how to get the images: about 400 V100 hours.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`."""
    config = cifar10.get_config(system)
    config.data.num_classes = 10
    config.data.label_dropout = 0.1
    return config
