"""The recipes for own images: which settings suit a set of images and a machine, each with the reason.

Pure functions of a few facts, which `automatic` gathers.
"""

import math
from typing import NamedTuple

from warm_jax.runtime import host

MEASURED = 2000  # images whose standard deviation is taken
CPU_SIDE = 64  # of images that a CPU learns in minutes
_PASSES, _LEAST_IMAGES, _MOST_IMAGES = 4000, 2_000_000, 200_000_000  # EDM's: 200 million of CIFAR-10's 50,000
_SMALL = 20_000  # images; below, the regularisation is that of AFHQv2's 15,803
_UNKNOWN_MEMORY = 16 * 2**30  # bytes a device, where it does not say
_BYTES = 180  # of a train step, an image, a pixel and a channel of each level: cifar10.py's step on a GPU
_PATCHES, _GRID = 8, 16  # on a CPU: the largest patch, and the side of what the network sees
_FIRST = 38_400  # images of a first training on a CPU; of small networks, which cost a third, half as many again
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
    return Recipe("a small network, for a first training on a CPU", values)


def _seen(images: Images, machine: Machine, values: dict[str, object]) -> tuple[int, str]:
    """How many images a training sees, and why that many. On a CPU its work is bounded, whatever the size of images."""
    if machine.platform != "cpu":
        return min(max(_PASSES * images.count, _LEAST_IMAGES), _MOST_IMAGES), "4,000 passes, from 2 to 200 million"
    grid = images.height * images.width / max(1, values["model.patch_size"]) ** 2
    seen = _FIRST * 3 // 2 if values["model.channels"] <= 32 else _FIRST
    if grid <= _GRID**2:
        return seen, f"about {5 if values['model.channels'] <= 32 else 15} minutes of two quiet cores"
    return max(1, int(seen * _GRID**2 / grid)), "about 15 minutes of two quiet cores, few for images of this size"


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
            f"the standard deviation of {min(images.count, MEASURED):,} of the images",
        ),
    } | {key: (value, recipe.why) for key, value in recipe.values.items()}
    network = {key: value for key, (value, _) in found.items()} | given
    batch, parts, why, fits = _batch(images, machine, network)
    seen, why_seen = _seen(images, machine, network)
    length = f"{seen:,} images: {why_seen}"
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
