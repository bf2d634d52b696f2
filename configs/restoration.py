"""A model that restores photographs: any blur and any noise, amortised, on small natural images. An hour on a laptop.

    curl --create-dirs -o data/cifar-10-binary.tar.gz https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    python -m warm_jax.main --config=configs/restoration.py
    python -m warm_jax.main --config=configs/restoration.py --mode=restore --images=FOLDER --blur=1 --noise=25/255

It learns from CIFAR-10's thumbnails, and restores photographs of any size in tiles of 32×32; for sharper results at
full resolution, train on patches of photographs like those to be restored: --config.data.source=folder:PATCHES.

Differs from cifar10.py:amortised: levels are those of photographs, noise from about 2 to 200 of 255 and blur up to 40
times the noise, so it draws no images from nothing; Wiener filters for the images' own spectrum stand in for the linear
skip, and the network learns what they leave; a network that two CPU cores can train.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(system: str = "amortised") -> ConfigDict:
    """`system`: "amortised" serves any blur and noise; "warm" and "hot" only those on their line."""
    if system not in ("amortised", "warm", "hot"):
        raise ValueError(f"{system!r} restores no photographs; choose amortised, warm or hot")
    config = cifar10.get_config(system)
    config.data.augment = "flip"
    config.data.augment_probability = 0.0
    config.process.P_mean, config.process.P_std = -2.0, 1.0
    if system == "amortised":
        config.process.bnr_min, config.process.bnr_max, config.process.bnr_zero = 0.5, 40.0, 0.25

    model = config.model
    model.preconditioning = "spectral"
    model.patch_size = 2  # the network sees 16×16 patches of 2×2 pixels
    model.channels = 32
    model.channel_mult = (1, 2)
    model.num_blocks = 2
    model.attention = (8,)
    model.dropout = 0.0
    model.dtype = "float32"

    train = config.train
    train.batch_size = 32
    train.steps = 7000
    train.learning_rate = 2e-3
    train.warmup_images = 3200
    train.decay = "cosine"
    train.ema_halflife_images = 10_000.0
    train.log_every = 200
    train.sample_every = 0
    train.checkpoint_every = 1000
    train.keep_every = 0
    config.sample.solver, config.sample.steps = "ancestral", 100  # of draws from the posterior; their mean needs none
    config.sample.batch_size = 64
    return config
