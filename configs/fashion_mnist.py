"""The bundled images: Fashion-MNIST at 28×28, ten classes. Minutes on a laptop, to see the whole thing work.

    python -m warm_jax --config=fashion_mnist          # blur and noise (BNR 0.5)
    python -m warm_jax --config=fashion_mnist:hot      # noise alone: EDM; systems.py has all names
    python -m warm_jax --config=fashion_mnist --mode=sample --seeds=0-99

The bundled file is Fashion-MNIST's *test* file, 10,000 images, used here for training: nobody's benchmark. For the full
training set, name the folder of its IDX files: --config.data.source=idx:FOLDER.
"""

from ml_collections import ConfigDict, config_dict

from configs import analysis, likelihood, sampling, systems


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`; all with the same network and training."""
    config = ConfigDict()
    config.seed = 0

    data = config.data = ConfigDict()
    data.source = "bundled"
    data.instructions = ""  # how to get the data, shown where the source is missing
    data.download = False  # True: fetch CIFAR-10 (170 MB) to where a cifar10: source names it
    data.image_size = 28
    data.channels = 1
    data.num_classes = 10  # 0: ignore the classes
    data.label_dropout = 0.0  # share of the images whose class is hidden
    data.augment = "none"  # "none", "flip" (left and right), or "edm": nine labels, told to the network
    data.augment_probability = 0.0  # of each kind of change, for "edm"
    data.on_error = "raise"  # or "skip": leave broken images out, and name them
    data.allow_changed = False  # True: go on from a checkpoint with other images than it began with
    data.num_workers = 0  # processes that decode, for sets too large for memory

    config.process = systems.process(system)
    if system == "ihdm":
        config.process.steps, config.process.blur_max = 100, 20.0  # as published for MNIST

    model = config.model = ConfigDict()
    model.architecture = "ddpmpp"  # or "ncsnpp", or "adm"
    model.channels = 32
    model.channel_mult = (1, 2)
    model.num_blocks = 1
    model.attention = (7,)
    model.dropout = 0.0
    model.patch_size = 2  # the network sees 14×14 patches of 2×2 pixels
    model.remat = ()
    model.dtype = "float32"
    model.preconditioning = "edm"  # what is predicted: models/denoiser.py has the choices
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
    train.clip_norm = 0.0  # the norm that gradients are clipped to; 0: not
    train.ema_halflife_images = 6400.0
    train.ema_rampup_ratio = 0.05
    train.posthoc_ema = ()  # σ_rel of averages to make an EMA of any length of afterwards, as (0.05, 0.1); none
    train.posthoc_every = 60  # steps between the snapshots of them, which are all kept
    train.residual_weight = 1.0
    train.levels = config_dict.placeholder(str)  # the system's own; "information": uniform in what the images tell
    train.accumulation = 1
    train.log_every = 200
    train.sample_every = 900
    train.evaluate_every = 0  # steps between scores while training, as `eval` says; 0: none
    train.evaluate_count = 500  # images of each; a score's name says how many
    train.checkpoint_every = 500
    train.keep_last = 2
    train.keep_every = 0  # 0: only the last ones
    train.max_nonfinite_steps = 50

    mesh = config.mesh = ConfigDict()
    mesh.fsdp = 1  # devices that share one copy of the parameters, their EMA and Adam's state; 1: each has all

    config.sample = sampling.defaults(steps=18, batch_size=64)  # 35 evaluations

    evaluation = config.eval = ConfigDict()
    evaluation.extractor = "fashion_cnn"  # "inception" (FID), "dinov2", …_b14, …_s14, "efficientnet", "fashion_cnn"
    evaluation.inception = ""  # file of the Inception weights
    evaluation.dinov2 = ""  # file of the DINOv2 weights
    evaluation.reference = ""  # a statistics .npz, or a source; empty: data.source
    evaluation.allow_other_data = False  # True: statistics of other images than the run was trained on
    evaluation.metrics = ("fd", "kid", "pr", "swd", "lsd")  # also fd_infinity, is, dc, authenticity, bpd, bpd_ode
    evaluation.shuffle_splits = False  # True: of the Inception Score, for images that are sorted by class
    evaluation.count = 5_000
    evaluation.first = 0  # the first seed, or the number of the first image
    evaluation.batch_size = 250

    compare = config.compare = ConfigDict()  # --mode=compare
    compare.systems = systems.COMPARED
    compare.repeated = ("hot", "warm")  # these are trained from `repeats` seeds, the others from one
    compare.repeats = 3
    compare.steps = 18  # of Heun's solver, beside each system's own
    compare.shown = 10  # samples in the picture, a system
    compare.record = ""  # folder that keeps finished rows with their configs, which are not run again; empty: none
    config.likelihood = likelihood.defaults()  # of the metrics bpd and bpd_ode
    config.analysis = analysis.defaults(samples=500)  # --mode=analyze
    systems.native(config, system)
    config.sample.steps = min(config.sample.steps, 100)  # of the 1000 of some: minutes are short here
    return config
