"""The settings that a config leaves unset, chosen from its images and the machine, each with the reason.

`configs/images.py` is such a config. The rules are pure functions of a few facts; `settle` gathers the facts, fills the
config and says what it chose. A run that has checkpoints keeps what its config.json says, whatever the machine is now.
"""

import collections
import json
import math
import pathlib
import textwrap
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_jax.data import download, sources
from warm_jax.runtime import host, log, pod, preemption, workdirs

_MEASURED = 2000  # images whose standard deviation is taken
_PASSES, _LEAST_IMAGES, _MOST_IMAGES = 4000, 2_000_000, 200_000_000  # EDM's: 200 million of CIFAR-10's 50,000
_SMALL = 20_000  # images; below, the regularisation is that of AFHQv2's 15,803
_UNKNOWN_MEMORY = 16 * 2**30  # bytes a device, where it does not say
_BYTES = 180  # of a train step, an image, a pixel and a channel of each level: cifar10.py's step on a GPU
_PATCHES, _GRID = 8, 16  # on a CPU: the largest patch, and the side of what the network sees
_IN_MEMORY = 1 << 30  # bytes of pixels, beyond which images are decoded while training


class Images(NamedTuple):
    """What is known of a prepared set. `std` is of its values in [-1, 1], about their mean."""

    spec: str
    count: int
    height: int
    width: int
    channels: int
    classes: int
    std: float


class Machine(NamedTuple):
    """The devices that train: platform (cpu, gpu, tpu), number, and bytes of memory of each (0: unknown)."""

    platform: str
    devices: int
    memory: int


class Recipe(NamedTuple):
    """A network and its training."""

    why: str
    values: dict[str, object]


def _levels(side: int) -> tuple[int, ...]:
    """The widths of the published networks: 3 levels up to 32 pixels, 4 up to 64, and one more with each doubling."""
    if side <= 32:
        return (2, 2, 2)
    extra = math.ceil(math.log2(side / 64))
    return (1,) * (extra + 1) + (2, 2, 2)


def _divided(images: Images, unit: int, why: str) -> None:
    """Raises ValueError where the sides are not multiples of `unit`."""
    if not (images.height % unit or images.width % unit):
        return
    side = min(images.height, images.width)
    nearest = sorted({max(unit, side // unit * unit), (side // unit + 1) * unit})
    raise ValueError(
        f"{images.spec}: {images.height}×{images.width} pixels; {why}, so sides must be multiples of {unit}: prepare "
        f"the images with --image_size={' or '.join(map(str, nearest))}, or give --config.model.channel_mult"
    )


def _published(images: Images, given: dict[str, object]) -> Recipe:
    """For accelerators: EDM's DDPM++ by resolution."""
    side = max(images.height, images.width)
    mult = tuple(given.get("model.channel_mult", _levels(side)))
    if "model.channel_mult" not in given:
        _divided(images, 2 ** (len(mult) - 1), f"the network halves them {len(mult) - 1} times")
    low = side <= 32
    small, large = images.count < _SMALL, images.count >= 500_000
    values = {
        "model.channels": 128,
        "model.channel_mult": mult,
        "model.num_blocks": 4,
        "model.attention": (16,),
        "model.patch_size": 1,
        "model.dtype": "bfloat16",
        "model.dropout": 0.25 if small else 0.1 if large else 0.13 if low else 0.05,
        "data.augment": "none" if large else "edm",
        "data.augment_probability": 0.0 if large else 0.12 if low and not small else 0.15,
        "train.learning_rate": 1e-3 if low else 2e-4,
        "train.decay": "none",
        "train.ema_halflife_images": 500_000.0,
        "sample.steps": 18 if low else 40,
        "sample.batch_size": 256 if side <= 64 else 64,
    }
    of = "CIFAR-10's (32)" if low else "FFHQ's (64)" if side <= 64 else "FFHQ's (64), with more levels"
    return Recipe(f"the published recipe by resolution: {of}", values)


def _small(images: Images, given: dict[str, object]) -> Recipe:
    """For a CPU: a network that sees patches, a grid of 16×16 of them."""
    sides = (images.height, images.width)
    fitting = [p for p in range(1, _PATCHES + 1) if not any(side % (2 * p) for side in sides)]
    patch = next((p for p in fitting if max(sides) <= p * _GRID), fitting[-1] if fitting else 1)
    if not {"model.channel_mult", "model.patch_size"} & given.keys():
        _divided(images, 2, "the network halves them once")
    values = {
        "model.channels": 32 if patch <= 2 else 64,
        "model.channel_mult": (1, 2),
        "model.num_blocks": 1,
        "model.attention": (),
        "model.patch_size": patch,
        "model.dtype": "float32",
        "model.dropout": 0.0,
        "data.augment": "none",
        "data.augment_probability": 0.0,
        "train.learning_rate": 2e-3,
        "train.decay": "cosine",
        "train.ema_halflife_images": 6400.0,
        "sample.steps": 18,
        "sample.batch_size": 64,
    }
    return Recipe("a network that a CPU trains in minutes to tens of minutes", values)


def _batch(images: Images, machine: Machine, values: dict[str, object]) -> tuple[int, int, str, str]:
    """(train.batch_size, train.accumulation, the reason of each); `values` has what was given, and the network."""
    devices = machine.devices
    wanted = host.CPU_BATCH if machine.platform == "cpu" else 512 if max(images.height, images.width) <= 32 else 256
    batch = values.get("train.batch_size") or max(1, wanted // devices) * devices
    why = f"about {wanted}, a multiple of {devices} device(s)"
    if machine.platform == "cpu" or batch % devices:
        return batch, 1, why, "it fits at once"
    pixels = images.height * images.width // max(1, values["model.patch_size"]) ** 2
    levels = enumerate(values["model.channel_mult"])
    one = _BYTES * sum(pixels // 4**level * values["model.channels"] * mult for level, mult in levels)
    room, share = 0.6 * (machine.memory or _UNKNOWN_MEMORY), batch // devices
    parts = next((n for n in range(1, share) if share % n == 0 and share // n * one <= room), share)
    known = f"{machine.memory / 2**30:.0f} GiB" if machine.memory else "16 GiB, since it does not say its memory"
    reason = f"some {one / 2**20:,.0f} MiB an image, and a device has {known}"
    return batch, parts, why, reason


def choose(images: Images, machine: Machine, given: dict[str, object]) -> dict[str, tuple[object, str]]:
    """The value of every setting that is chosen, by dotted key, with its reason; what is `given` is its own reason.

    ValueError, with the remedy, for images that no recipe takes.
    """
    small = machine.platform == "cpu"
    recipe = (_small if small else _published)(images, given)
    size = images.height if images.height == images.width else (images.height, images.width)
    found = {
        "data.image_size": (size, "as the images are"),
        "data.channels": (images.channels, "as the images are"),
        "data.num_classes": (images.classes, "as the images are"),
        "model.sigma_data": (
            min(1.0, max(0.05, round(images.std, 2))),
            f"the standard deviation of {min(images.count, _MEASURED):,} of the images",
        ),
    } | {key: (value, recipe.why) for key, value in recipe.values.items()}
    network = {key: value for key, (value, _) in found.items()} | given
    batch, parts, why, fits = _batch(images, machine, network)
    seen = 1800 * host.CPU_BATCH if small else min(max(_PASSES * images.count, _LEAST_IMAGES), _MOST_IMAGES)
    length = f"{seen:,} images" + ("" if small else ": 4,000 passes, from 2 to 200 million")
    steps = given.get("train.steps") or max(1, seen // batch)
    large = images.count * images.height * images.width * images.channels > _IN_MEMORY
    found |= {
        "train.batch_size": (batch, why),
        "train.accumulation": (parts, fits),
        "train.steps": (steps, length),
        "train.warmup_images": (min(10_000_000, steps * batch // 18 if small else steps * batch // 20), length),
        "data.num_workers": (4 if large and not small else 0, "processes that decode, where pixels take over 1 GiB"),
        "eval.count": (max(4, min(images.count, 1000 if small else 10_000)), "no more than there are images"),
    }
    rhythm = {
        "log": steps // 18 if small else 100,
        "sample": min(5000, steps // 4),
        "checkpoint": min(5000, steps // 4),
    }
    for name, every in rhythm.items():
        found[f"train.{name}_every"] = (max(1, every), "by the number of steps")
    found["train.posthoc_every"] = (max(1, steps // 40), "by the number of steps")
    found["train.keep_every"] = (0 if small else 50_000, "by the number of steps")
    return {key: (given[key], "given") if key in given else choice for key, choice in found.items()}


_KEYS = {"data.source", *choose(Images("", 1, 8, 8, 1, 0, 0.5), Machine("cpu", 1, 0), {})}


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def here() -> Machine:
    """The devices of all processes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    platform = device.platform if device.platform in ("cpu", "tpu") else "gpu"
    return Machine(platform, jax.device_count(), int(stats.get("bytes_limit", 0)))


def look(source: sources.Source) -> Images:
    """What `choose` needs of a source: up to 2,000 images, spread evenly, are read, the sums are exact."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(_MEASURED, len(source))).astype(np.int64))
    count = total = squares = 0
    for part in np.array_split(chosen, -(-len(chosen) // 256)):
        values = source.read(part)[0].astype(np.int64)
        count, total, squares = count + values.size, total + int(values.sum()), squares + int((values**2).sum())
    std = math.sqrt(max(0.0, squares / count - (total / count) ** 2)) / 127.5
    return Images(source.spec, len(source), *source.image_shape, source.num_classes, std)


# ── A config ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open(config: ConfigDict) -> sources.Source:
    """The images, of whatever size they have."""
    if not config.data.source:
        raise ValueError(
            "data.source is unset; name the prepared images, --config.data.source=zip:FILE.zip, which --mode=prepare "
            "writes"
        )
    try:
        return sources.open_source(config.data.source, on_error=config.data.on_error)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.source {config.data.source} is not there ({error}). Name another with --config.data.source"
        ) from error


def _chosen(config: ConfigDict, workdir: pathlib.Path, keys: list[str], machine: Machine | None) -> dict:
    """{"values": {key: value}, "said": lines} of the unset `keys`: those of a run that has begun, or chosen ones."""
    values = workdirs.flat(config)
    if any((workdir / "checkpoints").glob("[0-9]*")):
        stored = workdirs.flat(workdirs.load_config(workdir))
        if config.data.source not in (None, stored["data.source"]):  # before another size is said to be wrong
            workdirs.check_same_data(_open(config), workdir, config.data.allow_changed)
        found = {key: stored[key] for key in keys if stored.get(key) is not None}
        return {"values": found, "said": f"settings that are not given are those of {workdir / 'config.json'}"}
    source = _open(config)
    images, machine = look(source), machine or here()
    choices = choose(images, machine, {key: value for key, value in values.items() if value is not None})
    found = {key: choices[key] for key in keys if key in choices}
    return {"values": {key: value for key, (value, _) in found.items()}, "said": _said(images, machine, found)}


def _said(images: Images, machine: Machine, found: dict[str, tuple[object, str]]) -> str:
    reasons = collections.defaultdict(list)
    for key, (value, why) in found.items():
        reasons[why].append(f"{key} {value}")
    classes = f"{images.classes} classes" if images.classes else "no classes"
    shape = f"{images.height}×{images.width}×{images.channels}"
    lines = [
        f"chosen for {images.spec} ({images.count:,} images of {shape}, {classes}) on {machine.devices} "
        f"{machine.platform.upper()} device(s); --config.KEY=VALUE gives another:"
    ]
    said = [f"    {', '.join(settings)}: {why}" for why, settings in reasons.items()]
    return "\n".join([*lines, *(textwrap.fill(line, 118, subsequent_indent=" " * 8) for line in said)])


def fetch(config: ConfigDict) -> None:
    """Has process 0 fetch what `data.download` asks for; nothing for a config that does not, or has no such key.

    ValueError or OSError, InterruptedError after a signal, as of `download.fetch`.
    """
    if config.data.get("download"):
        pod.first_then_all("fetched", lambda: download.fetch(config.data.source or "", preemption.requested))
        config.data.download = False  # it is done, and the run is the same as of a file that was there


def settle(config: ConfigDict, workdir: pathlib.Path, machine: Machine | None = None, quiet: bool = False) -> None:
    """Fills in place what `config` leaves unset of the settings that `choose` knows, and says so unless `quiet`.

    Nothing is done for a config that has them all. In a pod process 0 looks and chooses, for all. `machine` is where
    the run is to be, by default here. ValueError or OSError where the images cannot be read, or no recipe takes them.
    """
    values = workdirs.flat(config)
    unset = [key for key in values if key in _KEYS and values[key] is None]
    if not unset:
        return
    answer = json.loads(pod.from_first("chosen", lambda: json.dumps(_chosen(config, workdir, unset, machine))))
    if not quiet:
        log.say(answer["said"])
    with config.unlocked(), config.ignore_type():
        for key, value in answer["values"].items():
            section, name = key.split(".")
            config[section][name] = tuple(value) if isinstance(value, list) else value
