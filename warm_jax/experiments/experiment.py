"""From a config to the things that it describes, every value checked before anything is compiled.

The programs stand on this: it alone knows how a config names a network and a solver; `family.py` has the systems.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_jax.data import augment
from warm_jax.data.sources import Source
from warm_jax.diffusion import dct, ema, process, sampler, systems
from warm_jax.experiments import family, process_files
from warm_jax.models import adm, denoiser, geometry, layers, unet
from warm_jax.runtime import mesh as meshes
from warm_jax.runtime import pictures

# From the least to the most that makes sense, both allowed. Squares of noise and blur must stay inside float32.
_RANGES = {
    "seed": (0, 2**32 - 1),
    "data.num_classes": (0, 2**20),
    "data.num_workers": (0, 1024),
    "data.label_dropout": (0, 1),
    "data.augment_probability": (0, 1),
    "model.sigma_data": (1e-3, 1000),
    "train.batch_size": (1, 2**20),
    "train.steps": (1, 2**31 - 1),
    "train.learning_rate": (1e-12, 1000),
    "train.warmup_images": (0, 1e12),
    "train.b1": (0, 1 - 1e-6),
    "train.b2": (0, 1 - 1e-9),
    "train.eps": (0, 1),
    "train.clip_norm": (0, 1e9),
    "train.ema_halflife_images": (1, 1e12),
    "train.ema_rampup_ratio": (1e-6, 1e6),
    "train.residual_weight": (0, 1e6),
    "train.accumulation": (1, 2**20),
    "train.log_every": (1, 2**31 - 1),
    "train.sample_every": (0, 2**31 - 1),
    "train.evaluate_every": (0, 2**31 - 1),
    "train.evaluate_count": (2, 2**20),
    "train.checkpoint_every": (1, 2**31 - 1),
    "train.keep_last": (1, 10**6),
    "train.keep_every": (0, 2**31 - 1),
    "train.max_nonfinite_steps": (1, 2**31 - 1),
    "sample.steps": (1, 10_000),
    "sample.batch_size": (1, 2**20),
    "sample.S_churn": (0, 10_000),
    "sample.S_min": (0, 1e6),
    "sample.S_max": (0, 1e6),
    "sample.S_noise": (0, 10),
    "sample.delta": (0, 100),
    "sample.guidance": (0, 100),
}
_PROCESS_RANGES = {  # of the keys that a system has
    "bnr": (0, 10_000),
    "information_budget": (1e-4, 1 - 1e-4),
    "bnr_min": (1e-3, 10_000),
    "bnr_max": (1e-3, 10_000),
    "bnr_zero": (0, 1),
    "beta_min": (1e-6, 1e6),
    "beta_max": (1e-6, 1e6),
    "rho": (0.1, 1000),
    "P_mean": (-10, 10),
    "P_std": (1e-3, 10),
    "augmented_dims": (1e-3, 1e9),
    "steps": (1, 100_000),
    "blur_min": (1e-3, 10_000),
    "blur_max": (0, 10_000),
    "d_min": (1e-6, 1),
    "noise": (0, 10),
    "symmetry_noise": (0, 10),
    "theta": (-8, 8),
    "band_low": (0, 2),
    "band_high": (0, 2),
    "band_floor": (1e-4, 1),
    "scale_min": (1e-6, 0.5),
}
_INTEGERS = ("model.channel_mult", "model.attention", "model.remat")
_CHOICES = {
    "data.channels": (1, 3),
    "data.augment": ("none", "flip", "edm"),
    "data.on_error": ("raise", "skip"),
    "model.dtype": ("float32", "bfloat16"),
    "train.decay": ("none", "cosine"),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config made real: what training and sampling share.

    `sampled` is the process of sampling: `process`, but of an amortised model the one at the BNR that was asked for.
    """

    config: ConfigDict
    mesh: Mesh
    process: process.Process
    model: denoiser.Denoiser
    sampled: process.Process

    @property
    def to_sample(self) -> denoiser.Denoiser:
        """The model on the process that it is sampled on."""
        return self.model.of(self.sampled)


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
    for key in (*_RANGES, *_CHOICES, *_INTEGERS, "data.image_size"):
        if lookup(config, key) is None:
            raise ValueError(f"{key} is unset; give it with --config.{key}=VALUE")
    for key, (least, most) in _RANGES.items():
        if not least <= lookup(config, key) <= most:  # also refuses nan
            raise ValueError(f"{key} is {lookup(config, key)}; it must be from {_number(least)} to {_number(most)}")
    for key, choices in _CHOICES.items():
        if lookup(config, key) not in choices:
            raise ValueError(f"{key} is {lookup(config, key)!r}; choose one of {', '.join(map(str, choices))}")
    for key in _INTEGERS:
        if not all(type(value) is int for value in lookup(config, key)):
            raise ValueError(f"{key} is {lookup(config, key)!r}; it must hold whole numbers, as (1, 2)")
    for key, (least, most) in _PROCESS_RANGES.items():
        value = config.process.get(key)
        if value is not None and not least <= value <= most:
            raise ValueError(f"process.{key} is {value}; it must be from {_number(least)} to {_number(most)}")
    for key in ("beta_min", "rho"):
        value, (least, most) = lookup(config, f"sample.{key}"), _PROCESS_RANGES[key]
        if value is not None and not least <= value <= most:
            raise ValueError(f"sample.{key} is {value}; it must be from {_number(least)} to {_number(most)}, or unset")
    known = family.of(config).preconditionings
    if config.model.preconditioning not in known:
        raise ValueError(
            f"model.preconditioning is {config.model.preconditioning!r}; for {config.process.system} choose one of "
            f"{', '.join(known)}"
        )
    _check_averages(config)
    _check_guidance_interval(config)


def guidance_interval(config: ConfigDict) -> tuple[float | int, ...]:
    """σ_lo and σ_hi of `sample.guidance_interval`; () for all levels, also where an older config has no key."""
    return tuple(config.sample.get("guidance_interval", None) or ())


def _check_guidance_interval(config: ConfigDict) -> None:
    """Raises ValueError where `sample.guidance_interval` is neither () nor two noise levels, the lower first."""
    bounds = guidance_interval(config)
    numbers = all(type(bound) in (int, float) for bound in bounds)
    if bounds and not (len(bounds) == 2 and numbers and 0 <= bounds[0] < bounds[1]):
        raise ValueError(
            f"sample.guidance_interval is {bounds}; give two noise levels, the lower one first, as (0.2, 5), or () to "
            "guide at all levels"
        )


def averages(config: ConfigDict) -> tuple[float, ...]:
    """The relative lengths of the averages that training keeps besides the EMA; () where an older config has no key."""
    return tuple(config.train.get("posthoc_ema", ()))


def _check_averages(config: ConfigDict) -> None:
    """Raises ValueError where `train.posthoc_ema` are no relative lengths, or `train.posthoc_every` no steps."""
    asked = averages(config)
    for value in asked:
        ema.check_sigma_rel(value, f"train.posthoc_ema is {asked}, of which one")
    if list(asked) != sorted(set(asked)):
        raise ValueError(f"train.posthoc_ema is {asked}; name relative lengths rising, each once, as (0.05, 0.1)")
    near = [pair for pair in itertools.pairwise(asked) if pair[1] < (ema.LEAST_RATIO - 1e-9) * pair[0]]
    if near:
        raise ValueError(
            f"train.posthoc_ema is {asked}; {near[0][0]:g} and {near[0][1]:g} tell next to the same: leave "
            "10 % between lengths, as (0.05, 0.1)"
        )
    if asked and not 1 <= lookup(config, "train.posthoc_every") <= 2**31 - 1:
        raise ValueError(f"train.posthoc_every is {config.train.posthoc_every}; it must be from 1 to {2**31 - 1:,}")


def check_batch(config: ConfigDict, devices: int) -> None:
    """Raises ValueError where the training batch does not divide over the devices and the accumulation."""
    batch, parts = config.train.batch_size, config.train.accumulation * devices
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        raise ValueError(
            f"train.batch_size {batch} does not divide over {devices} device(s) × {config.train.accumulation} "
            f"accumulation step(s) = {parts}; use {f'{below} or ' if below else ''}{above}"
        )


def check_classes(config: ConfigDict, source: Source) -> None:
    """Raises ValueError where the config has another number of classes than the images, and not 0: to ignore them."""
    if config.data.num_classes not in (0, source.num_classes):
        raise ValueError(
            f"data.num_classes is {config.data.num_classes}, {source.spec} has {source.num_classes} classes; set it to "
            + (f"{source.num_classes}, or to 0 to ignore classes" if source.num_classes else "0")
        )


def on(exp: Experiment, mesh: Mesh) -> Experiment:
    """The experiment on the devices of `mesh`; its network knows their platform."""
    network = exp.model.network.clone(platform=mesh.devices.flat[0].platform)
    return dataclasses.replace(exp, mesh=mesh, model=dataclasses.replace(exp.model, network=network))


def for_training(exp: Experiment, devices: list | None = None) -> Experiment:
    """The experiment on the mesh that `mesh.fsdp` asks for, of all devices or of these.

    ValueError where that does not divide the devices, or no parameter can be divided so.
    """
    fsdp = lookup(exp.config, "mesh.fsdp")  # which older workdirs do not have, and sampling does not need
    mesh = meshes.make_mesh(fsdp=fsdp) if devices is None else meshes.over(devices, fsdp)
    made = on(exp, mesh)
    if fsdp == 1:
        return made
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(exp.model.init, jax.random.key(0)))]
    if all(meshes.divided(made.mesh, shape).is_fully_replicated for shape in shapes):
        largest = max(shapes, key=math.prod)
        raise ValueError(
            f"mesh.fsdp {fsdp} divides none of the {len(shapes)} parameters: the largest is "
            f"{' × '.join(map(str, largest))}, and an axis must be a multiple of {fsdp} in one of at least "
            f"{meshes.LEAST_TO_DIVIDE} numbers; use a smaller mesh.fsdp, or 1"
        )
    return made


def needs_measuring(config: ConfigDict) -> bool:
    """Whether the process, its levels or the preconditioning stand on something measured of the data."""
    by_power = config.model.preconditioning == "spectral" or config.process.get("schedule") == "information_budget"
    by_power = by_power or config.train.get("levels") == "information"
    return by_power or family.of(config).measures or sampling_measures(config)


def sampling_measures(config: ConfigDict) -> bool:
    """Whether the levels of sampling do."""
    return config.sample.levels == "information"


def _parts(source: Source, most: int) -> list[np.ndarray]:
    """At most `most` images, spread evenly over the source, as numbers in parts of a thousand."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))
    return np.array_split(chosen, -(-len(chosen) // 1000))


def measure(config: ConfigDict, source: Source, most: int = 10_000) -> family.Measured:
    """The mean DCT power `[h, w]` of up to `most` images and, for systems that start from images, those of some."""
    power = jax.jit(lambda images: dct.power(pictures.from_uint8(images)) * len(images))
    parts = _parts(source, most)
    mean = np.sum([power(source.read(part)[0]) for part in parts], axis=0, dtype=np.float64) / sum(map(len, parts))
    if config.process.system == "own":
        return family.Measured(mean, digest=process_files.digest(config.process.file))
    if "start" not in config.process:
        return family.Measured(mean)
    exp = build(config)
    alpha = float(exp.process.blur(jnp.asarray(exp.process.highest)))
    low = [
        systems.low_frequencies(pictures.from_uint8(jnp.asarray(source.read(part)[0])), alpha)
        for part in _parts(source, family.START_IMAGES)
    ]
    return family.Measured(mean, np.concatenate(low))


def image_side(config: ConfigDict) -> tuple[int, int]:
    """(height, width) of `data.image_size`, which is one side or both."""
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _network(config: ConfigDict, shape: tuple[int, int, int], around: denoiser.Preconditioning, two: bool):
    """The network that the config describes, its limits checked; `two`: it is told two numbers of a level."""
    settings = config.model.copy_and_resolve_references()
    fields = {
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
    geometry.check_geometry(*shape[:2], **fields)
    kind = adm.ADM if settings.architecture == "adm" else unet.UNet
    return kind(out_channels=shape[2] * around.heads, second_condition=two, dtype=jnp.dtype(settings.dtype), **fields)


def build(config: ConfigDict, measured: family.Measured | None = None) -> Experiment:
    """Checks `config` and makes its process and model; `measured` where `needs_measuring`. ValueError for bad ones."""
    check_values(config)
    shape, system = (*image_side(config), config.data.channels), family.of(config)
    if measured is None:  # only shapes and ranges are checked with it
        measured = family.Measured(np.ones(shape[:2]), np.zeros((2, 1, 1, shape[2]), np.float32))
    try:
        kind = system.build(shape, config.process, measured)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"config.process lacks a key that {config.process.system} needs: {error}") from error
    kind, sampled = family.to_train(config, kind, measured), family.to_sample(config, kind, measured)
    sampler.check_solver(config.sample.solver, sampled)
    sampled.levels(config.sample.steps)
    if config.sample.clip and kind.target is not None:
        raise ValueError(f"sample.clip is True, but {config.process.system} predicts no x0 that could be clipped")

    def precondition(of: process.Process) -> denoiser.Preconditioning:
        return denoiser.choose(config.model.preconditioning, of, config.model.sigma_data, measured.power)

    around = precondition(kind)
    told = jax.eval_shape(around.conditions, jax.ShapeDtypeStruct((1,), jnp.float32))
    model = denoiser.Denoiser(_network(config, shape, around, len(told) == 2), kind, precondition)
    where = meshes.make_mesh()
    return on(Experiment(config, where, kind, model, sampled), where)


def precision_policy(exp: Experiment) -> str:
    """One line for people: what is computed in which precision, on the devices of the experiment."""
    how = layers.policy(exp.config.model.dtype, exp.mesh.devices.flat[0].platform)
    if how.stream == jnp.bfloat16:
        network = "convolutions, attention products and what lies between blocks bfloat16; sums in the network float32"
    elif how.products == jnp.bfloat16:
        network = "convolutions and attention products bfloat16; the rest of the network float32"
    else:
        network = "the network float32 throughout (no TF32, no bfloat16 passes)"
    return f"precision: parameters, norms, softmax, DCT, preconditioning and loss float32; {network}"
