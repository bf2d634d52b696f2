"""Which blur-to-noise ratio learns best, on CIFAR-10 with a network of 755,000 parameters, in bits a dimension.

    python -m warm_jax --config=evidence --mode=compare                  # everything; goes on where it was cut off
    python -m warm_jax --config=evidence --mode=compare --config.compare.systems=bnr0,bnr0.5 --config.compare.repeats=5
    python -m warm_jax --config=evidence:bnr2                            # one training

One network, one training and the same images for all; each system from `compare.repeats` seeds. A finished training
is a line in docs/evidence/ with all that it depends on, and is not run again where that line is. What is measured is
the variational bound on the 10,000 test images (`bpd`), with the same noise for every model, and nothing is sampled:
`--config.eval.metrics=bpd,fd,kid,lsd` also scores samples.

The systems: bnr0 (EDM), bnr0.25, bnr0.5, bnr1, bnr2, bnr10, budget (`information_budget`, 5 %), amortised; and at BNR
0.5 what the network predicts: clean, clean_residual, noise_residual, spectral.

Hardware: CPUs. A training of 160,000 images is 75 TFLOP, a measurement of 10,000 images at 24 levels about 40.
"""

from ml_collections import ConfigDict

from configs import cifar10, systems

RATIOS = ("bnr0", "bnr0.25", "bnr0.5", "bnr1", "bnr2", "bnr10")
PREDICTED = ("clean", "clean_residual", "noise_residual", "spectral")  # at BNR 0.5
NAMES = (*RATIOS, "budget", "amortised")


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of the names above; "warm" is bnr0.5 and "hot" bnr0."""
    name = {"warm": "bnr0.5", "hot": "bnr0"}.get(system, system)
    if name not in (*NAMES, *PREDICTED):
        raise ValueError(f"there is no system {system!r}; choose one of {', '.join((*NAMES, *PREDICTED))}")
    kind = "hot" if name == "bnr0" else "amortised" if name == "amortised" else "warm"
    config = cifar10.recipe(kind)
    if kind == "warm":
        config.process.bnr = float(name.removeprefix("bnr")) if name in RATIOS else 0.5
    if name == "budget":
        config.process.schedule = "information_budget"
    if name in PREDICTED:
        config.model.preconditioning = name
    config.data.augment = "none"

    model = config.model
    model.channels = 32
    model.channel_mult = (1, 2)
    model.num_blocks = 1
    model.attention = (8,)
    model.dropout = 0.0
    model.patch_size = 2  # the network sees 16×16 patches of 2×2 pixels
    model.dtype = "float32"

    train = config.train
    train.batch_size = 64
    train.steps = 2_500  # 160,000 images
    train.learning_rate = 2e-3
    train.warmup_images = 16_000
    train.decay = "cosine"
    train.b2 = 0.99  # of few steps
    train.clip_norm = 1.0
    train.ema_halflife_images = 12_800.0
    train.log_every = 250
    train.sample_every = 0
    train.checkpoint_every = 250
    train.keep_every = 0

    config.eval.metrics = ("bpd",)
    config.eval.extractor = "efficientnet"
    config.eval.count = 5_000
    config.sample.batch_size = 100
    config.compare.systems = NAMES
    config.compare.repeated = (*NAMES, *PREDICTED)
    config.compare.record = "docs/evidence"
    return systems.native(config, kind)
