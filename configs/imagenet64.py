"""ImageNet at 64×64 with its thousand classes: EDM's ADM recipe with blur and noise at BNR 0.5.

The 1,281,167 training images (image-net.org, ILSVRC2012: a folder a class), centre-cropped and resized with Lanczos:

    python -m warm_jax --config=imagenet64 --mode=prepare --images=folder:ILSVRC2012/train \\
        --out=data/imagenet-64x64.zip
    python -m warm_jax --config=imagenet64
    python -m warm_jax --config=imagenet64 --mode=sample --config.sample.guidance=1.5

EDM's own imagenet-64x64.zip is read as it is. A tenth of the classes is hidden in training, so that samples can be
guided; EDM hides none (--config.data.label_dropout=0).
Published FID (50,000 samples, the best of three rounds, 511 evaluations, stochastic): 1.36 hot (Karras et al. 2022);
none for the others. The field since: 1.11 with one evaluation (SiDA), 1.01 with 63 × 2 (EDM2-S with autoguidance); see
docs/comparison.md. Duration: 2,500 million images, 610,352 steps of 4096: for EDM's authors about 13 days on 32 A100,
10,000 accelerator hours.
"""

from ml_collections import ConfigDict

from configs import cifar10, systems


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`."""
    config = cifar10.recipe(system)
    config.data.source = "zip:data/imagenet-64x64.zip"
    config.data.instructions = (
        "get ILSVRC2012 from image-net.org, then python -m warm_jax --config=imagenet64 "
        "--mode=prepare --images=folder:ILSVRC2012/train --out=data/imagenet-64x64.zip"
    )
    config.data.image_size = 64
    config.data.num_classes = 1000
    config.data.label_dropout = 0.1
    config.data.augment = "none"
    config.data.num_workers = 8
    config.train.batch_size = 4096
    config.train.steps = 610_352
    config.train.learning_rate = 1e-4
    config.train.ema_halflife_images = 50_000_000.0
    config.sample.steps = 256  # 511 evaluations
    config.sample.batch_size = 128
    if system in ("warm", "amortised", "hot"):
        config.sample.solver = "stochastic"
        config.sample.S_churn, config.sample.S_min, config.sample.S_max, config.sample.S_noise = 40.0, 0.05, 50.0, 1.003
    systems.published(config, system)
    config.model.architecture = "adm"
    config.model.channels = 192
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_blocks = 3
    config.model.attention = (32, 16, 8)
    config.model.dropout = 0.1
    return config
