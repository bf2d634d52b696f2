"""AFHQv2 at 64×64, cats, dogs and wild animals without their labels: EDM's DDPM++ recipe with BNR 0.5.

AFHQv2's 15,803 images at 512² (github.com/clovaai/stargan-v2, afhq_v2), resized with Lanczos:

    python -m warm_jax --config=afhqv2_64 --mode=prepare --images=folder:afhq_v2 \\
        --out=data/afhqv2-64x64.zip
    python -m warm_jax --config=afhqv2_64

EDM's own afhqv2-64x64.zip is read as it is.
Published FID (50,000 samples, the best of three rounds, 79 evaluations): 1.96 hot (Karras et al. 2022); none for the
others. Duration: 200 million images, 781,250 steps of 256; EDM's authors report about 4 days on 8 V100, 800 accelerator
hours.
"""

from ml_collections import ConfigDict

from configs import ffhq64, systems


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`."""
    config = ffhq64.recipe(system)
    config.data.source = "zip:data/afhqv2-64x64.zip"
    config.data.instructions = (
        "get afhq_v2 from github.com/clovaai/stargan-v2, then python -m warm_jax "
        "--config=afhqv2_64 --mode=prepare --images=folder:afhq_v2 --out=data/afhqv2-64x64.zip"
    )
    config.model.dropout = 0.25
    return systems.published(config, system)
