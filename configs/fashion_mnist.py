"""The bundled images: Fashion-MNIST at 28×28, ten classes. Minutes on a laptop, to see the whole thing work.

    python -m warm_jax.main --config=configs/fashion_mnist.py          # blur and noise (BNR 0.5)
    python -m warm_jax.main --config=configs/fashion_mnist.py:hot      # noise alone: EDM
    python -m warm_jax.main --config=configs/fashion_mnist.py --mode=sample --seeds=0-99

The bundled file is Fashion-MNIST's *test* file, 10,000 images, used here for training: nobody's benchmark. For the full
training set, name the folder of its IDX files: --config.data.source=idx:FOLDER.
"""

from ml_collections import ConfigDict, config_dict


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is "warm" or "hot"."""
    config = ConfigDict()
    config.seed = 0

    data = config.data = ConfigDict()
    data.source = "bundled"
    data.instructions = ""  # how to get the data, shown where the source is missing
    data.image_size = 28
    data.channels = 1
    data.num_classes = 10  # 0: ignore the classes
    data.label_dropout = 0.0  # share of the images whose class is hidden
    data.augment = "none"  # "none", "flip" (left and right), or "edm": nine labels, told to the network
    data.augment_probability = 0.0  # of each kind of change, for "edm"
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
    model.channels = 32
    model.channel_mult = (1, 2)
    model.num_blocks = 1
    model.attention = (7,)
    model.dropout = 0.0
    model.patch_size = 2  # the network sees 14×14 patches of 2×2 pixels
    model.remat = ()
    model.dtype = "float32"
    model.preconditioning = "edm"  # or "spectral"
    model.sigma_data = 0.5

    train = config.train = ConfigDict()
    train.batch_size = 32
    train.steps = 1800
    train.learning_rate = 3e-3
    train.warmup_images = 3200
    train.decay = "cosine"  # or "none", as EDM
    train.b1 = 0.9
    train.b2 = 0.999
    train.eps = 1e-8
    train.ema_halflife_images = 6400.0
    train.ema_rampup_ratio = 0.05
    train.residual_weight = 1.0
    train.accumulation = 1
    train.log_every = 200
    train.sample_every = 900
    train.checkpoint_every = 500
    train.keep_last = 2
    train.keep_every = 0  # 0: only the last ones
    train.max_nonfinite_steps = 50

    sample = config.sample = ConfigDict()
    sample.solver = "heun"  # "euler", "heun" or "multistep"
    sample.steps = 18
    sample.batch_size = 64
    sample.bnr = config_dict.placeholder(float)  # unset: as trained
    sample.class_label = config_dict.placeholder(int)  # unset: each seed draws its own

    evaluation = config.eval = ConfigDict()
    evaluation.extractor = "fashion_cnn"  # "inception" (FID), "efficientnet" or "fashion_cnn"
    evaluation.inception = ""  # file of the Inception weights
    evaluation.reference = ""  # a statistics .npz, or a source; empty: data.source
    evaluation.allow_other_data = False  # True: statistics of other images than the run was trained on
    evaluation.metrics = ("fd", "kid", "pr", "swd", "lsd")  # of "fd", "fd_infinity", "kid", "is", "pr", "swd", "lsd"
    evaluation.count = 5_000
    evaluation.first = 0  # the first seed, or the number of the first image
    evaluation.batch_size = 250
    return config
