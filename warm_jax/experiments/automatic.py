"""The settings that a config leaves unset, chosen from its images and the machine, each with the reason.

`configs/images.py` is such a config. `recipes` has the rules; `settle` gathers the facts, fills the config and says
what it chose. A run that has checkpoints keeps what its config.json says, whatever the machine is now.
"""

import collections
import json
import math
import pathlib
import textwrap

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_jax.data import download, sources
from warm_jax.experiments import experiment, recipes
from warm_jax.experiments.recipes import Images, Machine
from warm_jax.runtime import log, pod, preemption, workdirs

# What is said of it; the rest follows from these, and is in config.json.
_TOLD = (
    *("model.sigma_data", "model.channels", "model.channel_mult", "model.num_blocks", "model.patch_size"),
    *("data.augment", "train.batch_size", "train.accumulation", "train.steps"),
)
_KEYS = {"data.source", *recipes.choose(Images("", 1, 8, 8, 1, 0, 0.5), Machine("cpu", 1, 0), {})}


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def here() -> Machine:
    """The devices of all processes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    platform = device.platform if device.platform in ("cpu", "tpu") else "gpu"
    return Machine(platform, jax.device_count(), int(stats.get("bytes_limit", 0)))


def look(source: sources.Source) -> Images:
    """What `recipes.choose` needs of a source: up to 2,000 images, spread evenly, are read, the sums are exact."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(recipes.MEASURED, len(source))).astype(np.int64))
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
        return sources.open_source(
            config.data.source,
            image_size=config.data.image_size and experiment.image_side(config),
            channels=config.data.channels,
            on_error=config.data.on_error,
        )
    except FileNotFoundError as error:
        why = f" ({error})" if error.errno is None else ""  # the system's own text says no more
        raise FileNotFoundError(
            f"data.source {config.data.source} is not there{why}; make it with --mode=prepare, or name another with "
            "--config.data.source"
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
    if config.data.num_classes is not None:
        experiment.check_classes(config, source)
    images, machine = look(source), machine or here()
    given = {key: value for key, value in values.items() if value is not None}
    choices = recipes.choose(images, machine, given)
    found = {key: choices[key] for key in keys if key in choices}
    chosen = {key: value for key, (value, _) in found.items()}
    return {"values": chosen, "said": _said(images, machine, found), "devices": machine.devices}


def _said(images: Images, machine: Machine, found: dict[str, tuple[object, str]]) -> str:
    """What matters of what was chosen, a line a reason, and how to get something else."""
    reasons = collections.defaultdict(list)
    for key, (value, why) in found.items():
        if key in _TOLD:
            reasons[why].append(f"{key} {value}")
    classes = f"{images.classes} classes" if images.classes else "no classes"
    shape = f"{images.height}×{images.width}×{images.channels}"
    on = f"{machine.devices} {machine.platform.upper()} device(s)"
    said = [f"    {', '.join(settings)}: {why}" for why, settings in reasons.items()]
    if machine.platform == "cpu":
        more = ["--config.train.steps=N trains longer; a GPU or TPU gets the published recipe"]
        more += (
            [f"--image_size={recipes.CPU_SIDE} of --mode=prepare suits a CPU"]
            if images.height > 2 * recipes.CPU_SIDE
            else []
        )
        said.append(f"    {'; '.join(more)}")
    said = [textwrap.fill(line, 118, subsequent_indent=" " * 8, break_on_hyphens=False) for line in said]
    head = f"chosen for {images.spec} ({images.count:,} images of {shape}, {classes}) on {on}; "
    return "\n".join([f"{head}--config.KEY=VALUE gives another:", *said])


def fetch(config: ConfigDict) -> None:
    """Has process 0 fetch what `data.download` asks for; nothing for a config that does not, or has no such key.

    ValueError or OSError, InterruptedError after a signal, as of `download.fetch`.
    """
    if config.data.get("download"):
        pod.first_then_all("fetched", lambda: download.fetch(config.data.source or "", preemption.requested))
        config.data.download = False  # it is done, and the run is the same as of a file that was there


def settle(config: ConfigDict, workdir: pathlib.Path, machine: Machine | None = None, quiet: bool = False) -> None:
    """Fills in place what `config` leaves unset of what `recipes.choose` knows, and says so unless `quiet`.

    Nothing is done for a config that has them all. In a pod process 0 looks and chooses, for all. `machine` is where
    the run is to be, by default here. ValueError or OSError where the images cannot be read, or no recipe takes them.
    """
    values = workdirs.flat(config)
    unset = [key for key in values if key in _KEYS and values[key] is None]
    if not unset:
        return
    answer = json.loads(pod.from_first("chosen", lambda: json.dumps(_chosen(config, workdir, unset, machine))))
    with config.unlocked(), config.ignore_type():
        for key, value in answer["values"].items():
            section, name = key.split(".")
            config[section][name] = tuple(value) if isinstance(value, list) else value
    if "devices" in answer:  # before it is said what was chosen around a value that cannot be
        experiment.check_values(config)
        experiment.check_batch(config, answer["devices"])
    if not quiet:
        log.say(answer["said"])
