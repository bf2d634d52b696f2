"""CIFAR-10 at 32×32, unconditional: the paper's main experiment, EDM's DDPM++ recipe with blur and noise at BNR 0.5.

    curl --create-dirs -o data/cifar-10-binary.tar.gz https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
    python -m warm_jax.main --config=configs/cifar10.py        # warm, BNR 0.5
    python -m warm_jax.main --config=configs/cifar10.py:hot    # EDM

Published FID (50,000 samples, the best of three rounds, 35 evaluations): 1.85 at BNR 0.5 and 1.97 at BNR 0 (Hsueh
et al., ICLR 2025), 2.01 / 2.57 / 11.97 at BNR 1 / 2 / 10. EDM's authors see 1.97 to 2.08 between seeds. Duration:
200 million images, 390,625 steps of 512; EDM's authors report about 2 days on 8 V100.
"""

from ml_collections import ConfigDict, config_dict


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is "warm" or "hot"."""
    config = ConfigDict()
    config.seed = 0

    data = config.data = ConfigDict()
    data.source = "cifar10:data/cifar-10-binary.tar.gz"  # or what --mode=prepare made of it, or EDM's zip
    data.instructions = (  # shown where the source is missing
        "curl --create-dirs -o data/cifar-10-binary.tar.gz https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    )
    data.image_size = 32
    data.channels = 3
    data.num_classes = 0  # 10: class-conditional
    data.label_dropout = 0.0  # share of the images whose class is hidden
    data.augment = "edm"  # "none", "flip" (left and right), or "edm": nine labels, told to the network
    data.augment_probability = 0.12  # of each kind of change, for "edm"
    data.on_error = "raise"  # or "skip": leave broken images out, and name them
    data.allow_changed = False  # True: go on from a checkpoint with other images than it began with
    data.num_workers = 0  # processes that decode, for sets too large for memory

    process = config.process = ConfigDict()
    process.system = system
    process.schedule = "constant"  # or "information_budget": blur as much as the data's own spectrum allows
    process.bnr = 0.5 if system == "warm" else 0.0  # blur in pixels per unit of noise
    process.information_budget = 0.05  # fraction of the information that blur may cost, for that schedule
    process.beta_min = 0.002
    process.beta_max = 80.0
    process.rho = 7.0
    process.P_mean = -1.2  # ln β in training is N(P_mean, P_std²)
    process.P_std = 1.2

    model = config.model = ConfigDict()
    model.architecture = "ddpmpp"  # or "ncsnpp"
    model.channels = 128
    model.channel_mult = (2, 2, 2)
    model.num_blocks = 4
    model.attention = (16,)
    model.dropout = 0.13
    model.patch_size = 1
    model.remat = ()  # resolutions whose activations are computed again instead of kept
    model.dtype = "bfloat16"
    model.preconditioning = "edm"  # or "spectral"
    model.sigma_data = 0.5

    train = config.train = ConfigDict()
    train.batch_size = 512
    train.steps = 390_625
    train.learning_rate = 1e-3
    train.warmup_images = 10_000_000
    train.decay = "none"
    train.b1 = 0.9
    train.b2 = 0.999
    train.eps = 1e-8
    train.ema_halflife_images = 500_000.0
    train.ema_rampup_ratio = 0.05
    train.residual_weight = 1.0
    train.accumulation = 1  # slices of a batch, one after the other, where memory is short
    train.log_every = 100
    train.sample_every = 5_000
    train.checkpoint_every = 5_000
    train.keep_last = 2
    train.keep_every = 50_000
    train.max_nonfinite_steps = 100

    sample = config.sample = ConfigDict()
    sample.solver = "heun"
    sample.steps = 18  # 35 evaluations
    sample.batch_size = 256
    sample.bnr = config_dict.placeholder(float)  # unset: as trained
    sample.class_label = config_dict.placeholder(int)  # unset: each seed draws its own

    evaluation = config.eval = ConfigDict()
    evaluation.extractor = "inception"  # "inception" (FID), "efficientnet" or "fashion_cnn"
    evaluation.inception = ""  # file of the Inception weights
    evaluation.reference = ""  # a statistics .npz, or a source; empty: data.source
    evaluation.allow_other_data = False  # True: statistics of other images than the run was trained on
    evaluation.metrics = ("fd", "is", "lsd")  # of "fd", "fd_infinity", "kid", "is", "pr", "swd", "lsd"
    evaluation.count = 50_000
    evaluation.first = 0  # the first seed, or the number of the first image
    evaluation.batch_size = 250
    return config
