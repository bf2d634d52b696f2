"""CIFAR-10 at 32×32, unconditional: the paper's main experiment, EDM's DDPM++ recipe with blur and noise at BNR 0.5.

    python -m warm_jax --config=cifar10 --config.data.download=True     # fetches CIFAR-10 first
    python -m warm_jax --config=cifar10        # warm, BNR 0.5
    python -m warm_jax --config=cifar10:hot    # EDM; systems.py has all names

| system | published FID, 50,000 samples | evaluations | source |
|---|---|---|---|
| warm | 1.85 at BNR 0.5; 2.01 / 2.57 / 11.97 at BNR 1 / 2 / 10 | 35 | Hsueh et al. 2025, best of three rounds |
| hot | 1.97 (1.97 to 2.08 between seeds) | 35 | Karras et al. 2022, best of three rounds |
| pfgmpp | 1.91 with D = 2048, 1.92 with D = 128 | 35 | Xu et al. 2023 |
| ddpm | 3.17 | 1000 | Ho et al. 2020 |
| blurring | 3.17 | 1000 | Hoogeboom and Salimans 2022 |
| ihdm | 18.96 (clean-fid's) | 200 | Rissanen et al. 2022 |
| amortised, cold | none for unconditional samples | | |

The field since: 1.50 with one evaluation (SiDA, from EDM's weights; docs/comparison.md). 1.85 leads the paper's table.

Duration of EDM's family: 200 million images, 390,625 steps of 512; EDM's authors report about 2 days on 8 V100, 400
accelerator hours. ddpm and blurring: 800,000 steps of 128, half of that; ihdm: 1.3 million steps of 128.
"""

from ml_collections import ConfigDict, config_dict

from configs import analysis, likelihood, sampling, systems


def get_config(system: str = "warm") -> ConfigDict:
    """`system` is one of `systems.NAMES`; each with its published recipe."""
    return systems.published(recipe(system), system)


def recipe(system: str) -> ConfigDict:
    """EDM's recipe, whatever the system."""
    config = ConfigDict()
    config.seed = 0

    data = config.data = ConfigDict()
    data.source = "cifar10:data/cifar-10-binary.tar.gz"  # or what --mode=prepare made of it, or EDM's zip
    data.instructions = (  # shown where the source is missing
        "add --config.data.download=True, or curl --create-dirs -o data/cifar-10-binary.tar.gz "
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    )
    data.download = False  # True: fetch CIFAR-10 (170 MB) to where a cifar10: source names it
    data.image_size = 32
    data.channels = 3
    data.num_classes = 0  # 10: class-conditional
    data.label_dropout = 0.0  # share of the images whose class is hidden
    data.augment = "edm"  # "none", "flip" (left and right), or "edm": nine labels, told to the network
    data.augment_probability = 0.12  # of each kind of change, for "edm"
    data.on_error = "raise"  # or "skip": leave broken images out, and name them
    data.allow_changed = False  # True: go on from a checkpoint with other images than it began with
    data.num_workers = 0  # processes that decode, for sets too large for memory

    config.process = systems.process(system)

    model = config.model = ConfigDict()
    model.architecture = "ddpmpp"  # or "ncsnpp", or "adm"
    model.channels = 128
    model.channel_mult = (2, 2, 2)
    model.num_blocks = 4
    model.attention = (16,)
    model.dropout = 0.13
    model.patch_size = 1
    model.remat = ()  # resolutions whose activations are computed again instead of kept
    model.dtype = "bfloat16"
    model.preconditioning = "edm"  # what is predicted: models/denoiser.py has the choices
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
    train.clip_norm = 0.0  # the norm that gradients are clipped to; 0: not
    train.ema_halflife_images = 500_000.0
    train.ema_rampup_ratio = 0.05
    train.posthoc_ema = ()  # σ_rel of averages to make an EMA of any length of afterwards, as (0.05, 0.1); none
    train.posthoc_every = 10_000  # steps between the snapshots of them, which are all kept
    train.residual_weight = 1.0
    train.levels = config_dict.placeholder(str)  # the system's own; "information": uniform in what the images tell
    train.accumulation = 1  # slices of a batch, one after the other, where memory is short
    train.log_every = 100
    train.sample_every = 5_000
    train.evaluate_every = 0  # steps between scores while training, as `eval` says; 0: none
    train.evaluate_count = 5000  # images of each; a score's name says how many
    train.checkpoint_every = 5_000
    train.keep_last = 2
    train.keep_every = 50_000
    train.max_nonfinite_steps = 100

    mesh = config.mesh = ConfigDict()
    mesh.fsdp = 1  # devices that share one copy of the parameters, their EMA and Adam's state; 1: each has all

    config.sample = sampling.defaults(steps=18, batch_size=256)  # 35 evaluations

    evaluation = config.eval = ConfigDict()
    evaluation.extractor = "inception"  # "inception" (FID), "dinov2", …_b14, …_s14, "efficientnet", "fashion_cnn"
    evaluation.inception = ""  # file of the Inception weights
    evaluation.dinov2 = ""  # file of the DINOv2 weights
    evaluation.reference = ""  # a statistics .npz, or a source; empty: data.source
    evaluation.allow_other_data = False  # True: statistics of other images than the run was trained on
    evaluation.metrics = (
        "fd",
        "is",
        "lsd",
    )  # of fd, fd_infinity, kid, is, pr, dc, authenticity, swd, lsd, bpd, bpd_ode
    evaluation.shuffle_splits = False  # True: of the Inception Score, for images that are sorted by class
    evaluation.count = 50_000
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
    config.analysis = analysis.defaults(samples=10_000)  # --mode=analyze
    return config
