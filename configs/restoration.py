"""A model that restores photographs of any blur and noise, learnt from patches of photographs. An hour on a laptop.

    python benchmarks/patches.py --out=data/patches.zip FOLDER_OF_PHOTOGRAPHS [FOLDER …]
    python -m warm_jax --config=restoration
    python -m warm_jax --config=restoration --mode=restore --images=FOLDER --blur=1 --noise=25/255

Some forty photographs make fifty thousand patches of 32×32; take such as are like those to be restored. (Trained on
CIFAR-10's thumbnails the same network restores thumbnails, and photographs worse than non-local means: what is small in
a thumbnail is sharp everywhere.) Photographs of any size are restored in tiles of 32×32.

Differs from cifar10.py:amortised: levels are those of photographs, noise mostly from 2 to 127 of 255 and blur up to 40
times the noise, so it draws no images from nothing; Wiener filters for the images' own spectrum stand in for the linear
skip, and the network learns what they leave; a network that two CPU cores can train.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(system: str = "") -> ConfigDict:
    """Only an amortised model serves any blur and any noise, so there is no system to choose."""
    if system:
        raise ValueError(f"this config is of an amortised model; leave off :{system}")
    config = cifar10.get_config("amortised")
    config.data.source = "zip:data/patches.zip"
    config.data.instructions = "python benchmarks/patches.py --out=data/patches.zip FOLDER_OF_PHOTOGRAPHS"
    config.data.augment = "flip"
    config.data.augment_probability = 0.0
    config.process.P_mean, config.process.P_std = -2.0, 1.0
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
