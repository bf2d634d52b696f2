"""What tells one system's config from another's, for every data set: process, sampler, published recipe.

--config=cifar10:NAME      NAME one of

warm            blur and noise at a constant blur-to-noise ratio: the paper's, and the default
amortised       warm with a ratio drawn for each image; sampled at any --config.sample.bnr
hot             noise alone: EDM
pfgmpp          EDM with heavy-tailed noise: PFGM++
ddpm            denoising diffusion
blurring        blurring diffusion
blurring_heads  the same with the warm paper's two heads in place of ε (ours)
ihdm            inverse heat dissipation
cold            cold diffusion: blur alone
equal_snr       denoising diffusion whose noise has the colour of the data: all frequencies drown together
flipped_snr     … in which high frequencies drown last; its authors could not train it
coloured        … in any process.colour, a power law of exponent process.theta
coloured_warm   warm, with noise in any process.colour (ours)
heat_flow       flow matching along blur and noise: HDFM
own             a process in a file of your own, --config.process.file
"""

from ml_collections import ConfigDict, config_dict

COMPARED = ("warm", "amortised", "hot", "pfgmpp", "ddpm", "blurring", "blurring_heads", "ihdm", "cold")
NAMES = (*COMPARED, "equal_snr", "flipped_snr", "coloured", "coloured_warm", "heat_flow", "own")
_COLOURS = {"equal_snr": "equal_snr", "flipped_snr": "flipped_snr", "coloured": "power_law"}


def _edm_levels(process: ConfigDict) -> None:
    process.beta_min = 0.002
    process.beta_max = 80.0
    process.rho = 7.0
    process.P_mean = -1.2  # ln β in training is N(P_mean, P_std²)
    process.P_std = 1.2


def process(system: str) -> ConfigDict:
    """The `process` section of `system`, with CIFAR-10's constants where they depend on the data."""
    if system not in NAMES:
        raise ValueError(f"there is no system {system!r}; choose one of {', '.join(NAMES)}")
    made = ConfigDict()
    made.system = "coloured" if system in _COLOURS else system.removesuffix("_heads")
    made.bnr = config_dict.placeholder(float)  # blur in pixels per unit of noise, of systems that have it
    if system == "warm":
        made.bnr = 0.5
        made.schedule = "constant"  # or "information_budget": blur as much as the data's own spectrum allows
        made.information_budget = 0.05  # fraction of the information that blur may cost, for that schedule
        made.bnr_max = 10.0  # and the most that it may blur
        _edm_levels(made)
    elif system == "amortised":
        made.bnr_min = 0.05  # log-uniform from here …
        made.bnr_max = 10.0  # … to here,
        made.bnr_zero = 0.1  # and 0 for this share of the images
        made.information_budget = 0.05  # for sample.schedule = "information_budget"
        _edm_levels(made)
    elif system == "hot":
        made.bnr = 0.0
        _edm_levels(made)
    elif system == "pfgmpp":
        made.augmented_dims = 2048.0  # D; EDM as D → ∞
        _edm_levels(made)
    elif system == "ddpm":
        made.schedule = "linear"  # or "cosine"
        made.steps = 1000  # levels in training, of the linear schedule
    elif made.system == "blurring":
        made.blur_max = 20.0  # pixels; 10 is used too
        made.d_min = 0.001  # what is left of each frequency
    elif system == "ihdm":
        made.steps = 200  # K
        made.blur_min = 0.5  # pixels, at k = 1
        made.blur_max = 24.0  # at k = K
        made.noise = 0.02  # 0.01 of images on [0, 1]
        made.start = "images"  # sampling starts from blurred training images, or from "colours"
    elif system == "cold":
        made.kernels = "exponential"  # std e^(i/100), down to one colour; "linear", 0.35 + i/100, stops at 4 pixels
        made.steps = 300
        made.kernel_size = 27
        made.symmetry_noise = 0.002
        made.start = "colours"  # a Gaussian fitted to the mean colours; "images" for "linear"
    elif system in _COLOURS:
        made.schedule, made.steps = "linear", 1000  # as of ddpm
        _colour(made, _COLOURS[system])
    elif system == "coloured_warm":
        made.bnr = 0.5
        _colour(made, "equal_snr")
        _edm_levels(made)
    elif system == "own":
        made.file = config_dict.placeholder(str)  # defines make(image_shape, power): docs/systems.md
    elif system == "heat_flow":
        made.scale_min = 1e-4  # what is left of images where sampling starts
    return made


def _colour(process: ConfigDict, colour: str) -> None:
    process.colour = colour  # of the noise: equal_snr, flipped_snr, power_law or band
    process.theta = -0.5  # power_law: noise ∝ (1 + frequency)^theta; 0 white, -1 about as photographs
    process.band_low = 0.0  # band: noise from this share of the highest frequency …
    process.band_high = 0.5  # … to this one,
    process.band_floor = 0.1  # and this share of it elsewhere


def native(config: ConfigDict, system: str) -> ConfigDict:
    """Sets what the model predicts and how it is sampled, for `system`; the rest stays."""
    sample = config.sample
    if system in ("ddpm", "blurring", "blurring_heads", *_COLOURS):
        config.model.preconditioning = "edm" if system == "blurring_heads" else "noise"
        sample.solver, sample.steps = "ancestral", 1000
        sample.clip = system == "ddpm" or system in _COLOURS
    elif system == "heat_flow":
        config.model.preconditioning = "velocity"
        sample.solver, sample.steps = "heun", 50
    elif system == "ihdm":
        config.model.preconditioning = "one_step"
        sample.solver, sample.steps = "perturb", config.process.steps
    elif system == "cold":
        config.model.preconditioning = "direct"
        sample.solver, sample.steps = "euler", config.process.steps
    return config


def published(config: ConfigDict, system: str) -> ConfigDict:
    """`native`, and the network and training that the system's authors used on CIFAR-10. EDM's family stays as it is.

    Not checked against the authors' files, so check before quoting: DDPM's depth, clipping and duration; all of
    blurring diffusion's and coloured noise's, which are DDPM's. Ours: cold diffusion's network, batch and duration; all
    of heat_flow's but its process and loss, which are EDM's.
    The rest stands in docs/systems.md.
    """
    model, train = config.model, config.train
    native(config, system)
    system = config.process.system
    if system in ("ddpm", "blurring", "ihdm", "cold", "coloured"):
        config.data.augment = "flip"
        model.dropout = 0.1
        train.batch_size = 128
        train.learning_rate = 2e-4
        train.warmup_images = 640_000  # 5000 steps
        train.clip_norm = 1.0
        train.ema_rampup_ratio = 1e6  # none
    if system in ("ddpm", "blurring", "coloured"):
        model.channel_mult = (1, 2, 2, 2)
        model.num_blocks = 2
        train.steps = 800_000
        train.ema_halflife_images = 887_000.0  # 0.9999 a step
    elif system == "ihdm":
        model.channel_mult = (1, 2, 2, 2)
        model.attention = (config.data.image_size // 4, config.data.image_size // 8)
        train.steps = 1_300_000
        train.ema_halflife_images = 88_700.0  # 0.999 a step
    elif system == "cold":
        model.channel_mult = (1, 2, 2, 2)
        train.steps = 700_000
        train.learning_rate = 2e-5
        train.ema_halflife_images = 177_000.0  # 0.995 every 10 steps
    return config
