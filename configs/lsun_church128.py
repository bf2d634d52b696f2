"""LSUN church (outdoor) at 128×128, unconditional, with blur and noise at BNR 0.5.

The LMDB of 126,227 images (github.com/fyu/lsun: church_outdoor_train_lmdb.zip), centre-cropped and resized with
Lanczos; reading it needs `pip install .[lmdb]`:

    curl -LO http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip && unzip church_outdoor_train_lmdb.zip
    python -m warm_jax.main --config=configs/lsun_church128.py --mode=prepare \\
        --images=lmdb:church_outdoor_train_lmdb --out=data/lsun-church-128x128.zip
    python -m warm_jax.main --config=configs/lsun_church128.py

Published FID at 511 evaluations (256 Heun steps): 2.56 with 50,000 samples, 3.47 with 10,000 (Hsueh et al., ICLR
2025, which also churns: 40, 0.05, 50, 1.003). Numbers of different papers on LSUN-church do not compare: their data
differ. The summary that this follows gives no network for this set: channels, depth and learning rate are those of
FFHQ-64 with one level more (ours).
"""

from ml_collections import ConfigDict

from configs import ffhq64


def get_config(system: str = "warm") -> ConfigDict:
    """`system` as in `cifar10.py`."""
    config = ffhq64.get_config(system)
    config.data.source = "zip:data/lsun-church-128x128.zip"
    config.data.instructions = (
        "curl -LO http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip && unzip church_outdoor_train_lmdb.zip && "
        "python -m warm_jax.main --config=configs/lsun_church128.py --mode=prepare "
        "--images=lmdb:church_outdoor_train_lmdb --out=data/lsun-church-128x128.zip"
    )
    config.data.image_size = 128
    config.data.augment = "flip"
    config.data.num_workers = 4
    config.model.channel_mult = (1, 1, 2, 2, 2)
    config.sample.steps = 256  # 511 evaluations
    config.sample.batch_size = 64
    return config
