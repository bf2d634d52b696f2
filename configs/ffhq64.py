"""FFHQ at 64×64, unconditional: EDM's DDPM++ recipe with blur and noise at BNR 0.5.

FFHQ's 70,000 PNG files at 1024² (github.com/NVlabs/ffhq-dataset, images1024x1024), resized with Lanczos:

    python -m warm_jax --config=ffhq64 --mode=prepare --images=folder:images1024x1024 \\
        --out=data/ffhq-64x64.zip
    python -m warm_jax --config=ffhq64

EDM's own ffhq-64x64.zip is read as it is.
Published FID (50,000 samples, the best of three rounds, 79 evaluations): 2.29 at BNR 0.5, 2.43 pfgmpp with D = 128,
2.53 hot (Hsueh et al., ICLR 2025); EDM's authors report 2.39. None for the other systems, which keep the training that
their authors used on CIFAR-10. The field since: 1.55 with one evaluation (SiD; docs/comparison.md). Duration: 200
million images, 781,250 steps of 256; EDM's authors report about 4 days on 8 V100, 800 accelerator hours.
"""

from ml_collections import ConfigDict

from configs import cifar10, systems


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`."""
    return systems.published(recipe(system), system)


def recipe(system: str) -> ConfigDict:
    """EDM's recipe for this set, whatever the system."""
    config = cifar10.recipe(system)
    if system == "pfgmpp":
        config.process.augmented_dims = 128.0
    config.data.source = "zip:data/ffhq-64x64.zip"
    config.data.instructions = (
        "get images1024x1024 from github.com/NVlabs/ffhq-dataset, then python -m warm_jax "
        "--config=ffhq64 --mode=prepare --images=folder:images1024x1024 --out=data/ffhq-64x64.zip"
    )
    config.data.image_size = 64
    config.data.augment_probability = 0.15
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.dropout = 0.05
    config.train.batch_size = 256
    config.train.steps = 781_250
    config.train.learning_rate = 2e-4
    config.sample.steps = 40  # 79 evaluations
    return config
