"""From a config to the things that it describes, every value checked before anything is compiled.

The programs stand on this: it alone knows how a config names a process, a network and a solver.
"""

import dataclasses
import io
import json
import os
import pathlib
import tempfile

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

# What a config says of the weights and of the run that made them: with another value, a checkpoint means something
# else.
MODEL_KEYS = ("data.image_size", "data.channels", "data.num_classes", "data.augment", "model", "process")
RUN_KEYS = (
    *("seed", "data.augment_probability", "data.label_dropout"),
    *("train.batch_size", "train.accumulation", "train.ema_halflife_images"),
)

# Least values; the rest of the numbers are checked by the modules that they go to.
_AT_LEAST = {
    **{f"train.{name}": 1 for name in ("batch_size", "steps", "accumulation", "log_every", "checkpoint_every")},
    **{f"train.{name}": 0 for name in ("warmup_images", "sample_every", "keep_every", "residual_weight", "eps")},
    **{"train.keep_last": 1, "train.max_nonfinite_steps": 1, "sample.steps": 1, "sample.batch_size": 1},
    **{"seed": 0, "data.num_classes": 0, "data.num_workers": 0},
}
_ABOVE_ZERO = ("train.learning_rate", "train.ema_halflife_images", "train.ema_rampup_ratio")
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


def check_values(config: ConfigDict) -> None:
    """Raises ValueError, naming key, value and limit, for a number or a choice out of range."""
    for key, least in _AT_LEAST.items():
        if not lookup(config, key) >= least:
            raise ValueError(f"{key} is {lookup(config, key)}; it must be at least {least}")
    if config.seed >= 2**32:
        raise ValueError(f"seed is {config.seed}; it must be below 2^32")
    for key in _ABOVE_ZERO:
        if not 0 < lookup(config, key) < float("inf"):
            raise ValueError(f"{key} is {lookup(config, key)}; it must be above 0")
    for key, choices in _CHOICES.items():
        if lookup(config, key) not in choices:
            raise ValueError(f"{key} is {lookup(config, key)!r}; choose one of {', '.join(map(str, choices))}")
    for key in ("train.b1", "train.b2", "data.label_dropout"):
        if not 0 <= lookup(config, key) < 1:
            raise ValueError(f"{key} is {lookup(config, key)}; it must be in [0, 1)")
    if not 0 <= config.data.augment_probability <= 1:
        raise ValueError(f"data.augment_probability is {config.data.augment_probability}; it must be in [0, 1]")
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


# ── The workdir ──────────────────────────────────────────────────────────────────────────────────────────────────────


def check_writable(folder: pathlib.Path) -> None:
    """Makes `folder` and raises OSError, naming it, where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write in {folder} ({error.strerror}); choose another with --workdir or --out") from error


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """The file is there whole, or as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes `config.json`."""
    write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2, default=list).encode() + b"\n")


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def check_same(config: ConfigDict, workdir: pathlib.Path, keys: tuple[str, ...]) -> None:
    """Raises ValueError, with both values, where `config` differs under `keys` from the workdir's `config.json`."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        saved = _flatten(json.loads(path.read_text()))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a config ({error}); restore it, or move the workdir away") from error
    here = _flatten(json.loads(json.dumps(config.to_dict(), default=list)))
    missing = "(not there)"
    differ = [
        f"{key} was {saved.get(key, missing)!r} and is now {here.get(key, missing)!r}"
        for key in sorted(saved.keys() | here.keys())
        if any(key == k or key.startswith(f"{k}.") for k in keys) and saved.get(key, missing) != here.get(key, missing)
    ]
    if differ:
        raise ValueError(
            f"the config does not fit the checkpoints in {workdir}: {'; '.join(differ)}. "
            "Give the old values (--config.KEY=VALUE), or another --workdir"
        )


def check_same_data(source: Source, workdir: pathlib.Path, allow_changed: bool) -> None:
    """Raises ValueError, with both fingerprints, where the images are not those that the workdir's run began with."""
    path = workdir / "data.json"
    if path.exists() and not allow_changed:
        began = json.loads(path.read_text())
        if began["fingerprint"] != source.fingerprint:
            raise ValueError(
                f"the images have changed since {workdir} was begun: {began['source']} ({began['images']} images) had "
                f"fingerprint {began['fingerprint']}, {source.spec} ({len(source)}) has {source.fingerprint}. "
                "Give the old images, another --workdir, or --config.data.allow_changed=True"
            )


def save_data(source: Source, workdir: pathlib.Path) -> None:
    """Writes `data.json`: which images a run saw."""
    seen = {"source": source.spec, "images": len(source), "fingerprint": source.fingerprint}
    seen |= {"skipped": list(source.skipped)}
    write_atomically(workdir / "data.json", json.dumps(seen, indent=2).encode() + b"\n")


def seen_data(workdir: pathlib.Path) -> str | None:
    """The fingerprint of the images that the workdir's run saw; None where it does not say."""
    path = workdir / "data.json"
    return json.loads(path.read_text())["fingerprint"] if path.exists() else None


def save_spectrum(power: np.ndarray, workdir: pathlib.Path) -> None:
    """Writes `spectrum.npz`."""
    content = io.BytesIO()
    np.savez(content, power=power)
    write_atomically(workdir / "spectrum.npz", content.getvalue())


def load_spectrum(config: ConfigDict, workdir: pathlib.Path) -> np.ndarray | None:
    """The spectrum that training measured and stored as `spectrum.npz`; None where none is needed or stored."""
    path = workdir / "spectrum.npz"
    if not needs_spectrum(config) or not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return stored["power"]
