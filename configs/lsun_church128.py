"""LSUN church (outdoor) at 128×128, unconditional, with blur and noise at BNR 0.5.

The LMDB of 126,227 images (github.com/fyu/lsun: church_outdoor_train_lmdb.zip), centre-cropped and resized with
Lanczos; reading it needs `pip install .[lmdb]`:

    curl -LO http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip && unzip church_outdoor_train_lmdb.zip
    python -m warm_jax --config=lsun_church128 --mode=prepare \\
        --images=lmdb:church_outdoor_train_lmdb --out=data/lsun-church-128x128.zip
    python -m warm_jax --config=lsun_church128

| system | published FID | evaluations | source |
|---|---|---|---|
| warm | 2.56 (50,000 samples), 3.47 (10,000) | 511 | Hsueh et al. 2025 |
| ddpm | 4.68 (10,000) | 1000 | Hoogeboom and Salimans 2022 |
| blurring | 3.88 (10,000) | 1000 | Hoogeboom and Salimans 2022 |
| ihdm | 45.06 (clean-fid's) | 400 | Rissanen et al. 2022 |

Numbers of different papers on LSUN-church do not compare: their data differ. Channels, depth, learning rate and
duration are those of FFHQ-64 with one level more (ours; the warm paper's network for this set is not known here). At
four times FFHQ's pixels expect some 3000 V100 hours.
"""

from ml_collections import ConfigDict

from configs import ffhq64, systems


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`."""
    config = ffhq64.recipe(system)
    config.data.source = "zip:data/lsun-church-128x128.zip"
    config.data.instructions = (
        "curl -LO http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip && unzip church_outdoor_train_lmdb.zip && "
        "python -m warm_jax --config=lsun_church128 --mode=prepare "
        "--images=lmdb:church_outdoor_train_lmdb --out=data/lsun-church-128x128.zip"
    )
    config.data.image_size = 128
    config.data.augment = "flip"
    config.data.num_workers = 4
    config.model.channel_mult = (1, 1, 2, 2, 2)
    config.sample.batch_size = 64
    if system in ("warm", "amortised", "hot"):
        config.sample.solver = "stochastic"
        config.sample.S_churn, config.sample.S_min, config.sample.S_max, config.sample.S_noise = 40.0, 0.05, 50.0, 1.003
    config.sample.steps = 256  # 511 evaluations
    if system == "ihdm":
        config.process.steps, config.process.blur_max = 400, 64.0
    systems.published(config, system)
    if system == "ihdm":
        config.model.channel_mult = (1, 2, 3, 4, 5)
        config.model.attention = (32, 16, 8)
        config.train.batch_size = 32
        config.train.learning_rate = 2e-5
        config.train.warmup_images = 160_000  # 5000 steps
        config.train.ema_halflife_images = 22_200.0  # 0.999 a step
    elif config.process.system in ("ddpm", "blurring", "cold"):
        config.model.channel_mult = (1, 1, 2, 2, 2)
    return config
