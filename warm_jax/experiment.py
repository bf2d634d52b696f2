"""From a config to the things that it describes, every value checked before anything is compiled.

The programs stand on this: it alone knows how a config names a process, a network and a solver.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_jax import mesh as meshes
from warm_jax import pictures
from warm_jax.data import augment
from warm_jax.data.sources import Source
from warm_jax.diffusion import bnr, dct, process, sampler
from warm_jax.models import denoiser, unet

# From the least to the most that makes sense, both allowed. Squares of noise and blur must stay inside float32.
_RANGES = {
    "seed": (0, 2**32 - 1),
    "data.num_classes": (0, 2**20),
    "data.num_workers": (0, 1024),
    "data.label_dropout": (0, 1),
    "data.augment_probability": (0, 1),
    "process.bnr": (0, 10_000),
    "process.information_budget": (1e-4, 1 - 1e-4),
    "process.beta_min": (1e-6, 1e6),
    "process.beta_max": (1e-6, 1e6),
    "process.rho": (0.1, 1000),
    "process.P_mean": (-10, 10),
    "process.P_std": (1e-3, 10),
    "model.sigma_data": (1e-3, 1000),
    "train.batch_size": (1, 2**20),
    "train.steps": (1, 2**31 - 1),
    "train.learning_rate": (1e-12, 1000),
    "train.warmup_images": (0, 1e12),
    "train.b1": (0, 1 - 1e-6),
    "train.b2": (0, 1 - 1e-9),
    "train.eps": (0, 1),
    "train.ema_halflife_images": (1, 1e12),
    "train.ema_rampup_ratio": (1e-6, 1e6),
    "train.residual_weight": (0, 1e6),
    "train.accumulation": (1, 2**20),
    "train.log_every": (1, 2**31 - 1),
    "train.sample_every": (0, 2**31 - 1),
    "train.checkpoint_every": (1, 2**31 - 1),
    "train.keep_last": (1, 10**6),
    "train.keep_every": (0, 2**31 - 1),
    "train.max_nonfinite_steps": (1, 2**31 - 1),
    "sample.steps": (1, 10_000),
    "sample.batch_size": (1, 2**20),
}
_INTEGERS = ("model.channel_mult", "model.attention", "model.remat")
_CHOICES = {
    "data.channels": (1, 3),
    "data.augment": ("none", "flip", "edm"),
    "data.on_error": ("raise", "skip"),
    "process.system": ("warm", "hot"),
    "process.schedule": ("constant", "information_budget"),
    "model.preconditioning": ("edm", "spectral"),
    "model.dtype": ("float32", "bfloat16"),
    "train.decay": ("none", "cosine"),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config made real: what training and sampling share."""

    config: ConfigDict
    mesh: Mesh
    process: process.Process
    model: denoiser.Denoiser


def lookup(config: ConfigDict, key: str):
    """The value at a dotted key; ValueError where a config file leaves it out."""
    for part in key.split("."):
        if part not in config:
            raise ValueError(f"the config has no {key}; add it, as in configs/fashion_mnist.py")
        config = config[part]
    return config


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def check_values(config: ConfigDict) -> None:
    """Raises ValueError, naming key, value and limit, for a number or a choice out of range."""
    for key, (least, most) in _RANGES.items():
        if not least <= lookup(config, key) <= most:  # also refuses nan
            raise ValueError(f"{key} is {lookup(config, key)}; it must be from {_number(least)} to {_number(most)}")
    for key, choices in _CHOICES.items():
        if lookup(config, key) not in choices:
            raise ValueError(f"{key} is {lookup(config, key)!r}; choose one of {', '.join(map(str, choices))}")
    for key in _INTEGERS:
        if not all(type(value) is int for value in lookup(config, key)):
            raise ValueError(f"{key} is {lookup(config, key)!r}; it must hold whole numbers, as (1, 2)")
    if config.process.system == "hot" and config.process.bnr != 0:
        raise ValueError(f"process.bnr is {config.process.bnr}; the hot system has no blur: set it to 0, or use :warm")
    if config.process.system == "hot" and config.process.schedule != "constant":
        raise ValueError(f"process.schedule is {config.process.schedule}; the hot system has no blur: use :warm")
    sampler.check_solver(config.sample.solver)


def check_batch(config: ConfigDict, devices: int) -> None:
    """Raises ValueError where the training batch does not divide over the devices and the accumulation."""
    batch, parts = config.train.batch_size, config.train.accumulation * devices
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        raise ValueError(
            f"train.batch_size {batch} does not divide over {devices} device(s) × {config.train.accumulation} "
            f"accumulation step(s) = {parts}; use {f'{below} or ' if below else ''}{above}"
        )


def needs_spectrum(config: ConfigDict) -> bool:
    """Whether the process or the preconditioning follow the data's measured power."""
    return config.model.preconditioning == "spectral" or config.process.schedule == "information_budget"


def measure_spectrum(source: Source, most: int = 10_000) -> np.ndarray:
    """The mean DCT power `[h, w]` of up to `most` images, spread evenly over the source."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))
    power = jax.jit(lambda images: dct.power(pictures.from_uint8(images)) * len(images))
    parts = np.array_split(chosen, -(-len(chosen) // 1000))
    return np.sum([power(source.read(part)[0]) for part in parts], axis=0, dtype=np.float64) / len(chosen)


def image_side(config: ConfigDict) -> tuple[int, int]:
    """(height, width) of `data.image_size`, which is one side or both."""
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _process(config: ConfigDict, spectrum: np.ndarray | None) -> process.Process:
    shape, settings = (*image_side(config), config.data.channels), config.process
    levels = {name: settings[name] for name in ("beta_min", "beta_max", "rho", "P_mean", "P_std")}
    if settings.schedule == "information_budget":
        return process.warm(shape, bnr.information_budget(spectrum, settings.information_budget), **levels)
    if settings.bnr == 0:
        return process.hot(shape, **levels)
    return process.warm(shape, bnr.constant(settings.bnr), **levels)


def build(config: ConfigDict, spectrum: np.ndarray | None = None) -> Experiment:
    """Checks `config` and makes its process and model; `spectrum` where `needs_spectrum`. ValueError for bad values."""
    check_values(config)
    if needs_spectrum(config) and spectrum is None:
        spectrum = np.ones(image_side(config))  # only shapes and ranges are checked with it
    kind = _process(config, spectrum)
    settings = config.model.copy_and_resolve_references()
    shape = {
        "channels": settings.channels,
        "channel_mult": tuple(settings.channel_mult),
        "num_blocks": settings.num_blocks,
        "attention": tuple(settings.attention),
        "dropout": settings.dropout,
        "architecture": settings.architecture,
        "num_classes": config.data.num_classes,
        "augment_labels": augment.LABELS if config.data.augment == "edm" else 0,
        "patch_size": settings.patch_size,
        "remat": tuple(settings.remat),
    }
    unet.check_geometry(*kind.image_shape[:2], **shape)
    network = unet.UNet(
        out_channels=kind.image_shape[2] * (2 if kind.blurs else 1),
        second_condition=kind.blurs,
        dtype=jnp.dtype(settings.dtype),
        **shape,
    )
    if settings.preconditioning == "spectral":
        preconditioning = denoiser.spectral(kind, spectrum)
    else:
        preconditioning = denoiser.edm(kind, settings.sigma_data)
    return Experiment(config, meshes.make_mesh(), kind, denoiser.Denoiser(network, kind, preconditioning))


def precision_policy(config: ConfigDict) -> str:
    """One line for people: what is computed in which precision."""
    if config.model.dtype == "bfloat16":
        network = "convolutions and attention products bfloat16; the rest of the network float32"
    else:
        network = "the network float32 throughout (no TF32, no bfloat16 passes)"
    return f"precision: parameters, norms, softmax, DCT, preconditioning and loss float32; {network}"
