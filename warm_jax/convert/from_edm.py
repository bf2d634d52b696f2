"""From NVIDIA's EDM network pickles (DDPM++, NCSN++, ADM) to a workdir that samples as hot diffusion.

What the network looks like is read from its tensors, and every setting that no shape would betray (heads, scales,
epsilons, filters) is compared with what is built here: a file is converted exactly, or refused.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from warm_jax.data import augment
from warm_jax.experiments import experiment
from warm_jax.models import geometry
from warm_jax.runtime import checkpoint, log, workdirs
from warm_jax.weights import edm_pickle, tensors

LICENCE = (
    "NVIDIA publishes EDM's weights under CC BY-NC-SA 4.0: no commercial use, and what is converted or trained from "
    "them stays under it"
)
_BLOCK = re.compile(r"enc\.(\d+)x\1_block(\d+)")
_SETTINGS = {  # of a block and of a norm, by the network's class
    "SongUNet": {"skip_scale": 0.5**0.5, "adaptive_scale": False, "eps": 1e-6},
    "DhariwalUNet": {"skip_scale": 1, "adaptive_scale": True, "eps": 1e-5},
}


# ── What the network is ──────────────────────────────────────────────────────────────────────────────────────────────


def _architecture(model: edm_pickle.Module) -> str:
    if model.kind == "DhariwalUNet":
        return "adm"
    if model.kind == "SongUNet":
        return "ncsnpp" if "map_noise.freqs" in _buffers(model) else "ddpmpp"
    raise ValueError(f"a network of class {model.kind[:100]!r}; SongUNet and DhariwalUNet can be converted")


def _buffers(model: edm_pickle.Module) -> dict[str, np.ndarray]:
    return {f"{name}.{key}": array for name, part in model.walk() for key, array in part.buffers.items()}


def settings(network: edm_pickle.Module) -> dict[str, object]:
    """What a config must say of the network, by dotted key. ValueError where it is none that can be built here."""
    if network.kind != "EDMPrecond":
        raise ValueError(
            f"a network around which stands {network.kind[:100]!r}; only EDMPrecond can be converted, not the older "
            "preconditionings (VPPrecond, VEPrecond, iDDPMPrecond)"
        )
    try:
        model = network.children["model"]
        parts, side = dict(model.walk()), network.settings["img_resolution"]
        channels = parts[f"enc.{side}x{side}_conv"].parameters["weight"].shape[0]
        blocks = [(int(match[1]), int(match[2])) for match in map(_BLOCK.fullmatch, parts) if match]
        sides = sorted({resolution for resolution, _ in blocks}, reverse=True)
        first = {s: parts[f"enc.{s}x{s}_block0"] for s in sides}
        asked = model.settings["_init_kwargs"]
        labels = parts["map_augment"].parameters["weight"].shape[1] if "map_augment" in parts else 0
        if labels not in (0, augment.LABELS):
            raise ValueError(f"a network with {labels} augmentation labels; 0 or {augment.LABELS} can be converted")
        return {
            "data.image_size": side,
            "data.channels": network.settings["img_channels"],
            "data.num_classes": network.settings["label_dim"],
            "data.label_dropout": float(asked.get("label_dropout", 0)),
            "data.augment": "edm" if labels else "none",
            "model.architecture": _architecture(model),
            "model.channels": channels,
            "model.channel_mult": tuple(
                first[s].children["conv0"].parameters["weight"].shape[0] // channels for s in sides
            ),
            "model.num_blocks": 1 + max(number for _, number in blocks),
            "model.attention": tuple(s for s in sides if "qkv" in first[s].children),
            "model.dropout": float(asked.get("dropout", 0.1)),  # what EDM's networks have where nothing is asked
            "model.patch_size": 1,
            "model.dtype": "float32",
            "model.preconditioning": "edm",
            "model.sigma_data": float(network.settings["sigma_data"]),
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a network without what EDM's have ({error!r})") from None


def _misfits(model: edm_pickle.Module, style: geometry.Style) -> Iterator[str]:
    """Settings of parts that no shape betrays, and that differ from what is built here."""
    taps = np.outer(style.taps, style.taps)
    for name, part in model.walk():
        expected = dict(_SETTINGS[model.kind])
        if "qkv" in part.children:
            width = part.children["proj"].parameters["weight"].shape[0]
            expected["num_heads"] = max(1, width // style.head_channels) if style.head_channels else 1
        if part.kind == "GroupNorm":
            expected["num_groups"] = geometry.groups(len(part.parameters["weight"]))
        for key, value in expected.items():
            found = part.settings.get(key, value)
            if not isinstance(found, int | float) or not np.isclose(found, value, rtol=1e-6):
                yield f"{name}.{key} is {found!r}, not {value!r}"
        kernel = part.buffers.get("resample_filter")
        if kernel is not None and (kernel.shape[2:] != taps.shape or not np.allclose(kernel[0, 0], taps)):
            yield f"{name}.resample_filter is not {style.taps}"


# ── Its parameters ───────────────────────────────────────────────────────────────────────────────────────────────────


def _path(name: str) -> tuple[str, ...]:
    """Where a part stands here: `enc.32x32_block0.conv0` is enc_32x32_block0, conv0."""
    ends = re.sub(r"^dec\.\d+x\d+_aux_(norm|conv)$", r"out_\1", name)
    return tuple(re.sub(r"^(enc|dec)\.", r"\1_", ends).split("."))


def _ours(name: str, key: str, array: np.ndarray) -> tuple[str, Float[np.ndarray, "..."]]:
    """(our name, our layout) of a tensor: matrices [in, out], kernels [height, width, in, out], q, k, v apart."""
    array = array.astype(np.float32)
    if name.endswith(".qkv"):
        # Our output i·c + j is their row 3j + i.
        array = array.reshape(-1, 3, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    if key == "weight" and array.ndim == 1:
        return "scale", array
    if key == "weight" and array.ndim in (2, 4):
        return "kernel", array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return key, array


def parameters(network: edm_pickle.Module, shapes: PyTree) -> dict[str, PyTree]:
    """The network's tensors as a parameter tree of `shapes`; ValueError that lists all that does not fit."""
    model = network.children["model"]
    found: dict[tuple[str, ...], np.ndarray] = {}
    for name, part in model.walk():
        owned = part.parameters | {key: part.buffers[key] for key in ("freqs",) if key in part.buffers}
        for key, array in owned.items():
            ours, value = _ours(name, key, array)
            found[(*_path(name), ours)] = value
    expected = {tuple(e.key for e in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    architecture = _architecture(model)
    wrong = list(_misfits(model, geometry.STYLES[architecture]))
    for path in sorted(found.keys() | expected.keys()):
        here, there = expected.get(path), found[path].shape if path in found else None
        if here != there:
            wrong.append(f"{'.'.join(path)} is {there or 'missing'}, not {here or 'there'}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the network is not {architecture} as it is built here: {'; '.join(wrong[:8])}{more}")
    tree: dict[str, PyTree] = {}
    for path, value in found.items():
        inner = tree
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = np.ascontiguousarray(value)
    return tree


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `prepare` checked and `convert` writes."""

    experiment: experiment.Experiment
    params: PyTree
    workdir: pathlib.Path
    origin: dict[str, str]
    commands: tuple[str, ...]


def nearest_config(found: dict[str, object]) -> str:
    """The config file of the set that a network of such `settings` was published for, as hot diffusion."""
    if found["data.image_size"] == 32:
        name = "cifar10_conditional" if found["data.num_classes"] else "cifar10"
    else:
        name = "imagenet64" if found["model.architecture"] == "adm" else "ffhq64"
    return f"configs/{name}.py:hot"


def _commands(name: str, pristine: ConfigDict, config: ConfigDict, workdir: pathlib.Path) -> tuple[str, ...]:
    """How to sample, and how to start a warm training, with all values that differ from the config file's."""
    options = [
        f"--config.{key}='{value}'" if isinstance(value, tuple | str) else f"--config.{key}={value}"
        for key, value in workdirs.differing(pristine, config, (*workdirs.MODEL_KEYS, "data.label_dropout"))
    ]
    run, folder = "python -m warm_jax.main", f"'{workdir}'" if " " in str(workdir) else workdir
    kept = [option for option in options if "model.dtype" not in option and "label_dropout" not in option]
    return (
        " ".join([run, f"--config={name}", *options, "--mode=sample", f"--workdir={folder}"]),
        " ".join([run, f"--config={name.partition(':')[0]}", *kept, f"--init_from={folder}"]),
    )


def prepare(
    file: str, workdir: str, name: str, config: ConfigDict | None, load: Callable[[str], ConfigDict]
) -> Conversion:
    """Reads and checks everything. ValueError or OSError for bad input.

    Args:
      file: The pickle.
      workdir: Where to; empty: `runs/` and the file's name.
      name: What --config says, as configs/cifar10.py:hot; empty: the file's nearest.
      config: The config of that name, with what was overridden; None: as it is.
      load: From a config's name to the config as its file has it.
    """
    digest = tensors.require_file(file, "", "--from_edm=FILE.pkl is one of NVIDIA's network pickles.")
    network = edm_pickle.read_network(file)
    try:
        found = settings(network)
        name = name or nearest_config(found)
        config = load(name) if config is None else config
        if config.process.system not in ("hot", "warm") or config.process.bnr != 0:
            raise ValueError(f"EDM is hot diffusion, and --config={name} is not; add :hot to the config's name")
        with config.unlocked():
            config.update_from_flattened_dict(found)
        exp = experiment.build(config)
        params = parameters(network, jax.eval_shape(exp.model.init, jax.random.key(0)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    target = pathlib.Path(workdir or pathlib.Path("runs") / pathlib.Path(file).stem)
    workdirs.check_new(target)
    origin = {"source": pathlib.Path(file).name, "sha256": digest, "format": "EDM network pickle", "licence": LICENCE}
    return Conversion(exp, params, target, origin, _commands(name, load(name), config, target))


def save_workdir(exp: experiment.Experiment, params: PyTree[Array | np.ndarray], workdir: pathlib.Path) -> None:
    """Writes config.json, and the weights as a checkpoint of step 0 that can be sampled and begun from."""
    workdirs.save_config(exp.config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    # On one device: of weights on many, Orbax would compile how to share the work of writing.
    checkpoints.save(0, None, jax.device_put(params, jax.devices()[0]), wait=True)
    checkpoints.close()


def convert(conversion: Conversion) -> int:
    """Writes the workdir. Returns the exit status."""
    workdir, origin = conversion.workdir, conversion.origin
    workdirs.write_atomically(workdir / workdirs.ORIGIN, json.dumps(origin, indent=2).encode() + b"\n")
    save_workdir(conversion.experiment, conversion.params, workdir)
    count = sum(leaf.size for leaf in jax.tree.leaves(conversion.params))
    architecture = conversion.experiment.config.model.architecture
    log.say(f"{workdir}: {architecture}, {count:,} parameters, from a file of sha256 {origin['sha256']}")
    log.say(f"licence: {origin['licence']}")
    log.say("\n".join(["sample, or train warm from it:", *(f"    {command}" for command in conversion.commands)]))
    return 0
